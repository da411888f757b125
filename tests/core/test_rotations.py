"""Rotations around a weight: the same weight, where they fit and where they are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.bases import inner_gram
from lqec_jax.core.rotations import check_block, largest_block, rotate_inputs, rotate_outputs
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense

D_IN, D_OUT = 96, 24
RNG = np.random.default_rng(0)
W = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)
X = RNG.standard_normal((200, D_IN)).astype(np.float32)


@jax.jit
def rotate(w, key):
    leaf = rotate_inputs("m", CompressedLinear(Dense(w)), key, D_IN)
    leaf = rotate_outputs("m", leaf, jax.random.fold_in(key, 1), 8)
    return leaf, leaf.dense()


def test_the_weight_stays_and_its_base_is_turned():
    leaf, dense = rotate(W, jax.random.key(0))
    np.testing.assert_allclose(dense, W, atol=1e-5)
    m_in = np.asarray(leaf.input_transform.apply(np.eye(D_IN, dtype=np.float32)))
    m_out = np.asarray(leaf.output_transform.apply(np.eye(D_OUT, dtype=np.float32)))
    np.testing.assert_allclose(leaf.base.w, m_in.T @ W @ m_out.T, atol=1e-5)
    assert np.abs(leaf.base.w - W).max() > 1


@pytest.mark.parametrize("side", ["input", "output"])
def test_signs_meet_the_weight_before_it_is_mixed(side):
    # A weight that is one row of a Hadamard matrix, or constant, would become a single spike.
    w = np.ones((D_IN, D_OUT), np.float32)
    leaf, _ = rotate(w, jax.random.key(1))
    energy = np.square(np.asarray(leaf.base.w)).sum(axis=1 if side == "input" else 0)
    assert energy.max() < 0.5 * energy.sum()


def test_the_output_error_of_any_change_is_the_same_on_both_sides():
    leaf, _ = rotate(W, jax.random.key(2))
    stats = LinearStats(gram=jnp.asarray(X.T @ X / len(X)))
    problem = LinearProblem(jnp.asarray(W), stats, jax.random.key(0))
    inner = np.asarray(inner_gram(problem, leaf), np.float64)
    change = RNG.standard_normal(W.shape).astype(np.float32)  # of the base
    moved = CompressedLinear(Dense(leaf.base.w + change), (), leaf.input_transform,
                             leaf.output_transform)  # fmt: skip
    outer = np.asarray(moved.dense(), np.float64) - W
    wanted = np.trace(outer.T @ np.asarray(stats.gram, np.float64) @ outer)
    assert np.trace(change.T @ inner @ change) == pytest.approx(wanted, rel=1e-4)


def test_a_rotation_that_is_there_stays():
    leaf, _ = rotate(W, jax.random.key(3))
    again = rotate_outputs(
        "m", rotate_inputs("m", leaf, jax.random.key(4), 8), jax.random.key(5), 8
    )
    assert again is leaf


def test_what_cannot_be_rotated_is_refused():
    scaled = CompressedLinear(Dense(jnp.asarray(W)), (), ChannelScale(jnp.ones(D_IN)))
    with pytest.raises(InputError, match="m: rotates the inputs, which have a ChannelScale"):
        rotate_inputs("m", scaled, jax.random.key(0), 8)
    packed = Affine(jnp.zeros((12, D_OUT), jnp.uint32), jnp.ones((1, D_OUT)), None, 4, D_IN, D_IN)
    with pytest.raises(InputError, match="m: rotates a dense weight, and this one is Affine"):
        rotate_outputs("m", CompressedLinear(packed), jax.random.key(0), 8)


def test_blocks_are_the_largest_that_fit_or_what_was_asked_for():
    assert largest_block("m", "d_in", 11008) == 11008
    assert largest_block("m", "d_in", 11008, 512) == 344
    assert largest_block("m", "d_in", 92) == 4
    with pytest.raises(InputError, match="m: d_in=50 has no Hadamard block of 4 channels or more"):
        largest_block("m", "d_in", 50)
    assert check_block("m", "d_in", 96, 32) == 32
    with pytest.raises(InputError, match="m: block=64 does not divide d_in=96; .* 48"):
        check_block("m", "d_in", 96, 64)
    with pytest.raises(InputError, match="m: block=92 is the order of no matrix here; .* 8"):
        check_block("m", "d_in", 184, 92)
