"""Weights trained on moments: the loss is that of the tokens, the order that of the data."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.linear import linear
from lqec_jax.core.sites import in_groups
from lqec_jax.core.types import BlockProblem, ModelFns, Schedule, Work
from lqec_jax.errors import InputError
from lqec_jax.train.moments import Moments, collect_moments, find_cross, find_loss
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training
from lqec_kernels.formats import CompressedLinear, Dense
from tests.train.test_answers import Told
from tests.train.tiny import Shrink, Shrunk

D, WIDE, LENGTH = 16, 24, 8
GROUPS = (("up", "gate"), ("down",))


@cache
def gated_fns() -> ModelFns:
    """Returns h + (tanh(h up) · h gate) down as a block."""

    def block(params, h):
        inner = jnp.tanh(linear(h, params["up"]["kernel"])) * linear(h, params["gate"]["kernel"])
        return h + linear(inner, params["down"]["kernel"]), {"up": h, "gate": h, "down": inner}

    return ModelFns(embed=None, block=block, hidden=None, head=None, sites=in_groups(GROUPS))


def make_problem(**changes) -> BlockProblem:
    """Returns a block and streams that lie apart; validation windows are those of training."""
    random = np.random.default_rng(0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    shapes = {"up": (D, WIDE), "gate": (D, WIDE), "down": (WIDE, D)}
    dense = {path: {"kernel": jnp.asarray(draw(*shape) / 4)} for path, shape in shapes.items()}
    teacher = np.concatenate([draw(20, LENGTH, D)] * 2)
    student = teacher + np.concatenate([0.5 * draw(20, LENGTH, D)] * 2)
    block = {p: {"kernel": CompressedLinear(Dense(w["kernel"]))} for p, w in dense.items()}
    facts = {"fns": gated_fns(), "block": block, "dense": dense, "teacher": teacher,
             "student": student, "train": 20, "work": Work(jax.random.key(0))}  # fmt: skip
    return BlockProblem(**(facts | changes))


def train(problem: BlockProblem, part: Shrink, updates: int = 91, **options):
    """Trains one number a weight, which has its best in closed form."""
    step = make_training("shrink", [part], Moments(), scope="block",
                         schedule=Schedule(updates=updates), **options)  # fmt: skip
    return step.run(problem)


DESCENDING = Shrink(rates=Rates(0.05))


def inputs_of(problem, block, path):
    """Returns what a weight reads in both streams, [tokens, d_in]."""
    ends = ((problem.dense, problem.teacher), (block, problem.student))
    reads = (jax.jit(problem.fns.block)(params, h)[1][path] for params, h in ends)
    return [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in reads]


@pytest.fixture(scope="module")
def solution():
    return train(make_problem(), DESCENDING)


@pytest.mark.parametrize("aug", [False, True])
def test_moments_tell_the_loss_of_the_tokens(aug):
    problem = make_problem(train=30)
    block = problem.block
    w = np.asarray(problem.dense["down"]["kernel"], np.float64)
    dense = w + 0.1 * np.random.default_rng(1).standard_normal(w.shape)
    x, own = inputs_of(problem, block, "down")
    tokens = 30 * LENGTH
    found = collect_moments(problem, block, ("down",))["down"]
    for moments, rows in zip(found, (slice(tokens), slice(tokens, None)), strict=True):
        lacks = x[rows] @ w - own[rows] @ dense
        other = own[rows] @ (w - dense)
        loss = np.mean(np.sum(lacks**2 + aug * other**2, axis=1))
        energy = np.mean(np.sum((x[rows] @ w) ** 2, axis=1))
        came = find_loss(*(jnp.asarray(a, jnp.float32) for a in (w, dense)), moments, aug=aug)
        assert came == pytest.approx(loss / energy, rel=1e-4)
        e = (lacks + other) / 2 if aug else lacks
        cross = find_cross(jnp.float32(w), jnp.float32(dense), moments, aug=aug)
        wanted = own[rows].T @ e / len(e)
        np.testing.assert_allclose(cross, wanted, atol=1e-4 * np.abs(wanted).max())


def test_every_weight_reads_what_was_stored_before_it(solution):
    """Each number is the least squares' one behind the weights that were solved, not the first."""
    problem, block = make_problem(), solution.params
    for path in problem.fns.linears:
        w = np.asarray(problem.dense[path]["kernel"], np.float64)
        x, own = inputs_of(problem, block, path)
        best = np.sum((x @ w) * (own @ w)) / np.sum((own @ w) ** 2)
        np.testing.assert_allclose(block[path]["kernel"].base.w, best * w, rtol=5e-3, atol=1e-6)
        assert abs(best - 1) > 0.02
    x, first = inputs_of(problem, problem.block, "down")
    w = np.asarray(problem.dense["down"]["kernel"], np.float64)
    other = np.sum((x @ w) * (first @ w)) / np.sum((first @ w) ** 2)
    assert np.abs(block["down"]["kernel"].base.w / w - other).min() > 0.02


