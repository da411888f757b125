"""SparseGPT: prune inputs one by one, and let those still to come make up for the error.

Frantar & Alistarh 2023, arXiv:2301.00774: the sweep of `core.ldlq` with ŵ = 0 for what is pruned.
When it comes to a block, the weights with the smallest (t l)² go, t being the block's targets and l
the factor's diagonal: that is what the sweep will count for their loss. What stays may be rounded
to a grid in the same sweep.

Differs from IST-DASLab/sparsegpt@147d215 sparsegpt.py: exactly the share asked for is zero, where
that code prunes one weight a block more; of equal scores the lowest index goes first; jointly
rounded weights have grids per group, fitted when the sweep comes to the group to what pruning alone
would make of it, where that code has one a row, fitted to the weights before; dead channels and
damping as in `core.damping`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lqec_jax.core import damping
from lqec_jax.core.arguments import check_number
from lqec_jax.core.bases import base_target, inner_gram, kept, mask_base
from lqec_jax.core.group_grid import GroupGrid, make_grid
from lqec_jax.core.ldlq import block_of, ldlq
from lqec_jax.core.masks import Sparsity, keep_largest, keep_pattern, parse_sparsity
from lqec_jax.core.types import LinearProblem, LinearStep, output_error
from lqec_jax.errors import InputError
from lqec_kernels.formats import Base, CompressedLinear, Dense

REFERENCE = "IST-DASLab/sparsegpt@147d215 sparsegpt.py"
# Inputs whose weights compete without a pattern, at most; the authors' number.
BLOCK = 128


class Known(NamedTuple):
    """What is settled for the rows of a block: whether any input is ever seen by them, [rows, 1],
    which weights stay, and their group's grid."""

    live: jax.Array
    keep: jax.Array | None = None
    scales: jax.Array | None = None
    zeros: jax.Array | None = None


class _Sweep(NamedTuple):
    """The sizes of blocks in which rows compete and share a grid, the larger outside."""

    sparsity: Sparsity
    grid: GroupGrid | None
    compete: int
    group: int

    def run(self, w: jax.Array, lower: jax.Array, sizes: tuple[int, ...], known: Known) -> dict:
        """Sweeps rows, block in block; returns what becomes of them, all [rows, d_out]."""
        if not sizes:
            return self._run_rows(w, lower, known)
        size, *inner = sizes

        def quantize_block(target: jax.Array, number: jax.Array):
            own = block_of(lower, number, size)
            mine = _rows_of(known, number, size)
            if size == self.compete:
                mine = mine._replace(keep=self._choose(target, own, mine))
            if self.grid is None or size != self.group:
                out = self.run(target, own, tuple(inner), mine)
                return out["w_hat"], out
            mine = self.fit(target, own, tuple(inner), mine)
            out = self.run(target, own, tuple(inner), mine)
            return out["w_hat"], out | {"scales": mine.scales, "zeros": mine.zeros}

        return _flatten(ldlq(w, lower, quantize_block, size))

    def fit(self, w: jax.Array, lower: jax.Array, sizes: tuple[int, ...], known: Known) -> Known:
        """Fits one grid for all rows, to what pruning alone would make of them.

        What stays makes up for what goes and grows by it: the rows as they are have another range.
        Zero lies on every grid, so what goes costs nothing.
        """
        stays = self._replace(grid=None).run(w, lower, sizes, known)["w_hat"]
        scales, zeros = self.grid.fit(stays[None], _energy(lower)[None])
        return known._replace(scales=scales[0], zeros=zeros[0])

    def _choose(self, target: jax.Array, lower: jax.Array, known: Known) -> jax.Array:
        """Returns which of a block's weights stay."""
        score = jnp.where(known.live, jnp.square(target) * _energy(lower), 0.0)
        if known.keep is not None:
            score = jnp.where(known.keep, score, 0.0)
        if self.sparsity.pattern:
            keep = keep_pattern(score, *self.sparsity.kept_of)
        else:
            zeros = int(self.sparsity.fraction * score.size)
            keep = keep_largest(score.reshape(-1), zeros).reshape(score.shape)
        return keep if known.keep is None else keep & known.keep

    def _run_rows(self, w: jax.Array, lower: jax.Array, known: Known) -> dict:
        def quantize_row(row: jax.Array, place: jax.Array):
            keep = jax.lax.dynamic_slice_in_dim(known.keep, place, 1)
            codes, w_hat = row, row
            if self.grid is not None:
                codes, w_hat = self.grid.round(row, known.scales, known.zeros)
            w_hat = jnp.where(keep, w_hat, 0.0)
            return w_hat, {"w_hat": w_hat, "codes": codes, "keep": keep}

        return _flatten(ldlq(w, lower, quantize_row, 1))


def _rows_of(known: Known, number: jax.Array, size: int) -> Known:
    def rows(array):
        return jax.lax.dynamic_slice_in_dim(array, number * size, size)

    keep = None if known.keep is None else rows(known.keep)
    return known._replace(live=rows(known.live), keep=keep)


