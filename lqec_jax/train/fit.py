"""The loop around `make_update`: batches, validation, early stop, best kept, resume.

Everything that decides a result is a function of the arguments: the order of windows comes from the
key, a checkpoint holds all that later updates read, so a resumed run ends in the same bytes.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lqec_jax.core.tree import combine, partition
from lqec_jax.core.types import Evaluation, ModelFns, Params, Schedule
from lqec_jax.errors import InputError
from lqec_jax.train import sharding
from lqec_jax.train.update import (
    TrainState,
    choose_options,
    count_parts,
    init_state,
    make_update,
)


class Session(Protocol):
    """Where a run keeps its training state and says how far it is."""

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """Returns the last saved (arrays, facts), arrays placed like `like`, or None."""

    def save(self, update: int, arrays: Any, facts: dict) -> None: ...

    def progress(self, done: int, total: int, message: str) -> None: ...


class NoSession:
    """Keeps nothing, says nothing."""

    def restore(self, like: Any) -> None:
        return None

    def save(self, update: int, arrays: Any, facts: dict) -> None: ...

    def progress(self, done: int, total: int, message: str) -> None: ...


@dataclass(frozen=True)
class Objective:
    """What is lowered, and over what.

    Attributes:
      loss: (params, batch) -> (scalar mean over the batch's windows, dict of scalars).
      batch: (int array of window numbers) -> a batch of host arrays, windows leading.
      train, val: how many windows there are; training windows come first.
      select: what is trained; see `core.tree.partition`.
    """

    loss: Callable
    batch: Callable[[np.ndarray], Any]
    train: int
    val: int
    select: str | Callable = "adapters"


class Fitted(NamedTuple):
    """The best parameters seen on the validation windows, step 0 included, and the curve."""

    params: Params
    history: tuple[Evaluation, ...]
    best_update: int
    notes: tuple[str, ...]


class Progress(NamedTuple):
    """The loop's own state, as JSON can hold it."""

    history: tuple[Evaluation, ...]
    best_loss: float
    best_update: int
    stale: int

    def look(self, point: Evaluation) -> tuple["Progress", bool]:
        """Adds a look at the validation windows; says whether it is the best so far."""
        better = point.val_loss < self.best_loss
        history = (*self.history, point)
        if better:
            return Progress(history, point.val_loss, point.update, 0), True
        return self._replace(history=history, stale=self.stale + 1), False

    def as_facts(self) -> dict:
        return {**self._asdict(), "history": [list(point) for point in self.history]}

    @classmethod
    def from_facts(cls, facts: dict) -> "Progress":
        return cls(**{**facts, "history": tuple(Evaluation(*p) for p in facts["history"])})


def fit(
    fns: ModelFns,
    params: Params,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    key: jax.Array,
    *,
    mesh: Any = None,
    session: Session | None = None,
) -> Fitted:
    """Trains what `objective.select` names and returns the best parameters seen.

    Validation is looked at before the first update, so training that helps nothing returns the
    parameters it was given. A loss that is no longer finite stops the loop with a note.

    Raises:
      InputError: there are no windows to train on, or none to look at.
    Cost: one compilation a batch shape; memory of `make_update` plus one copy of what is trained.
    """
    if objective.train < 1 or objective.val < 1:
        raise InputError(
            f"{objective.train} training and {objective.val} validation windows came; at least one "
            "of each was wanted; give more calibration text or another share for validation"
        )
    session = session or NoSession()
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        state, state_sharding, notes = _place(fns, params, optimizer, objective.select, mesh)
        segments = len(params.get("blocks", ()))
        if mesh is None:
            update = _plain_update(objective.loss, optimizer, schedule.accumulate, segments)
        else:
            update = make_update(
                objective.loss,
                optimizer,
                accumulate=schedule.accumulate,
                state_sharding=state_sharding,
                compiler_options=choose_options(segments),
            )
        evaluate = partial(_evaluate, _compile_loss(objective.loss), objective, schedule, mesh)
        state, best, progress = _begin(state, evaluate, session)
        order = _Order(key, objective.train)
        while not _finished(progress, schedule):
            done = progress.history[-1].update
            state, losses = _run_updates(
                state, update, objective, schedule, order, done, session, mesh
            )
            train_loss = float(np.mean(jax.device_get(losses)))
            point = Evaluation(done + len(losses), train_loss, evaluate(state))
            progress, better = progress.look(point)
            if better:
                best = _copy(state.train)
            session.save(point.update, (state.train, state.opt_state, best), progress.as_facts())
        notes += _closing_notes(progress, schedule)
        return Fitted(combine(best, state.frozen), progress.history, progress.best_update, notes)


def place_parts(schedule: Schedule, length: int, mesh: Any = None) -> Schedule:
    """Returns a schedule whose `accumulate` of None is chosen, for windows of so many tokens."""
    if schedule.accumulate is not None:
        return schedule
    sharers = mesh.shape[sharding.DATA] if mesh else 1
    return replace(schedule, accumulate=count_parts(schedule.batch, length, sharers))


@lru_cache(maxsize=8)
def _compile_loss(loss: Callable) -> Callable:
    return jax.jit(loss)


@lru_cache(maxsize=8)
def _plain_update(loss: Callable, optimizer, accumulate: int, segments: int) -> Callable:
    """Returns an update on one device; trainings of equal losses, block by block, compile it once.

    A loss that is a record without arrays is equal by value, and holds no model when it is kept.
    """
    options = choose_options(segments)
    return make_update(loss, optimizer, accumulate=accumulate, compiler_options=options)


def _place(fns, params, optimizer, select, mesh) -> tuple[TrainState, Any, tuple[str, ...]]:
    """Returns the first state, on the mesh if there is one, its shardings, and notes on them."""
    state = init_state(params, optimizer, select)
    if mesh is None:
        return state, None, ()
    placed, notes = shard_state(fns, params, optimizer, state, mesh)
    return jax.tree.map(sharding.put, state, placed), placed, notes


def shard_state(fns: ModelFns, params: Params, optimizer, state: TrainState, mesh: Mesh):
    """Returns a TrainState of shardings for a mesh, and notes on what every device holds whole.

    Moments lie where the arrays lie that they belong to. Shapes are enough for params and state.
    """
    shardings, notes = sharding.param_shardings(fns, params, mesh)
    train, frozen = partition(shardings, _like(state.train))
    whole = NamedSharding(mesh, PartitionSpec())
    # An optimizer of several has no moments of what another one moves.
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    opt_state = optax.tree_map_params(
        optimizer,
        lambda moment, placed: moment if is_masked(moment) else placed,
        state.opt_state,
        train,
        transform_non_params=lambda _: whole,
        is_leaf=is_masked,
    )
    return TrainState(whole, train, frozen, opt_state), notes


def _like(train: Params) -> Callable:
    """Selects the leaves at which a tree of trained arrays has one."""
    chosen = {path for path, _ in jax.tree_util.tree_leaves_with_path(train)}
    return lambda path, _: path in chosen


def _begin(state: TrainState, evaluate: Callable, session: Session):
    """Returns (state, best, progress), from the session's last checkpoint if it has one."""
    saved = session.restore((state.train, state.opt_state, state.train))
    if saved is None:
        start = Progress((), math.inf, 0, 0)
        progress, _ = start.look(Evaluation(0, None, evaluate(state)))
        return state, _copy(state.train), progress
    (train, opt_state, best), facts = saved
    progress = Progress.from_facts(facts)
    step = jnp.full_like(state.step, progress.history[-1].update)
    return TrainState(step, train, state.frozen, opt_state), best, progress


def _finished(progress: Progress, schedule: Schedule) -> bool:
    last = progress.history[-1]
    out_of_patience = schedule.patience and progress.stale >= schedule.patience
    return last.update >= schedule.updates or out_of_patience or not math.isfinite(last.val_loss)


def _run_updates(state, update, objective, schedule, order, done, session, mesh):
    """Runs the updates up to the next look; returns the state and their losses, still on device."""
    losses = []
    for number in range(done, min(done + schedule.eval_every, schedule.updates)):
        windows = order.windows(number * schedule.batch, schedule.batch)
        state, metrics = update(state, _on_devices(objective.batch(windows), mesh))
        losses.append(metrics["loss"])
        session.progress(number + 1, schedule.updates, "")
    return state, losses


class _Order:
    """Windows shuffled anew every epoch, as one endless sequence that depends on the key alone."""

    def __init__(self, key: jax.Array, count: int):
        self.key, self.count, self.shuffled = key, count, {}

    def windows(self, first: int, count: int) -> np.ndarray:
        return np.array([self._window(place) for place in range(first, first + count)])

    def _window(self, place: int) -> int:
        epoch, within = divmod(place, self.count)
        if epoch not in self.shuffled:
            shuffled = jax.random.permutation(jax.random.fold_in(self.key, epoch), self.count)
            self.shuffled = {epoch: np.asarray(shuffled)}
        return int(self.shuffled[epoch][within])


def _evaluate(loss: Callable, objective: Objective, schedule: Schedule, mesh, state) -> float:
    """Returns the mean loss over all validation windows."""
    total, size = 0.0, max(1, schedule.batch // schedule.accumulate)
    for first in range(0, objective.val, size):
        windows = objective.train + np.arange(first, min(first + size, objective.val))
        value, _ = loss(state.params, _on_devices(objective.batch(windows), mesh))
        total += float(value) * len(windows)
    return total / objective.val


def _on_devices(batch: Any, mesh) -> Any:
    if mesh is None:
        return batch
    parts = mesh.shape[sharding.DATA]

    def place(array):
        axis = sharding.DATA if array.shape[0] % parts == 0 else None
        return sharding.put(array, NamedSharding(mesh, PartitionSpec(axis)))

    return jax.tree.map(place, batch)


def _copy(tree: Params) -> Params:
    return jax.tree.map(jnp.copy, tree)


def _closing_notes(progress: Progress, schedule: Schedule) -> tuple[str, ...]:
    last = progress.history[-1]
    if not math.isfinite(last.val_loss):
        return (f"the loss was {last.val_loss} at update {last.update}; "
                f"the parameters of update {progress.best_update} are kept",)  # fmt: skip
    if progress.best_update == 0:
        return ("no update lowered the validation loss; the parameters are those it began with",)
    if last.update < schedule.updates:
        return (
            f"stopped at update {last.update} after {schedule.patience} looks without a new best",
        )
    return ()
