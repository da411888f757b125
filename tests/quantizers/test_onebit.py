"""One-bit weights: signs, and magnitudes that are the best of rank one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers.onebit import onebit
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense
from lqec_kernels.transforms import Hadamard

D_IN, D_OUT = 64, 24
RNG = np.random.RandomState(0)
W = (np.exp(RNG.standard_normal((D_IN, 1))) * RNG.standard_normal((D_IN, D_OUT))).astype(np.float32)


@partial(jax.jit, static_argnames=("group_size",))
def run(w, start, group_size=None):
    problem = LinearProblem(w, LinearStats(), jax.random.key(0))
    leaf = onebit(group_size=group_size).run(problem, start)
    return leaf, leaf.dense()


def solve(w=W, transform=None, group_size=None):
    return run(w, CompressedLinear(Dense(jnp.asarray(w)), (), transform), group_size)


def square(error) -> float:
    return np.sum(np.square(np.asarray(error, np.float64)))


def test_the_error_is_that_of_the_magnitudes():
    leaf, dense = solve()
    a, b = np.asarray(leaf.base.alphas[0, 0]), np.asarray(leaf.input_transform.scale)
    assert (a >= 0).all() and (b >= 0).all() and b.max() == 1
    magnitudes = np.outer(b.astype(np.float32), a.astype(np.float32))
    np.testing.assert_allclose(dense, np.where(W >= 0, magnitudes, -magnitudes), rtol=1e-5)
    assert square(dense - W) == pytest.approx(square(magnitudes - np.abs(W)), rel=1e-5)


def test_no_rank_one_magnitudes_are_nearer():
    dense = solve()[1]
    values = np.linalg.svd(np.abs(W.astype(np.float64)), compute_uv=False)
    assert square(dense - W) == pytest.approx(np.sum(values[1:] ** 2), rel=1e-4)
    # The paper's proposition: signs make the rank-one part larger, so the error smaller.
    assert square(dense - W) <= np.sum(np.linalg.svd(W, compute_uv=False)[1:] ** 2)


def test_groups_are_never_farther():
    errors = [square(solve(group_size=size)[1] - W) for size in (None, 32, 16)]
    assert errors[0] > errors[1] > errors[2]
    leaf = solve(group_size=16)[0]
    assert leaf.base.alphas.shape == (1, 4, D_OUT)
    assert leaf.bits_per_weight == 1 + 16 / 16 + 16 / D_OUT


def test_a_scale_that_is_there_takes_the_factors_in():
    scale = jnp.asarray(np.exp(RNG.standard_normal(D_IN)), jnp.float32)
    leaf, dense = solve(transform=ChannelScale(scale))
    plain, unscaled = solve()
    np.testing.assert_allclose(dense, scale[:, None] * unscaled, rtol=1e-5)
    assert leaf.input_transform.scale.dtype == jnp.float32
    np.testing.assert_array_equal(leaf.base.planes, plain.base.planes)


def test_a_rotation_leaves_no_place_for_the_factors():
    rotation = Hadamard(jnp.zeros(2, jnp.uint32), D_IN, D_IN)
    with pytest.raises(InputError, match="onebit: scales the inputs of a weight, and a Hadamard"):
        solve(transform=rotation)


def test_zeros_and_dead_channels_are_kept():
    w = W.copy()
    w[5], w[:, 7] = 0, 0
    dense = solve(w)[1]
    assert (np.asarray(dense)[5] == 0).all() and (np.asarray(dense)[:, 7] == 0).all()
    assert np.isfinite(dense).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"group_size": 0}, "group_size=0; an integer >= 1"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^onebit: ") as caught:
        onebit(**arguments)
    assert said in str(caught.value)
