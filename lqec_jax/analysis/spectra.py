"""Singular values of weight errors, and what a low-rank correction can take of them.

    captured(r) = Σ_{i<=r} σ_i² / Σ σ_i²,   σ of w - ŵ,

beside what the same rank captures of independent errors, the Marchenko-Pastur law: where the two
agree, a correction of the weight finds nothing but chance, and more rank only costs more bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core import sites
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.tree import is_compressed, unstack_blocks
from lqec_jax.io.sources.source import Source
from lqec_jax.models.model import Model
from lqec_kernels.formats import CompressedLinear

# Every rank up to the first is shown, beyond it so many a doubling.
EVERY, A_DOUBLING = 16, 4


def measure_spectra(
    source: Source, student: Model, reporter: Reporter | None = None
) -> list[dict[str, Any]]:
    """Measures the error of every compressed weight, one block at a time.

    Returns:
      A dict a weight: `path, layer, kind, d_in, d_out, relative_error` (squared, of the weight's
      energy), `stable_rank` (Σσ²/σ_1²), `half` and `most` (the ranks that capture 50 % and 90 %),
      and at `ranks`: `singular` (σ_r over the weight's norm), `captured`, `noise`.
    Cost: one singular value decomposition a weight.
    """
    reporter = reporter or Silent()
    blocks = unstack_blocks(student.params["blocks"])
    reporter.begin("spectra", len(blocks))
    rows = []
    for layer, block in enumerate(blocks):
        dense = source.block(layer)
        for path in student.fns.linears:
            leaf = sites.get(block, path)
            if is_compressed(leaf):
                w = jnp.asarray(sites.get(dense, path), jnp.float32)
                rows.append(describe_error(path, layer, w, leaf))
        reporter.advance(layer + 1)
    return rows


def describe_error(path: str, layer: int, w: jax.Array, leaf: CompressedLinear) -> dict[str, Any]:
    """Returns one weight's row of `measure_spectra`."""
    singular, norm = (np.asarray(x, np.float64) for x in _decompose(w, leaf))
    energy = np.cumsum(singular**2)
    whole = max(energy[-1], np.finfo(np.float64).tiny)
    ranks = choose_ranks(len(singular))
    places = np.array(ranks) - 1
    return {
        "path": f"blocks/{layer}/{path}",
        "layer": layer,
        "kind": path,
        "d_in": w.shape[0],
        "d_out": w.shape[1],
        "relative_error": float(energy[-1] / norm**2) if norm else 0.0,
        "stable_rank": float(energy[-1] / singular[0] ** 2) if singular[0] else 0.0,
        "half": int(np.searchsorted(energy, 0.5 * whole) + 1),
        "most": int(np.searchsorted(energy, 0.9 * whole) + 1),
        "ranks": ranks,
        "singular": (singular[places] / (norm or 1.0)).tolist(),
        "captured": (energy[places] / whole).tolist(),
        "noise": capture_noise(*w.shape, ranks).tolist(),
    }


@jax.jit
def _decompose(w: jax.Array, leaf: CompressedLinear) -> tuple[jax.Array, jax.Array]:
    return jnp.linalg.svd(w - leaf.dense(), compute_uv=False), jnp.linalg.norm(w)


def choose_ranks(largest: int) -> list[int]:
    """Returns the ranks at which a spectrum is kept: all small ones, then ever fewer, and the last.

    Example:
      >>> choose_ranks(32)[14:]
      [15, 16, 19, 23, 27, 32]
    """

    def find() -> Iterator[int]:
        yield from range(1, min(EVERY, largest) + 1)
        rank = float(EVERY)
        while (rank := rank * 2 ** (1 / A_DOUBLING)) < largest:
            yield round(rank)
        yield largest

    return list(dict.fromkeys(find()))


def capture_noise(d_in: int, d_out: int, ranks: Sequence[int]) -> np.ndarray:
    """Returns what shares of the energy of independent entries ranks capture, for large matrices.

    The squared singular values of a d_in x d_out matrix of independent entries spread, in units of
    their mean, by the Marchenko-Pastur law on (1 ± √β)², β the smaller size over the larger.
    """
    beta = min(d_in, d_out) / max(d_in, d_out)
    low, high = (1 - np.sqrt(beta)) ** 2, (1 + np.sqrt(beta)) ** 2
    # Between the ends by a cosine, where the law's square roots at both ends are smooth.
    angle = np.linspace(0, np.pi, 4097)
    values = (high + low) / 2 + (high - low) / 2 * np.cos(angle)  # falling
    # λ times its density times dλ/dangle: the share of energy; without λ, of components.
    energy = ((high - low) / 2 * np.sin(angle)) ** 2 / (2 * np.pi * beta)
    share = energy / np.maximum(values, 1e-12)
    energy, share = (_accumulate(x, angle) for x in (energy, share))
    return np.interp(np.array(ranks) / min(d_in, d_out), share / share[-1], energy / energy[-1])


def _accumulate(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum((y[1:] + y[:-1]) / 2 * np.diff(x))])
