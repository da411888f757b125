"""E2E-QP: scales learn the text, and nothing else of the model moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.train.rates import make_optimizer
from lqec_jax.trainings.e2e_qp import e2e_qp
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from tests.train.tiny import make_plain_problem, training_of

TRAIN = 6


@pytest.fixture(scope="module")
def problem():
    plain = make_plain_problem(windows=8, d=32)
    params = jax.tree.map(jnp.asarray, plain.params)
    return plain.pose(val=8 - TRAIN, params=params, teacher=None)


@pytest.fixture(scope="module")
def solution(problem):
    return e2e_qp(updates=20, batch=2, eval_every=5, lr=0.05).run(problem)


def test_scales_learn_the_text(solution):
    losses = {point.update: point.val_loss for point in solution.history}
    assert list(losses) == [0, 5, 10, 15, 20]
    assert losses[solution.best_update] == min(losses.values()) < losses[0] - 0.02


def test_nothing_but_scales_moves(problem, solution):
    before, after = (jax.tree_util.tree_leaves_with_path(p)
                     for p in (problem.params, solution.params))  # fmt: skip
    moved = 0
    for (path, was), (_, now) in zip(before, after, strict=True):
        assert was.dtype == now.dtype
        if training_of(e2e_qp()).moves(path, was):
            moved += 1
            assert float(jnp.mean(was != now)) > 0.9
            ratio = np.asarray(now, np.float32) / np.asarray(was, np.float32)
            assert 0.2 < ratio.min() < 1 < ratio.max() < 3
        else:
            np.testing.assert_array_equal(was, now)
    assert moved == 2  # one stack of scales a segment


def test_the_rate_is_a_fraction_of_the_scale():
    optimizer = make_optimizer(training_of(e2e_qp(lr=0.01)).parts, 64, 10)
    scales = {"s": jnp.array([1e-3, 1.0, 100.0])}
    state = optimizer.init(scales)
    step, _ = optimizer.update({"s": jnp.array([5.0, -1e-3, 1.0])}, state, scales)
    np.testing.assert_allclose(step["s"], [-1e-5, 0.01, -1.0], rtol=1e-3)


def test_training_that_does_not_help_changes_no_bit(problem):
    wild = e2e_qp(updates=2, batch=2, eval_every=1, lr=100.0).run(problem)
    assert wild.best_update == 0
    for (path, was), (_, now) in zip(
        *(jax.tree_util.tree_leaves_with_path(p) for p in (problem.params, wild.params)),
        strict=True,
    ):
        assert now is was, path


def test_a_base_without_scales_is_refused():
    with pytest.raises(InputError, match="e2e_qp: a Dense base has no scales"):
        e2e_qp().preview(CompressedLinear(Dense(jnp.ones((4, 4)))))
    base = Affine.from_codes(jnp.zeros((32, 4), jnp.uint8), jnp.ones((1, 4)), None, bits=2,
                             group_size=32)  # fmt: skip
    seen = e2e_qp().preview(CompressedLinear(base)).base
    assert jax.tree.structure(seen) == jax.tree.structure(base)
    assert all(map(lambda a, b: a is b, *map(jax.tree.leaves, (seen, base))))
    assert e2e_qp().count(CompressedLinear(base)) == 4


@pytest.mark.parametrize("arguments", ["updates=0", "lr=-1.0", "batch=4, accumulate=3"])
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match="e2e_qp: "):
        parse_recipe(f"e2e_qp({arguments})")
