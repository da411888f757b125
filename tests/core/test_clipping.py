"""Grids with learned ends: what is trained is what is stored, and what moves with the ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import grids
from lqec_jax.core.clipping import Clipped, clip_range, read_clipped, start_clips, store_clipped
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.errors import InputError
from lqec_kernels import packed_matmul
from lqec_kernels.formats import Dense
from lqec_kernels.packing import unpack
from lqec_kernels.sparse import Masked

GRID = GroupGrid(bits=2, group_size=16)
RANDOM = np.random.default_rng(0)
W = jnp.asarray(RANDOM.standard_normal((64, 12)), jnp.float32)


def draw_clips(grid: GroupGrid) -> dict:
    clips = start_clips(*W.shape, grid, "apiq")
    return {n: a - 5 * jnp.asarray(RANDOM.random(a.shape), jnp.float32) for n, a in clips.items()}


def clipped_base(clips: dict, grid: GroupGrid, inner) -> Clipped:
    return Clipped(inner, clips["upper"], clips.get("lower"), grid)


def test_clips_begin_near_the_range():
    for symmetric, names in ((False, ["upper", "lower"]), (True, ["upper"])):
        grid = GroupGrid(2, 16, symmetric)
        clips = start_clips(*W.shape, grid, "apiq")
        assert list(clips) == names
        assert all(logits.shape == (4, 12) for logits in clips.values())
        came = clip_range(grids.group_rows(W, 16), clips, grid)
        full = grids.find_range(grids.group_rows(W, 16), symmetric=symmetric)
        for end, whole in zip(came, full, strict=True):
            np.testing.assert_allclose(end, whole / (1 + np.exp(-4)), rtol=1e-6)
    assert start_clips(*W.shape, GroupGrid(2, None), "apiq")["lower"].shape == (1, 12)
    with pytest.raises(InputError, match="apiq: d_in=64 is not divisible by group_size=48"):
        start_clips(*W.shape, GroupGrid(2, 48), "apiq")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_codes_computed_again_from_stored_scales_are_the_stored_codes(symmetric, dtype):
    grid = GroupGrid(3, 16, symmetric, dtype=jnp.dtype(dtype))
    clips = draw_clips(grid)
    base = jax.jit(lambda w, clips: store_clipped(w, clips, grid))(W, clips)
    words, scales, zeros = base.columns()
    zeros = np.full(scales.shape, 4.0) if zeros is None else np.asarray(zeros, np.float32)
    assert scales.dtype == dtype
    steps = np.round(np.asarray(W).reshape(4, 16, 12) / np.asarray(scales, np.float32)[:, None])
    codes = np.clip(steps + zeros[:, None], 0, 7).reshape(64, 12)
    np.testing.assert_array_equal(unpack(words, 3, 64), codes)
    read = jax.jit(lambda w, clips: read_clipped(w, clips, grid))(W, clips)
    # Two programs may round σ differently, by less than float16 tells.
    for came in (read, clipped_base(clips, grid, Dense(W)).dense()):
        np.testing.assert_allclose(came, base.dense(), rtol=0 if dtype == "float16" else 1e-6)


def test_gradients_of_the_ends_are_those_of_the_surrogate():
    """The zero and every rounding's error stay as they are; the scale alone moves with the ends."""
    random = np.random.RandomState(0)
    w = random.standard_normal((16, 3)).astype(np.float32)
    weight = random.standard_normal(w.shape)
    clips = {"upper": np.full((1, 3), 0.4, np.float32), "lower": np.full((1, 3), 0.9, np.float32)}
    lo0, hi0 = w.min(axis=0), w.max(axis=0)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def scale_of(upper, lower):
        return (sigmoid(upper) * hi0 - sigmoid(lower) * lo0) / 3

    scale = scale_of(0.4, 0.9).astype(np.float16).astype(np.float64)
    zero = np.round(-sigmoid(0.9) * lo0 / scale)
    wanted = np.round(w / scale) + zero
    codes, left_over = np.clip(wanted, 0, 3), np.round(w / scale) - w / scale

    def surrogate(upper, lower):
        s = scale + scale_of(upper, lower) - scale_of(0.4, 0.9)
        moving = np.where(wanted == codes, w / s + left_over + zero, codes)
        return np.sum(weight * (moving - zero) * s, axis=0)

    def lower(clips):
        return jnp.sum(weight * read_clipped(jnp.asarray(w), clips, GRID))

    found = jax.grad(lower)(clips)
    for name, ends in (("upper", ((0.4 + 1e-5, 0.9), (0.4 - 1e-5, 0.9))),
                       ("lower", ((0.4, 0.9 + 1e-5), (0.4, 0.9 - 1e-5)))):  # fmt: skip
        slope = (surrogate(*ends[0]) - surrogate(*ends[1])) / 2e-5
        np.testing.assert_allclose(found[name][0], slope, rtol=2e-3, atol=1e-4)
        assert np.abs(slope).min() > 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_product_by_tiles_has_the_gradients_of_the_whole(symmetric):
    grid = GroupGrid(2, 16, symmetric)
    clips = draw_clips(grid)
    x = jnp.asarray(RANDOM.standard_normal((5, 64)), jnp.float32)

    def by_tiles(x, clips, w):
        return jnp.sum(jnp.sin(packed_matmul(x, clipped_base(clips, grid, Dense(w)))))

    def whole(x, clips, w):
        return jnp.sum(jnp.sin(x @ read_clipped(w, clips, grid)))

    (dx, d_clips, dw), (dx2, d_clips2, _) = (
        jax.jit(jax.grad(f, (0, 1, 2)))(x, clips, W) for f in (by_tiles, whole)
    )
    np.testing.assert_allclose(dx, dx2, rtol=1e-4, atol=1e-5)
    for name, gradient in d_clips2.items():
        assert np.abs(gradient).max() > 0.01
        np.testing.assert_allclose(d_clips[name], gradient, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(dw, 0.0)


def test_zeros_of_what_is_rounded_stay():
    keep = jnp.asarray(RANDOM.random(W.shape) < 0.5)
    base = clipped_base(draw_clips(GRID), GRID, Masked.from_mask(Dense(W), keep))
    read = np.asarray(base.dense())
    np.testing.assert_array_equal(read[~keep], 0.0)
    assert (base.d_in, base.d_out) == W.shape
    assert np.unique(read[keep]).size > 20
