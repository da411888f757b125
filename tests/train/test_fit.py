"""The loop: what it looks at, when it stops, what it returns, and that it can be cut anywhere."""

import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lqec_jax.core.types import Evaluation, Schedule
from lqec_jax.errors import InputError
from lqec_jax.train.fit import Fitted, Objective, Progress, _Order, fit
from tests.train.tiny import Problem, adapters, make_plain_problem

RATE = 0.1


# A problem whose every number can be said by hand: one weight that moves to the mean of windows.


class Points:
    """Windows are numbers; the loss is mean((w - x)²). Remembers which windows were asked for."""

    def __init__(self, train, val):
        self.values = np.array([*train, *val], np.float32)
        self.train, self.val = len(train), len(val)
        self.seen: list[np.ndarray] = []

    def batch(self, numbers: np.ndarray) -> np.ndarray:
        self.seen.append(np.array(numbers))
        return self.values[numbers]

    @staticmethod
    def loss(params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        return jnp.mean(jnp.square(params["w"] - x)), {}

    @property
    def objective(self) -> Objective:
        everything = lambda path, leaf: True  # noqa: E731
        return Objective(self.loss, self.batch, self.train, self.val, everything)

    def seen_in_training(self) -> list[np.ndarray]:
        return [numbers for numbers in self.seen if numbers.max() < self.train]


def fit_points(points: Points, schedule: Schedule, optimizer=None, session=None, seed=0) -> Fitted:
    params = {"w": jnp.zeros(())}
    optimizer = optimizer or optax.sgd(RATE)
    key = jax.random.key(seed)
    return fit(None, params, points.objective, optimizer, schedule, key, session=session)


def descend(updates: int, target: float = 1.0) -> float:
    """Returns where `updates` steps of RATE from 0 to `target` end."""
    return target * (1 - (1 - 2 * RATE) ** updates)


def overfitting() -> Points:
    """Training goes to 1, validation wants 0.6: the best of looks 2 apart is at update 4."""
    return Points(train=[1.0] * 4, val=[0.6] * 3)


OVERFIT = Schedule(updates=14, batch=2, eval_every=2, patience=0)


def test_the_best_parameters_are_returned_not_the_last():
    fitted = fit_points(overfitting(), OVERFIT)
    assert [point.update for point in fitted.history] == [0, 2, 4, 6, 8, 10, 12, 14]
    for point in fitted.history:
        wanted = (descend(point.update) - 0.6) ** 2
        assert point.val_loss == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert fitted.best_update == 4
    assert float(fitted.params["w"]) == pytest.approx(descend(4), rel=1e-6)
    assert fitted.notes == ()


def test_the_training_loss_is_the_mean_since_the_last_look():
    fitted = fit_points(overfitting(), Schedule(updates=7, batch=2, eval_every=3, patience=0))
    assert [point.update for point in fitted.history] == [0, 3, 6, 7]
    assert fitted.history[0].train_loss is None
    for before, after in zip(fitted.history, fitted.history[1:], strict=False):
        steps = range(before.update, after.update)
        wanted = np.mean([(descend(step) - 1) ** 2 for step in steps])
        assert after.train_loss == pytest.approx(wanted, rel=1e-5)


def test_every_validation_window_counts_once_and_alike():
    points = Points(train=[1.0], val=[0.0, 1.0, 2.0, 3.0, 5.0])
    schedule = Schedule(updates=1, batch=4, accumulate=2, eval_every=1, patience=0)
    fitted = fit_points(points, schedule)
    assert fitted.history[0].val_loss == pytest.approx((0 + 1 + 4 + 9 + 25) / 5, rel=1e-6)
    # Two windows at a time, as many as an update's part has.
    looked = [list(numbers) for numbers in points.seen if numbers.min() >= points.train]
    assert looked == [[1, 2], [3, 4], [5]] * 2


def test_patience_stops_with_a_note():
    fitted = fit_points(overfitting(), Schedule(updates=100, batch=2, eval_every=2, patience=3))
    assert [point.update for point in fitted.history] == [0, 2, 4, 6, 8, 10]
    assert fitted.best_update == 4
    assert fitted.notes == ("stopped at update 10 after 3 looks without a new best",)
    assert float(fitted.params["w"]) == pytest.approx(descend(4), rel=1e-6)


def test_a_new_best_renews_the_patience():
    progress = Progress((), math.inf, 0, 0)
    course = [(3.0, True, 0), (4.0, False, 1), (3.0, False, 2), (2.0, True, 0), (9.0, False, 1)]
    for update, (val_loss, is_best, stale) in enumerate(course):
        progress, better = progress.look(Evaluation(update, None, val_loss))
        assert (better, progress.stale) == (is_best, stale)
    assert (progress.best_loss, progress.best_update) == (2.0, 3)
    assert progress.look(Evaluation(5, None, math.nan))[1] is False
    assert Progress.from_facts(json.loads(json.dumps(progress.as_facts()))) == progress


@pytest.mark.parametrize(("every", "came"), [(2, "inf"), (3, "nan")])
def test_a_loss_that_is_not_finite_stops_and_the_best_is_kept(every, came):
    # Fair up to the first look, then absurd: w is too large, then infinite, then not a number.
    rates = optax.piecewise_constant_schedule(RATE, {every: 1e30 / RATE})
    points = Points(train=[1.0] * 4, val=[1.0])
    schedule = Schedule(updates=40, batch=2, eval_every=every, patience=0)
    fitted = fit_points(points, schedule, optax.sgd(rates))
    assert [point.update for point in fitted.history] == [0, every, 2 * every]
    note = f"the loss was {came} at update {2 * every}; the parameters of update {every} are kept"
    assert fitted.notes == (note,)
    assert float(fitted.params["w"]) == pytest.approx(descend(every), rel=1e-6)


def test_a_loss_that_is_never_finite_returns_what_was_given():
    fitted = fit_points(Points(train=[1.0], val=[math.nan]), OVERFIT)
    assert fitted.notes == ("the loss was nan at update 0; the parameters of update 0 are kept",)
    assert [point.update for point in fitted.history] == [0]
    assert float(fitted.params["w"]) == 0.0


@pytest.mark.parametrize(("train", "val"), [(0, 2), (2, 0), (0, 0)])
def test_no_windows_are_refused(train, val):
    with pytest.raises(InputError, match="; give more calibration text") as caught:
        fit_points(Points([1.0] * train, [1.0] * val), OVERFIT)
    message = str(caught.value)
    assert f"{train} training and {val} validation windows came; at least one" in message
    assert "\n" not in message


# The order of windows


def test_every_window_is_seen_once_an_epoch():
    order = _Order(jax.random.key(3), 7)
    epochs = order.windows(0, 28).reshape(4, 7)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(7), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_a_function_of_the_key_alone():
    key, place = jax.random.key(3), 0
    whole = _Order(key, 7).windows(0, 28)
    walked = _Order(key, 7)
    for count in (1, 5, 2, 13, 7):  # across epochs
        np.testing.assert_array_equal(walked.windows(place, count), whole[place : place + count])
        place += count
    np.testing.assert_array_equal(_Order(key, 7).windows(17, 4), whole[17:21])
    np.testing.assert_array_equal(walked.windows(2, 3), whole[2:5])
    assert (whole != _Order(jax.random.key(4), 7).windows(0, 28)).any()


def test_updates_take_windows_in_that_order():
    def seen(seed: int) -> np.ndarray:
        points = Points(train=range(6), val=[0.0, 1.0])
        schedule = Schedule(updates=6, batch=4, eval_every=4, patience=0)
        fit_points(points, schedule, seed=seed)
        batches = points.seen_in_training()
        assert [len(numbers) for numbers in batches] == [4] * 6
        return np.concatenate(batches)

    first = seen(5)
    assert np.bincount(first).tolist() == [4] * 6
    np.testing.assert_array_equal(first, _Order(jax.random.key(5), 6).windows(0, 24))
    np.testing.assert_array_equal(first, seen(5))
    assert (first != seen(6)).any()


# A model with packed weights: runs cut and continued, and training that only harms


class Cut(Exception):
    """Stands for a killed process."""


class InMemory:
    """Keeps what a run saves as a folder would: copies of arrays, and facts as JSON text."""

    def __init__(self):
        self.saved, self.die_at, self.done = None, None, []

    def save(self, update: int, arrays, facts: dict) -> None:
        assert facts["history"][-1][0] == update
        self.saved = jax.tree.map(np.array, arrays), json.dumps(facts, allow_nan=False)

    def restore(self, like):
        if self.saved is None:
            return None
        arrays, facts = self.saved
        assert jax.tree.structure(arrays) == jax.tree.structure(like)
        return jax.tree.map(jnp.array, arrays), json.loads(facts)

    def progress(self, done: int, total: int, message: str) -> None:
        if done == self.die_at:
            raise Cut
        self.done.append((done, total))


@pytest.fixture(scope="module")
def problem() -> Problem:
    problem = make_plain_problem(length=6, d=32)
    return problem._replace(params={**problem.params, "blocks": problem.params["blocks"][:1]})


# Few windows and a high rate: the best comes before the end, and so before one of the cuts.
LONG = Schedule(updates=14, batch=3, accumulate=1, eval_every=3, patience=0)


def run(problem: Problem, optimizer, session=None, schedule: Schedule = LONG) -> Fitted:
    objective, key = problem.objective(val=3), jax.random.key(11)
    return fit(problem.fns, problem.params, objective, optimizer, schedule, key, session=session)


def as_bytes(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class Unbroken(NamedTuple):
    fitted: Fitted
    session: InMemory


@pytest.fixture(scope="module")
def unbroken(problem) -> Unbroken:
    session = InMemory()
    return Unbroken(run(problem, optax.adam(0.02), session), session)


def test_the_unbroken_run_is_worth_cutting(problem, unbroken):
    assert [point.update for point in unbroken.fitted.history] == [0, 3, 6, 9, 12, 14]
    assert unbroken.fitted.best_update == 3
    assert unbroken.session.done == [(number, 14) for number in range(1, 15)]
    moved = zip(adapters(problem.params), adapters(unbroken.fitted.params), strict=True)
    assert all(np.abs(after - before).max() > 1e-2 for before, after in moved)


@pytest.mark.parametrize(("die_at", "goes_on_at"), [(8, 7), (13, 13)])
def test_a_run_cut_and_continued_ends_in_the_same_bytes(problem, unbroken, die_at, goes_on_at):
    session = InMemory()
    session.die_at = die_at
    with pytest.raises(Cut):
        run(problem, optax.adam(0.02), session)
    session.die_at, session.done = None, []
    fitted = run(problem, optax.adam(0.02), session)
    assert session.done == [(number, 14) for number in range(goes_on_at, 15)]
    assert as_bytes(fitted.params) == as_bytes(unbroken.fitted.params)
    assert fitted[1:] == unbroken.fitted[1:]
    assert as_bytes(session.saved[0]) == as_bytes(unbroken.session.saved[0])


def test_a_finished_run_is_not_run_again(problem, unbroken):
    before = list(unbroken.session.done)
    again = run(problem, optax.adam(0.02), unbroken.session)
    assert unbroken.session.done == before
    assert as_bytes(again.params) == as_bytes(unbroken.fitted.params)
    assert again[1:] == unbroken.fitted[1:]


def test_an_absurd_rate_returns_the_adapters_given(problem):
    given = as_bytes(problem.params)
    schedule = Schedule(updates=4, batch=3, eval_every=2, patience=0)
    fitted = run(problem, optax.adam(1e3), schedule=schedule)
    assert fitted.best_update == 0
    note = "no update lowered the validation loss; the parameters are those it began with"
    assert fitted.notes == (note,)
    assert fitted.history[-1].val_loss > fitted.history[0].val_loss + 0.1
    for came, wanted in zip(adapters(fitted.params), adapters(problem.params), strict=True):
        np.testing.assert_array_equal(came, wanted)
    assert as_bytes(problem.params) == given  # and what was given is still there
