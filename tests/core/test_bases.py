"""What a base has to be and what it reads, behind a transform."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.bases import (
    base_target,
    find_grid,
    inner_gram,
    inner_rms,
    kept,
    mask_base,
    replace_base,
    scale_inputs,
)
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.sparse import Masked, Sparse24

RNG = np.random.default_rng(0)
X, W = RNG.standard_normal((50, 6)).astype(np.float32), RNG.standard_normal((6, 4))
SCALE = jnp.asarray([1.0, -2.0, 0.5, 3.0, 1.0, 4.0])


class Mixing:
    """x ↦ x M for any M."""

    m = jnp.asarray(RNG.standard_normal((6, 6)), jnp.float32)

    def apply(self, x):
        return x @ self.m


def make_problem(x):
    stats = LinearStats(rms=jnp.sqrt(jnp.mean(x**2, axis=0)), gram=x.T @ x / len(x))
    return LinearProblem(jnp.asarray(W, jnp.float32), stats, jax.random.key(0))


def make_leaf(transform=None):
    return CompressedLinear(Dense(jnp.asarray(W, jnp.float32)), (), transform)


@pytest.mark.parametrize("transform", [None, ChannelScale(SCALE), Mixing()])
def test_the_gram_is_of_what_the_base_reads(transform):
    read = X if transform is None else transform.apply(jnp.asarray(X))
    gram = inner_gram(make_problem(X), make_leaf(transform))
    np.testing.assert_allclose(gram, read.T @ read / len(X), rtol=1e-5, atol=1e-5)


def test_the_rms_is_of_what_the_base_reads():
    read = ChannelScale(SCALE).apply(jnp.asarray(X))
    rms = inner_rms("m", make_problem(X), make_leaf(ChannelScale(SCALE)))
    np.testing.assert_allclose(rms, jnp.sqrt(jnp.mean(read**2, axis=0)), rtol=1e-6)
    np.testing.assert_array_equal(
        inner_rms("m", make_problem(X), make_leaf()), make_problem(X).stats.rms
    )
    with pytest.raises(InputError, match="m: the inputs are mixed by a Mixing transform"):
        inner_rms("m", make_problem(X), make_leaf(Mixing()))


def test_inputs_are_scaled_beside_the_scale_that_is_there():
    first = scale_inputs("m", make_leaf(), SCALE)
    np.testing.assert_array_equal(first.input_transform.scale, SCALE)
    np.testing.assert_allclose(first.dense(), SCALE[:, None] * W, rtol=1e-6)
    second = scale_inputs("m", first, jnp.full(6, 0.5, jnp.float16))
    assert second.input_transform.scale.dtype == jnp.float32
    np.testing.assert_allclose(second.dense(), SCALE[:, None] * W / 2, rtol=1e-6)
    with pytest.raises(InputError, match="m: scales the inputs of a weight, and a Mixing"):
        scale_inputs("m", make_leaf(Mixing()), SCALE)


def test_a_base_is_replaced_alone():
    correction = LowRank(jnp.ones((6, 1)), jnp.ones((1, 4)))
    leaf = CompressedLinear(Dense(jnp.asarray(W)), (correction,), ChannelScale(SCALE))
    new = replace_base(leaf, Dense(jnp.zeros((6, 4))))
    assert new.corrections == leaf.corrections and new.input_transform is leaf.input_transform
    np.testing.assert_array_equal(base_target(leaf), W.astype(np.float32))
    np.testing.assert_array_equal(base_target(new), 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": Dense(jnp.ones((8, 3)))}, "a Dense base has no zero points"),
        ({"input_transform": ChannelScale(jnp.ones(8))}, "between the inputs and the base"),
        ({"output_transform": ChannelScale(jnp.ones(3))}, "between the outputs and the base"),
    ],
)
def test_a_grid_whose_zeros_can_take_in_a_correction(changes, said):
    leaf = CompressedLinear(make_affine(4), (LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), 4),))
    assert find_grid("m", leaf) is leaf.base
    with pytest.raises(InputError, match=f"^m: .*{said}"):
        find_grid("m", dataclasses.replace(leaf, **changes))
    for pattern, form in (("", "Masked"), ("2:4", "Sparse24")):
        with pytest.raises(InputError, match=f"^m: .*in a {form} base would fill"):
            find_grid("m", mask_base(leaf, PATTERN, pattern))


# Zeros

PATTERN = jnp.asarray(np.arange(8) % 4 < 2)[:, None] & jnp.ones((8, 3), bool)
LOOSE = jnp.asarray(RNG.random((8, 3)) < 0.5)


def make_affine(group_size: int) -> Affine:
    codes = jnp.asarray(RNG.integers(0, 16, (8, 3)), jnp.uint8)
    scales = jnp.ones((8 // group_size, 3), jnp.float16)
    return Affine.from_codes(codes, scales, None, bits=4, group_size=group_size)


def make_dense() -> CompressedLinear:
    return CompressedLinear(Dense(jnp.asarray(RNG.standard_normal((8, 3)), jnp.float32)))


def test_a_base_without_zeros_keeps_everything():
    assert kept(make_dense()) is None
    assert kept(CompressedLinear(make_affine(4))) is None


@pytest.mark.parametrize(
    ("group_size", "pattern", "keep", "form"),
    [(4, "2:4", PATTERN, Sparse24), (2, "2:4", PATTERN, Masked), (4, "", LOOSE, Masked)],
)
def test_zeros_outlive_the_base_they_were_in(group_size, pattern, keep, form):
    masked = mask_base(make_dense(), keep, pattern)
    assert isinstance(masked.base, Masked) and masked.base.pattern == pattern
    np.testing.assert_array_equal(masked.base.inner.w == 0, ~keep)
    base = make_affine(group_size)
    for before in (masked, replace_base(masked, make_affine(group_size))):
        new = replace_base(before, base)
        assert isinstance(new.base, form)
        np.testing.assert_array_equal(kept(new), keep)
        np.testing.assert_array_equal(new.dense(), np.where(keep, base.dense(), 0))


def test_zeros_add_up():
    for first in (mask_base(make_dense(), PATTERN, "2:4"),
                  mask_base(CompressedLinear(make_affine(4)), PATTERN, "2:4")):  # fmt: skip
        both = mask_base(first, LOOSE)
        np.testing.assert_array_equal(kept(both), PATTERN & LOOSE)
        np.testing.assert_array_equal(both.dense(), np.where(LOOSE, first.dense(), 0))
        base = make_affine(4)
        again = replace_base(both, base)
        # Less than two of four are left somewhere, for which only a mask has room.
        assert isinstance(again.base, Masked) and again.base.pattern == ""
        np.testing.assert_array_equal(again.dense(), np.where(PATTERN & LOOSE, base.dense(), 0))
