"""A training is parts × loss × scope: what moves, what it is lowered by, how much is seen.

    TrainingStep = make_training(name, parts, loss, scope=.., schedule=.., arguments=..)

Parts (`train.parts`) say how each weight begins, what moves in it, how it is read and stored.
Losses are `losses.ModelLoss` for the whole model, `answers.Answer` and `LinearAnswer` for one block
at a time, `moments.Moments` for one weight after another. The rest is here, and follows: what is
counted and previewed, that nothing else moves, that the best seen on the validation windows is
kept, and that what is stored is what was scored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax

from lqec_jax.core import sites
from lqec_jax.core.tree import is_compressed, partition
from lqec_jax.core.types import (
    BlockProblem,
    ModelFns,
    ModelProblem,
    Params,
    Schedule,
    Solution,
    TrainingStep,
)
from lqec_jax.errors import InputError
from lqec_jax.train.fit import Fitted, Objective, fit, place_parts
from lqec_jax.train.moments import Moments, check_windows, fit_weights
from lqec_jax.train.parts.part import Part, store_as
from lqec_jax.train.rates import check_schedule, find_label, make_optimizer
from lqec_kernels.formats import CompressedLinear


def split_key(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (the key of new numbers, the key of the windows' order): halves of the training's."""
    first, second = jax.random.split(key)
    return first, second


