"""The values that everything else is made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.sites import in_groups
from lqec_jax.core.types import LinearProblem, LinearStats, ModelFns, Step, weight_error
from lqec_kernels.formats import CompressedLinear, Dense, LowRank


def problem_of(w) -> LinearProblem:
    return LinearProblem(jnp.asarray(w, jnp.float32), LinearStats(), jax.random.key(0))


def leaf_of(w, *corrections) -> CompressedLinear:
    return CompressedLinear(Dense(jnp.asarray(w, jnp.float32)), corrections)


def step(name: str = "rtn", **arguments) -> Step:
    return Step(name, "linear", run=lambda problem, leaf: leaf, arguments=arguments)


def test_weight_error_is_relative_and_sees_the_whole_operator():
    w = np.random.RandomState(0).standard_normal((6, 4))
    assert weight_error(problem_of(w), leaf_of(w)) == 0
    assert weight_error(problem_of(w), leaf_of(0 * w)) == 1
    assert weight_error(problem_of(w), leaf_of(0.9 * w)) == pytest.approx(0.01, rel=1e-4)
    assert weight_error(problem_of(100 * w), leaf_of(90 * w)) == pytest.approx(0.01, rel=1e-4)
    a, b = jnp.ones((6, 1)), jnp.ones((1, 4))
    mended = weight_error(problem_of(w + 1), leaf_of(w, LowRank(a, b)))
    assert mended == pytest.approx(0, abs=1e-12)


def test_weight_error_of_a_zero_weight_is_zero_when_kept():
    zero = np.zeros((3, 2))
    assert weight_error(problem_of(zero), leaf_of(zero)) == 0


def test_a_problem_is_a_tree_whose_missing_statistics_are_no_leaves():
    problem = LinearProblem(jnp.ones((3, 2)), LinearStats(rms=jnp.ones(3)), jax.random.key(0))
    assert len(jax.tree.leaves(problem)) == 3
    assert len(jax.tree.leaves(problem_of(jnp.ones((3, 2))))) == 2
    doubled = jax.jit(lambda p: LinearProblem(2 * p.w, p.stats, p.key))(problem)
    np.testing.assert_array_equal(doubled.w, 2.0)


def test_a_step_prints_as_the_recipe_that_makes_it():
    assert str(step(bits=2, group_size=None, mode="a'b")) == (
        'rtn(bits=2, group_size=None, mode="a\'b")'
    )
    assert str(step("loftq", quantizer=step(bits=2), iters=5)) == (
        "loftq(quantizer=rtn(bits=2), iters=5)"
    )
    assert str(step()) == "rtn()"


def test_linears_are_the_groups_in_order():
    groups = (("attn/q", "attn/k"), ("mlp/down",))
    sites = in_groups(groups, row_parallel=["mlp/down"])
    fns = ModelFns(embed=None, block=None, hidden=None, head=None, sites=sites)
    assert fns.linears == ("attn/q", "attn/k", "mlp/down")
    assert fns.linear_groups == groups and fns.row_parallel == {"mlp/down"}
    # Programs are kept by it.
    other = dataclasses.replace(fns, sites=in_groups(groups, row_parallel=["mlp/down"]))
    assert other == fns and hash(other) == hash(fns)
