"""Magnitude: what goes is no larger than what stays."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import rtn
from lqec_jax.sparsifiers.magnitude import magnitude
from lqec_kernels.formats import Affine, CompressedLinear, Dense, LowRank
from lqec_kernels.sparse import Masked, Sparse24

D_IN, D_OUT = 64, 10
W = np.random.RandomState(0).standard_normal((D_IN, D_OUT)).astype(np.float32)


@lru_cache
def jitted(name, **arguments):
    return jax.jit({"magnitude": magnitude, "rtn": rtn}[name](**arguments).run)


def run(step, leaf=None, w=W) -> CompressedLinear:
    problem = LinearProblem(jnp.asarray(w), LinearStats(), jax.random.key(0))
    run = jitted(step.name, **step.arguments)
    return run(problem, leaf or CompressedLinear(Dense(problem.w)))


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_of_the_whole_matrix_the_smallest_go(fraction):
    base = run(magnitude(sparsity=fraction)).base
    assert isinstance(base, Masked)
    kept, dense = np.asarray(base.kept()), np.asarray(base.dense())
    assert (~kept).sum() == int(fraction * W.size)
    assert np.abs(W[~kept]).max() < np.abs(W[kept]).min()
    np.testing.assert_array_equal(dense, np.where(kept, W, 0))


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_of_every_few_inputs_the_largest_stay(pattern, n, m):
    base = run(magnitude(sparsity=pattern)).base
    assert isinstance(base, Masked) and base.pattern == pattern
    runs = np.abs(W).reshape(-1, m, D_OUT)
    kept = np.asarray(base.kept()).reshape(runs.shape)
    assert (kept.sum(1) == n).all()
    assert (np.where(kept, np.inf, runs).max(1) == np.inf).all()
    assert (np.where(kept, 0, runs).max(1) < np.where(kept, runs, np.inf).min(1)).all()


def test_rounded_weights_keep_their_codes_and_lose_their_zeros_room():
    rounded = run(rtn(bits=4, group_size=8))
    came = run(magnitude(sparsity="2:4"), rounded)
    assert isinstance(came.base, Sparse24) and isinstance(came.base.inner, Affine)
    kept, before = np.asarray(came.base.kept()), np.asarray(rounded.dense())
    np.testing.assert_array_equal(came.dense(), np.where(kept, before, 0))
    assert (kept.reshape(-1, 4, D_OUT).sum(1) == 2).all()
    assert came.stored_bits() < rounded.stored_bits()
    # A group of two is no group of whole fours.
    odd = run(magnitude(sparsity="2:4"), run(rtn(bits=4, group_size=2)))
    assert isinstance(odd.base, Masked) and isinstance(odd.base.inner, Affine)


def test_rounding_keeps_the_zeros():
    pruned = run(magnitude(sparsity="2:4"))
    came = run(rtn(bits=3, group_size=16), pruned)
    assert isinstance(came.base, Sparse24)
    np.testing.assert_array_equal(came.base.kept(), pruned.base.kept())
    np.testing.assert_array_equal(np.asarray(came.dense())[~np.asarray(pruned.base.kept())], 0)
    loose = run(magnitude(sparsity=0.5))
    again = run(rtn(bits=3, group_size=16), loose)
    assert isinstance(again.base, Masked)
    np.testing.assert_array_equal(again.base.kept(), loose.base.kept())


def test_pruning_twice_prunes_what_either_prunes():
    once = run(magnitude(sparsity="2:4"))
    twice = run(magnitude(sparsity=0.8), once)
    allowed = np.asarray(once.base.kept())
    dense = np.asarray(twice.dense())
    np.testing.assert_array_equal(dense[~allowed], 0)
    assert (dense == 0).sum() == int(0.8 * W.size)
    rounded = run(rtn(bits=8, group_size=16), twice)
    assert (np.asarray(rounded.dense())[dense == 0] == 0).all()


def test_the_rest_of_the_weight_is_kept():
    correction = LowRank(jnp.ones((D_IN, 1)), jnp.ones((1, D_OUT)))
    came = run(magnitude(), CompressedLinear(Dense(jnp.asarray(W)), (correction,)))
    np.testing.assert_array_equal(came.corrections[0].a, correction.a)
    np.testing.assert_array_equal(came.dense(), np.asarray(came.base.dense()) + 1)


def test_no_order_among_equals_is_left_open():
    base = run(magnitude(sparsity="2:4"), w=np.ones_like(W)).base
    np.testing.assert_array_equal(base.kept(), (np.arange(D_IN) % 4 >= 2)[:, None] & (W == W))


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="magnitude: sparsity='half'"):
        magnitude(sparsity="half")
    with pytest.raises(InputError, match="magnitude: d_in=64 is not divisible by 5"):
        run(magnitude(sparsity="2:5"))
