"""The problems that the authors' code was run on, and how its numbers are stored.

`../shared/data/golden/README.md` says of every file which code, commit and settings made it. All is
in this library's layout: w [d_in, d_out], groups along d_in, x [tokens, d_in].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lqec_jax
from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.recipe import parse_recipe
from lqec_kernels.formats import Base, CompressedLinear, LowRank
from lqec_kernels.packing import unpack

GROUP = 32
RANK = 8


class Linear(NamedTuple):
    """One weight and what it reads.

    Attributes:
      w: float32 [128, 48].
      live: inputs float32 [256, 128], four sequences after one another.
      x: the same with channel `dead` always zero.
    """

    w: np.ndarray
    live: np.ndarray
    x: np.ndarray
    dead: int
    sequences: int

    @property
    def hessian(self) -> np.ndarray:
        """Returns 2 xᵀ x / sequences in float64, which is what GPTQ and SparseGPT sum up."""
        x = self.x.astype(np.float64)
        return 2.0 / self.sequences * (x.T @ x)

    @property
    def seen(self) -> np.ndarray:
        """Says which inputs are ever other than zero."""
        return np.arange(len(self.w)) != self.dead

    def silenced(self) -> np.ndarray:
        """Returns w with a dead row of zeros, as GPTQ's and SparseGPT's code begins with."""
        return np.where(self.seen[:, None], self.w, np.float32(0))

    def damping(self) -> float:
        """Returns their damping in our units: their mean counts the dead channel as one."""
        diagonal = np.diag(self.hessian)
        theirs = 0.01 * np.where(self.seen, diagonal, 1.0).mean()
        return float(theirs / diagonal[self.seen].mean())

    def error(self, w_hat: Any) -> float:
        """Returns tr(Δᵀ H Δ), Δ = w - ŵ."""
        missing = self.w - np.asarray(w_hat, np.float64)
        return float(np.sum(missing * (self.hessian @ missing)))


def run(recipe: str, w: np.ndarray, stats: LinearStats, leaf: CompressedLinear) -> CompressedLinear:
    """Runs linear steps on statistics of the caller's own."""
    problem = LinearProblem(jnp.asarray(w), stats, jax.random.key(0))
    for step in parse_recipe(recipe).steps:
        leaf, _ = jax.jit(lambda p, start, step=step: run_linear(step, p, start))(problem, leaf)
    return leaf


def dense(recipe: str, w: np.ndarray, x: np.ndarray | None = None) -> np.ndarray:
    """Returns what a recipe makes of a weight."""
    return np.asarray(lqec_jax.quantize(w, recipe, x=x).dense())


def spread(of_groups: np.ndarray, size: int = GROUP) -> np.ndarray:
    """Repeats numbers of groups for each of their inputs."""
    return np.repeat(of_groups.astype(np.float32), size, axis=0)


def dequantize(stored: dict, key: str, size: int = GROUP) -> np.ndarray:
    """Returns scale (code - zero), in float32 as the authors' code has it."""
    zeros = spread(stored[f"{key}.zero"], size)
    return spread(stored[f"{key}.scale"], size) * (stored[f"{key}.codes"] - zeros)


def read_mask(bits: np.ndarray, shape: tuple[int, int] = (128, 48)) -> np.ndarray:
    """Returns a mask from its packed bits."""
    return np.unpackbits(bits)[: shape[0] * shape[1]].reshape(shape).astype(bool)


def codes_of(base: Base) -> np.ndarray:
    """Returns the unsigned codes of a uniform grid, [d_in, d_out]."""
    return np.asarray(unpack(base.columns()[0], base.bits, base.d_in))


def stored_product(stored: dict, key: str) -> np.ndarray:
    """Returns A B: the halves of a low-rank result differ between codes, their product does not."""
    return stored[f"{key}.A"].astype(np.float64) @ stored[f"{key}.B"]


def product(leaf: CompressedLinear) -> np.ndarray:
    """Returns a b of the last correction."""
    (*_, last) = leaf.corrections
    assert isinstance(last, LowRank)
    return np.asarray(last.a, np.float64) @ np.asarray(last.b, np.float64)


def distance(came: Any, wanted: Any) -> float:
    """Returns ||came - wanted|| / ||wanted||."""
    came, wanted = np.asarray(came, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(came - wanted) / np.linalg.norm(wanted))