def same_key(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the training's key for both."""
    return key, key


def half_key(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns half of the training's key for new numbers, all of it for the order."""
    return jax.random.split(key)[0], key


@dataclass(frozen=True)
class Training:
    """What a training is, equal by value; `run` of the step that `make_training` returns."""

    name: str
    parts: tuple[Part, ...]
    loss: Any
    schedule: Schedule
    keys: Callable = split_key
    leave_out: frozenset[str] = frozenset()
    describe: Callable | None = None

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        for part in self.parts:
            leaf = part.begin(leaf, key)
        return leaf

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        for part in self.parts:
            leaf = part.keep(leaf, given)
        return leaf

    def unmoved(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        for part in self.parts:
            leaf = part.unmoved(leaf, given)
        return leaf

    def store(self, leaf: CompressedLinear, given: CompressedLinear, *, moved: bool):
        """Returns a weight as it is stored: the one given where no update helped and nothing was
        put in."""
        if not moved and leaf is given:
            return given
        if leaf.stack_shape:
            return self.keep(leaf, given) if moved else self.unmoved(leaf, given)
        return _compile_store(self.parts, moved)(leaf, given)

    def moves(self, path: tuple, array: jax.Array) -> bool:
        if self.leave_out and self._leaves_out(path):
            return False
        return find_label(self.parts, path, array) is not None

    def leaves_out(self, fns: ModelFns, number: int) -> bool:
        """Says whether a linear stays as it is, by the number that `sites.map_model` counts."""
        return fns.linears[number % len(fns.linears)] in self.leave_out

    def _leaves_out(self, path: tuple) -> bool:
        keys = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        linear = sites.linear_path("/".join(map(str, keys))) or ""
        return any(f"/{linear}".endswith(f"/{left}") for left in self.leave_out)

    def preview(self, leaf: CompressedLinear) -> CompressedLinear:
        """Returns what becomes of one weight, before any training."""
        return self.keep(self.begin(leaf, jax.random.key(0)), leaf)

    def count(self, leaf: CompressedLinear) -> int:
        """Returns how many numbers move in one weight; reads shapes only."""
        return sum(part.count(leaf) for part in self.parts)


@dataclass(frozen=True)
class Program:
    """What an update lowers, (params, batch) -> (scalar, terms): programs are kept by it."""

    fns: ModelFns
    parts: tuple[Part, ...]
    loss: Any

    def __call__(self, params: Params, batch: dict) -> tuple[jax.Array, dict]:
        read = sites.map_model(
            params, self.fns.sites, lambda leaf, _: read_weight(self.parts, leaf)
        )
        return self.loss(self.fns, read, batch)


def read_weight(parts: Sequence[Part], leaf: CompressedLinear) -> CompressedLinear | jax.Array:
    """Returns a weight in training as a forward pass reads it."""
    for part in parts:
        leaf = part.read(leaf)
    return leaf


def make_training(
    name: str,
    parts: Sequence[Part],
    loss: Any,
    *,
    scope: str,
    schedule: Schedule,
    arguments: Mapping[str, Any] | None = None,
    objective_name: str = "",
    leave_out: Sequence[str] = (),
    keys: Callable = split_key,
    describe: Callable | None = None,
) -> TrainingStep:
    """Makes the step of a training.

    Args:
      parts: what moves, in the order in which they are put in; see `train.parts`.
      loss: `losses.ModelLoss`, `answers.Answer`, `answers.LinearAnswer` or `moments.Moments`.
      scope: 'model', or 'block' for those of a block and of its weights.
      schedule: how long, and how often it looks at the validation windows.
      arguments: as the step prints them, part of a run's fingerprint; None prints all of this.
      objective_name: what it lowers, in words.
      leave_out: paths of linears that stay as they are.
      keys: a key -> (of new numbers, of the windows' order).
      describe: (parts, the model as it begins, how many numbers move) -> lines for the report.
    Raises:
      InputError: the schedule or a part cannot be.
    Example:
      >>> make_training("mine", [Scales(), Adapters(rank=4)], Answer(), scope="block",
      ...               schedule=Schedule(epochs=1, batch=2)).name
      'mine'
    """
    check_schedule(name, schedule)
    parts, left = tuple(part.named(name) for part in parts), frozenset(leave_out)
    training = Training(name, parts, loss, schedule, keys, left, describe)
    run = {"model": train_model, "block": train_block}[scope]
    if isinstance(loss, Moments):
        run = fit_weights
    scratch = getattr(loss, "scratch_bytes", lambda vocab: 0)
    if arguments is None:
        arguments = {"parts": parts, "loss": loss, "schedule": schedule}
    return TrainingStep(
        name, scope, partial(run, training), arguments, schedule, training.preview,
        training.count, left, scratch, objective_name,
    )  # fmt: skip


def train_model(training: Training, problem: ModelProblem) -> Solution:
    """Trains a whole model and keeps the best seen on the validation windows.

    Raises:
      InputError: nothing of what is to move is there; a part or the loss refuses the model;
        Adafactor on a mesh.
    Cost: a forward and a backward pass an update; packed weights stay packed.
    """
    fns, windows, work = problem.fns, problem.windows, problem.work
    _check_mesh(training, work.mesh)
    init_key, order_key = training.keys(work.key)
    batch = training.loss.prepare(training.name, problem)
    begun = _begin(training, fns, problem.params, init_key)
    count = sum(array.size for array in jax.tree.leaves(partition(begun, training.moves)[0]))
    if not count:
        raise InputError(f"{training.name}: the model has nothing of what is to be trained")
    length = windows.tokens.shape[1]
    schedule = place_parts(training.schedule.resolve(windows.train), length, work.mesh)
    width = jax.eval_shape(fns.embed, problem.params, windows.tokens[:1]).shape[-1]
    program = Program(fns, training.parts, training.loss)
    fitted = fit(
        fns,
        begun,
        Objective(program, batch, windows.train, windows.val, training.moves),
        make_optimizer(training.parts, width, schedule.updates),
        schedule,
        order_key,
        mesh=work.mesh,
        session=work.session,
    )
    params = _finish(training, fns, fitted, begun, problem.params)
    said = () if training.describe is None else training.describe(training.parts, begun, count)
    return Solution(params, fitted.history, fitted.best_update, (*said, *fitted.notes))


def train_block(training: Training, problem: BlockProblem) -> Solution:
    """Trains a block's weights together and keeps the best seen on the validation windows.

    Raises:
      InputError: no window to train on, or none to look at; a part refuses a weight.
    Cost: a forward and a backward pass through the block an update.
    """
    fns, work = problem.fns, problem.work
    check_windows(problem)
    init_key, order_key = training.keys(work.key)
    given = {"blocks": (problem.block,)}
    begun = _begin(training, fns, given, init_key)
    batch = training.loss.prepare(training.name, problem)
    count, length, width = problem.student.shape
    schedule = place_parts(training.schedule.resolve(problem.train), length)
    program, val = Program(fns, training.parts, training.loss), count - problem.train
    fitted = fit(
        fns,
        begun | training.loss.beside(problem),
        Objective(program, batch, problem.train, val, _In(training.moves)),
        make_optimizer(training.parts, width, schedule.updates),
        schedule,
        order_key,
        session=work.session,
    )
    (block,) = _finish(training, fns, fitted, begun, given)["blocks"]
    return Solution(block, fitted.history, fitted.best_update, fitted.notes)


@dataclass(frozen=True)
class _In:
    """Selects what moves of a block, nothing of what the loss reads beside it."""

    moves: Callable

    def __call__(self, path: tuple, array: jax.Array) -> bool:
        return path[0].key == "blocks" and self.moves(path, array)


def _check_mesh(training: Training, mesh: Any) -> None:
    """Refuses what is not placed on several devices: moments that are sums over rows or columns."""
    factored = any(part.rates.optimizer == "adafactor" for part in training.parts)
    if mesh is not None and factored:
        raise InputError(
            f"{training.name}: optimizer='adafactor' runs on one device; leave the mesh out"
        )


def _begin(training: Training, fns: ModelFns, params: Params, key: jax.Array) -> Params:
    def begin(leaf: CompressedLinear, number: int) -> CompressedLinear:
        if training.leaves_out(fns, number):
            return leaf
        return training.begin(leaf, jax.random.fold_in(key, number))

    return sites.map_model(params, fns.sites, begin)


def _finish(
    training: Training, fns: ModelFns, fitted: Fitted, begun: Params, given: Params
) -> Params:
    """Returns what was trained as it is stored, and to the bit what was given where it is best."""
    first = [leaf for _, leaf in sites.each(given, fns.sites)]
    trained = begun if fitted.best_update == 0 else fitted.params

    def store(leaf: CompressedLinear, number: int) -> CompressedLinear:
        if training.leaves_out(fns, number):
            return leaf
        return training.store(leaf, first[number], moved=fitted.best_update > 0)

    stored = sites.map_model(trained, fns.sites, store)
    return {name: _as_it_came(given[name], stored[name]) for name in given}


def _as_it_came(given: Params, stored: Params) -> Params:
    """Returns a tree with what is no compressed weight in the dtypes that it had."""
    return jax.tree.map(
        lambda before, after: after if is_compressed(after) else store_as(before, after),
        given, stored, is_leaf=is_compressed,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _compile_store(parts: tuple[Part, ...], moved: bool) -> Callable:
    """Returns a compiled (leaf, given) -> the leaf as it is stored, one for all blocks."""

    def store(leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        for part in parts:
            leaf = part.keep(leaf, given) if moved else part.unmoved(leaf, given)
        return leaf

    return jax.jit(store)
