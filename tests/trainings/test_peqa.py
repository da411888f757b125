"""PEQA: scales alone learn a task, by the gradient that its paper gives them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import sites
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import Windows
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.recipe import parse_recipe
from lqec_jax.train.answers import LinearAnswer
from lqec_jax.train.losses import ModelLoss, NextToken
from lqec_jax.train.parts import Scales
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training
from lqec_jax.trainings.peqa import peqa
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from tests.train.tiny import make_block_problem, make_plain_problem

TRAIN = 6
SHORT = {"updates": 20, "batch": 2, "eval_every": 5, "patience": 0, "lr": 0.05}


@pytest.fixture(scope="module")
def problem():
    """A text whose second half is the task: the first tokens of a window count nothing."""
    plain = make_plain_problem(windows=8, d=64)
    params = jax.tree.map(jnp.asarray, plain.params)
    weights = np.zeros((8, plain.tokens.shape[1] - 1), np.float32)
    weights[:, 7:] = 1 / 8
    windows = Windows(plain.tokens, TRAIN, weights)
    return plain.pose(val=8 - TRAIN, params=params, windows=windows, teacher=None)


def moved_of(problem, solution) -> set[str]:
    """Returns the last names of what is not as it was, to the bit."""
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(p)
                  for p in (problem.params, solution.params)), strict=True)  # fmt: skip
    return {
        jax.tree_util.keystr(path).rpartition(".")[2]
        for (path, was), (_, now) in pairs
        if was.dtype != now.dtype or np.asarray(was).tobytes() != np.asarray(now).tobytes()
    }


def test_scales_alone_move_and_learn_the_task(problem):
    solution = peqa(**SHORT).run(problem)
    losses = {point.update: point.val_loss for point in solution.history}
    assert losses[solution.best_update] == min(losses.values()) < losses[0] - 0.02
    assert moved_of(problem, solution) == {"scales"}


def test_with_zeros_these_move_too_and_go_further(problem):
    alone, both = (peqa(**SHORT, zeros=zeros).run(problem) for zeros in (False, True))
    assert moved_of(problem, both) == {"scales", "zeros"}
    assert min(p.val_loss for p in both.history) < min(p.val_loss for p in alone.history)
    for _, leaf in sites.each(both.params, problem.fns.sites):
        assert leaf.base.zeros.dtype == jnp.float16


def test_a_scale_s_gradient_is_that_of_the_weight_along_itself(problem):
    """∂L/∂s = 1/s Σ (∂L/∂ŵ ⊙ ŵ) over a group, ∂L/∂ŵ taken of dense weights."""
    loss, batch = ModelLoss((NextToken(),)), {"tokens": problem.windows.tokens[:4]}
    leaves = dict(enumerate(leaf for _, leaf in sites.each(problem.params, problem.fns.sites)))

    def put(change):
        return sites.map_model(problem.params, problem.fns.sites, change)

    def of_scales(scales):
        params = put(lambda leaf, n: replace(leaf, base=replace(leaf.base, scales=scales[n])))
        return loss(problem.fns, params, batch)[0]

    def of_weights(weights):
        params = put(lambda leaf, n: replace(leaf, base=Dense(weights[n])))
        return loss(problem.fns, params, batch)[0]

    scales = {n: leaf.base.scales.astype(jnp.float32) for n, leaf in leaves.items()}
    weights = {n: leaf.base.dense() for n, leaf in leaves.items()}
    came = jax.jit(jax.grad(of_scales))(scales)
    along = jax.jit(jax.grad(of_weights))(weights)
    for n, leaf in leaves.items():
        shape = (1, -1, leaf.base.group_size, leaf.d_out)
        products = np.asarray(along[n], np.float64) * np.asarray(weights[n], np.float64)
        wanted = products.reshape(shape).sum(axis=2) / np.asarray(scales[n], np.float64)
        np.testing.assert_allclose(came[n], wanted, atol=1e-5 * np.abs(wanted).max())
        assert np.abs(wanted).max() > 1e-4


def test_scales_come_to_the_least_squares_of_their_codes_and_not_below():
    """Of a linear answer alone, s* = <x w, x q> / <x q, x q>, one scale an output."""
    problem = make_block_problem(windows=8)
    w = np.asarray(problem.dense["mix"]["kernel"], np.float64)
    base = quantize(problem.dense["mix"]["kernel"], GroupGrid(3, 32))
    first = 0.6 * base.scales.astype(jnp.float32)
    base = replace(base, scales=first)
    given = replace(problem, block={"mix": {"kernel": CompressedLinear(base)}})
    step = make_training(
        "peqa", [Scales(rates=Rates(0.05))], LinearAnswer(), scope="block",
        schedule=replace(peqa().schedule, updates=300, batch=6, eval_every=50, patience=0),
    )  # fmt: skip
    solution = step.run(given)
    kept = solution.params["mix"]["kernel"].base
    for name in ("codes", "zeros"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(base, name))
    x = problem.student[: problem.train].reshape(-1, 32).astype(np.float64)
    q = x @ (np.asarray(base.dense(), np.float64) / np.asarray(first, np.float64))
    wanted = x @ w
    best = np.sum(q * wanted, axis=0) / np.sum(q * q, axis=0)
    assert best.min() > 0 and np.abs(best / first - 1).min() > 0.05
    left = np.sum((wanted - q * np.asarray(kept.scales, np.float64)) ** 2)
    least = np.sum((wanted - q * best) ** 2)
    before = np.sum((wanted - q * np.asarray(first)) ** 2)
    assert least * (1 - 1e-6) <= left < least + 0.01 * (before - least)


def test_untrained_it_is_the_model_it_was_given(problem):
    still = peqa(**SHORT | {"lr": 0.0}).run(problem)
    assert still.best_update == 0 and moved_of(problem, still) == set()


def test_it_counts_one_number_a_group_or_two():
    leaf = CompressedLinear(
        Affine.from_codes(jnp.zeros((64, 8), jnp.uint8), jnp.ones((2, 8)), None, bits=2,
                          group_size=32)
    )  # fmt: skip
    assert peqa().count(leaf) == 16 and peqa(zeros=True).count(leaf) == 32
    with pytest.raises(InputError, match="peqa: a Dense base has no scales to train"):
        peqa().preview(CompressedLinear(Dense(jnp.ones((4, 4)))))


@pytest.mark.parametrize(
    "arguments", ["updates=0", "lr=-1.0", "zeros=1", "decay='no'", "batch=4, accumulate=3"]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match="peqa: "):
        parse_recipe(f"peqa({arguments})")
