"""AWQ: make the channels that see large inputs larger before rounding, and undo it at the input.

Lin et al. 2023, arXiv:2306.00978: y = (x / c) Q(c w) with c_i = a_i^r, a_i how large input i is;
then each group's range is clipped. r and the clips are searched for.

Differs from mit-han-lab/llm-awq@d6e797a auto_scale.py, auto_clip.py: both searches lower this
weight's exact output error tr(Δᵀ G Δ) from the gram, where those run a module (attention, MLP) on
cached inputs and clip on 512 of its tokens; a_i is rms, not mean |x_i|; 1/c is stored with the
weight (float16, one a weight) and not folded into the layer before, so that every weight has its
own; ranges contain zero and shrink towards it from both ends, to a fifth, where those clamp |w| to
half at most; clips are kept for an output only where they lower its whole error.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.core.bases import base_target, inner_gram, replace_base
from lqec_jax.core.group_grid import GroupGrid, make_grid
from lqec_jax.core.types import LinearProblem, LinearStep, output_error
from lqec_jax.errors import InputError
from lqec_kernels.formats import ChannelScale, CompressedLinear

REFERENCE = "mit-han-lab/llm-awq@d6e797a auto_scale.py"
# Smallest a_i, in units of the mean: what is never seen must not decide how the others are scaled.
LEAST = 1e-4
# Ranges tried by the clip search: the whole down to a fifth.
CLIPS, CLIP_STEP = 40, 0.02


def search_scale(w, gram, outer, grid: GroupGrid, n_grid: int) -> jax.Array:
    """Finds what inputs are to be multiplied by, 1/c.

    c = a^r / √(max a^r · min a^r),  r in 0, 1/n, .., (n-1)/n;  r = 0 is no scale at all.

    Args:
      w: float32 [d_in, d_out].
      gram: E[x xᵀ] of what w reads.
      outer: a scale that its inputs have already, float32 [d_in].
    Returns:
      outer / c as it is stored, float16 [d_in].
    Cost: n_grid products d_in² · d_out.
    """
    rms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0.0))
    mean = jnp.mean(rms)
    size = jnp.maximum(jnp.where(mean > 0, rms / mean, 1.0), LEAST)

    def attempt(k, best):
        power = size ** (k / n_grid)
        stored = (outer * jnp.sqrt(power.max() * power.min()) / power).astype(jnp.float16)
        scale = _relative(stored, outer)
        codes, scales, zeros = _round(w / scale[:, None], grid)
        error = w - scale[:, None] * grids.dequantize(codes, scales, zeros).reshape(w.shape)
        loss = jnp.sum(_column_errors(error, gram))
        return jax.tree.map(lambda n, b: jnp.where(loss < best[0], n, b), (loss, stored), best)

    start = (jnp.asarray(jnp.inf, jnp.float32), outer.astype(jnp.float16))
    return jax.lax.fori_loop(0, n_grid, attempt, start)[1]


def search_clip(w: jax.Array, gram: jax.Array, grid: GroupGrid) -> tuple[jax.Array, jax.Array]:
    """Shrinks each group's range to where its own output error is least.

    argmin over p of δᵀ G_g δ, δ = ŵ_g(p) - w_g, G_g the gram of the group's inputs.

    Args:
      w: float32 [groups, group_size, d_out].
      gram: of all inputs, [d_in, d_in].
    Returns:
      (scales, zeros), each [groups, 1, d_out].
    Cost: 40 products d_in · group_size · d_out.
    """
    groups, size, _ = w.shape
    blocks = gram.reshape(groups, size, groups, size)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)  # [groups, size, size]
    lo, hi = grids.find_range(w, symmetric=grid.symmetric)

    def fit(shrink):
        ends = shrink * lo, shrink * hi
        return grids.fit_grid(*ends, grid.bits, symmetric=grid.symmetric, dtype=grid.dtype)

    def attempt(k, best):
        scales, zeros = fit(1.0 - CLIP_STEP * k)
        error = (
            grids.dequantize(grids.round_to_grid(w, scales, zeros, grid.bits), scales, zeros) - w
        )
        loss = jnp.sum(error * jnp.matmul(blocks, error, precision="highest"), 1, keepdims=True)
        new = (loss, scales, zeros)
        return jax.tree.map(lambda n, b: jnp.where(loss < best[0], n, b), new, best)

    start = (jnp.full(lo.shape, jnp.inf, jnp.float32), *fit(1.0))
    return jax.lax.fori_loop(0, CLIPS, attempt, start)[1:]


def quantize(w, gram, outer, grid: GroupGrid, *, n_grid: int, clip: bool) -> tuple:
    """Scales, clips and rounds a weight; arguments as in `search_scale`.

    Returns:
      (Affine, the stored scale of its inputs, float16 [d_in]).
    """
    stored = search_scale(w, gram, outer, grid, n_grid)
    scale = _relative(stored, outer)
    target, inner = w / scale[:, None], scale[:, None] * gram * scale
    codes, scales, zeros = _round(target, grid)
    if clip:
        grouped = grids.group_rows(target, codes.shape[1])
        clipped = search_clip(grouped, inner, grid)
        clipped = (grids.round_to_grid(grouped, *clipped, grid.bits), *clipped)

        def loss(parts):
            return _column_errors(target - grids.dequantize(*parts).reshape(w.shape), inner)

        better = loss(clipped) < loss((codes, scales, zeros))
        codes, scales, zeros = (
            jnp.where(better, new, old)
            for new, old in zip(clipped, (codes, scales, zeros), strict=True)
        )
    codes = codes.reshape(w.shape).astype(jnp.uint8)  # [d_in, d_out]
    return grid.pack(codes, scales[:, 0], zeros[:, 0]), stored


def _round(w: jax.Array, grid: GroupGrid) -> tuple:
    """Returns (codes [groups, group_size, d_out], scales, zeros) of plain rounding."""
    grouped = grids.group_rows(w, grid.size("awq", w.shape[0]))
    scales, zeros = grid.fit(grouped)
    return grids.round_to_grid(grouped, scales, zeros, grid.bits), scales, zeros


def _column_errors(error: jax.Array, gram: jax.Array) -> jax.Array:
    """Returns δᵀ G δ for every column of an error, [d_out]."""
    return jnp.sum(error * jnp.matmul(gram, error, precision="highest"), axis=0)


def _relative(stored: jax.Array, outer: jax.Array) -> jax.Array:
    """Returns stored / outer [d_in], 1 where that would not be a scale."""
    ratio = stored.astype(jnp.float32) / jnp.where(outer == 0, 1.0, outer)
    return jnp.where((ratio == 0) | ~jnp.isfinite(ratio), 1.0, ratio)


def awq(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    n_grid: int = 20,
    clip_search: bool = True,
    scale_dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base by the rounding of its scaled channels.

    Args:
      bits: 2-8.
      group_size: must divide every d_in it meets; None is one group a column. The authors' is 128.
      symmetric: no zeros are stored.
      n_grid: how many exponents are tried.
      clip_search: also shrink the ranges of groups.
      scale_dtype: of the groups' scales; 'float16' or 'float32'.
    """
    check_int("awq", "bits", bits, 2, 8)
    check_int("awq", "n_grid", n_grid, 1)
    check_choice("awq", "clip_search", clip_search, (True, False))
    grid = make_grid("awq", bits=bits, group_size=group_size, symmetric=symmetric,
                     scale_dtype=scale_dtype)  # fmt: skip

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        w = base_target(leaf)
        outer = _present_scale(leaf, w.shape[0])
        # `outer` meets the inputs first: what is searched for comes after it.
        base, stored = quantize(w, inner_gram(problem, leaf), outer, grid, n_grid=n_grid,
                                clip=clip_search)  # fmt: skip
        return dataclasses.replace(replace_base(leaf, base), input_transform=ChannelScale(stored))

    return LinearStep(
        name="awq",
        run=run,
        arguments={"bits": bits, "group_size": group_size, "symmetric": symmetric,
                   "n_grid": n_grid, "clip_search": clip_search, "scale_dtype": scale_dtype},
        needs=frozenset({"gram"}),
        objective=output_error,
        objective_name="relative output error",
    )  # fmt: skip


def _present_scale(leaf: CompressedLinear, d_in: int) -> jax.Array:
    transform = leaf.input_transform
    if transform is None:
        return jnp.ones(d_in, jnp.float32)
    if isinstance(transform, ChannelScale):
        return transform.scale.astype(jnp.float32)
    raise InputError(
        f"awq: the weight stands behind a {type(transform).__name__} transform already, and has "
        "room for one; use gptq after a rotation"
    )