def test_the_history_is_the_mean_of_the_weights(solution):
    assert [point.update for point in solution.history] == [*range(0, 101, 10), 101]
    assert solution.history[0].train_loss is None
    assert solution.history[-1].val_loss < 0.7 * solution.history[0].val_loss
    assert 50 < solution.best_update <= 100
    assert solution.notes == ()
    problem, losses = make_problem(), []
    for group in GROUPS:
        moments = collect_moments(problem, solution.params, group)
        losses += [find_loss(problem.dense[p]["kernel"], solution.params[p]["kernel"].dense(),
                             moments[p][1], aug=False) for p in group]  # fmt: skip
    assert solution.history[-1].val_loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_weight_is_never_worse_than_its_start():
    told = Told()
    problem = make_problem(work=Work(jax.random.key(0), session=told))
    wild = Shrink(rates=Rates(np.inf, decay="constant"))
    solution = train(problem, wild, 10)
    assert solution.best_update == 0
    assert told.progress_made == [(1, 3), (2, 3), (3, 3)]
    assert len(solution.notes) == 3
    assert "down: the loss was " in solution.notes[2] and "what update 0 had" in solution.notes[2]
    for path, leaf in solution.params.items():
        np.testing.assert_array_equal(leaf["kernel"].base.w, 0.5 * problem.dense[path]["kernel"])


class Solved(Shrink):
    """Puts the number in that is best: E |x w - s x̂ w|² is least at E (x w) (x̂ w)ᵀ / E |x̂ w|²."""

    def solve(self, leaf, given, lacking):
        w = given.base.w
        shrunk = dataclasses.replace(leaf.base, by=jnp.zeros(()))
        gram, cross = lacking(dataclasses.replace(leaf, base=shrunk))  # of nothing: E x̂ᵀ (x w)
        best = jnp.sum(w * cross) / jnp.sum(w * (gram @ w))
        return dataclasses.replace(leaf, base=Shrunk(leaf.base.inner, best))


def test_a_closed_form_begins_and_ends_it():
    """One that is exact: no update betters it, and it comes back after the last."""
    solution = train(make_problem(), Solved(rates=Rates(0.1, decay="constant")), 10)
    losses = [point.val_loss for point in solution.history]
    assert losses[1] > losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert [point.update for point in solution.history] == [0, 10, 11]


def test_what_is_left_out_stays_and_is_read_by_what_follows():
    problem = make_problem()
    solution = train(problem, DESCENDING, 10, leave_out=("gate",))
    assert solution.params["gate"]["kernel"] is problem.block["gate"]["kernel"]
    assert isinstance(solution.params["down"]["kernel"].base, Dense)
    assert solution.params["down"]["kernel"] is not problem.block["down"]["kernel"]


def test_windows_of_both_kinds_are_wanted():
    problem = dataclasses.replace(make_problem(), train=40)
    with pytest.raises(InputError, match="40 of 40 windows are for training"):
        train(problem, DESCENDING, 10)