def _energy(lower: jax.Array) -> jax.Array:
    """Returns how much the sweep counts the square of an error made at each row, [rows, 1]."""
    return jnp.square(jnp.diagonal(lower))[:, None]


def _flatten(out: dict) -> dict:
    return {name: part.reshape(-1, part.shape[-1]) for name, part in out.items()}


def prune(w, gram, sparsity: Sparsity, *, grid: GroupGrid | None = None, damp=0.01,
          allowed=None) -> tuple:  # fmt: skip
    """Prunes a weight so that its output error is small.

    Args:
      w: float32 [d_in, d_out].
      gram: E[x xᵀ], float32 [d_in, d_in], whatever its rank.
      grid: how what stays is rounded; None leaves it.
      damp: of the gram, in units of its mean diagonal.
      allowed: bool [d_in, d_out], what may stay at all; None for all.
    Returns:
      (base with its zeros still unmarked, keep bool [d_in, d_out], facts of the damping).
    Raises:
      InputError: a pattern or a group_size does not divide d_in.
    Cost: as GPTQ, and the choice: 32 counts of w, or m comparisons a weight.  jit: yes.
    """
    d_in = w.shape[0]
    sparsity.check("sparsegpt", d_in)
    group = d_in if grid is None else grid.size("sparsegpt", d_in)
    compete = _choose_block(sparsity, d_in, group)
    sweep = _Sweep(sparsity, grid, compete, group)
    lower, facts = damping.factor_reverse(gram, damp)
    live = jnp.diagonal(gram) > 0
    # Dead inputs go first, except where there are no others to tell apart.
    known = Known((live | ~live.any())[:, None], allowed)
    sizes = tuple(sorted({compete, group} - {d_in} | {compete}, reverse=True))
    if grid is not None and group not in sizes:
        known = sweep.fit(w, lower, sizes, known)
    out = sweep.run(w, lower, sizes, known)
    base = Dense(out["w_hat"])
    if grid is not None:
        scales, zeros = out.get("scales", known.scales), out.get("zeros", known.zeros)
        base = grid.pack(out["codes"], scales, zeros)
    return base, out["keep"], facts


def _choose_block(sparsity: Sparsity, d_in: int, group: int) -> int:
    """Returns how many inputs compete at once: blocks that groups divide, or that divide groups."""
    if not sparsity.pattern:
        fitting = [n for n in range(1, min(BLOCK, d_in) + 1) if d_in % n == 0]
        return max(n for n in fitting if n % group == 0 or group % n == 0)
    m = sparsity.kept_of[1]
    if group % m:
        raise InputError(
            f"sparsegpt: group_size={group} is not a multiple of the {m} of "
            f"sparsity={sparsity.pattern!r}; choose one that is"
        )
    return m


def sparsegpt(
    *,
    sparsity: float | str = "2:4",
    bits: int | None = None,
    group_size: int | None = 64,
    symmetric: bool = False,
    damp: float = 0.01,
    clip_search: bool | str = "weight",
    scale_dtype: str = "float16",
) -> LinearStep:
    """Makes the step that prunes the base, and rounds what stays where bits are given.

    A base that was rounded before and is given no bits becomes dense: the sweep moves what stays.

    Args:
      sparsity: a fraction of every block of inputs, or 'n:m' to keep n of every m consecutive ones.
      bits: 1-8, or None to leave what stays as it is.
      group_size: a multiple of m that divides every d_in it meets; None is one group a column.
      symmetric: no zeros are stored.
      damp: first rung of the ladder, in units of the gram's mean diagonal; the authors' number.
      clip_search, scale_dtype: as in `gptq`.
    """
    wanted = parse_sparsity("sparsegpt", sparsity)
    check_number("sparsegpt", "damp", damp, 1e-6, 1.0)
    grid = make_grid(
        "sparsegpt", bits=4 if bits is None else bits, group_size=group_size, symmetric=symmetric,
        clip_search=clip_search, scale_dtype=scale_dtype,
    )  # fmt: skip

    def run(problem: LinearProblem, leaf: CompressedLinear) -> tuple:
        allowed = kept(leaf)
        base, keep, facts = prune(
            base_target(leaf), inner_gram(problem, leaf), wanted,
            grid=None if bits is None else grid, damp=damp, allowed=allowed,
        )  # fmt: skip
        pattern = wanted.pattern if allowed is None else ""
        return mask_base(dataclasses.replace(leaf, base=_like(base, leaf)), keep, pattern), facts

    return LinearStep(
        name="sparsegpt",
        run=run,
        arguments={"sparsity": sparsity, "bits": bits, "group_size": group_size,
                   "symmetric": symmetric, "damp": damp, "clip_search": clip_search,
                   "scale_dtype": scale_dtype},
        needs=frozenset({"gram"}),
        notes=damping.describe,
        objective=output_error,
        objective_name="relative output error",
    )  # fmt: skip


def _like(base: Base, leaf: CompressedLinear) -> Base:
    """Returns a dense base in the dtype that the weight came in."""
    if isinstance(base, Dense) and isinstance(leaf.base, Dense):
        return Dense(base.w.astype(leaf.base.w.dtype))
    return base
