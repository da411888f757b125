"""Training one block to answer as the teacher's does: the objective of every block step.

    L = [ E (F(h) - F̂(ĥ))² + aug · E (F(ĥ) - F̂(ĥ))² ] / E (F(h) - h)²

F is the teacher's block, F̂ the student's, h and ĥ what enters them in the two streams. The first
term asks the block to make good what blocks before it lost, the second asks it to do as the
teacher's would from where it stands (OmniQuant's auxiliary loss, arXiv:2308.13137). The divisor,
what the teacher's block adds, makes losses of different blocks comparable. Both terms together are
one distance and a constant, because

    (a - y)² + (b - y)² = 2 ((a + b)/2 - y)² + (a - b)²/2,

so the teacher's block runs once over the windows and never while training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core.bases import replace_base
from lqec_jax.core.tree import get_at, set_at
from lqec_jax.core.types import BlockProblem, BlockSolution, ModelFns, Params
from lqec_jax.core.walking import cut_rows
from lqec_jax.errors import InputError
from lqec_jax.train.fit import Fitted, NoSession, Objective, Schedule, fit
from lqec_jax.train.update import count_parts
from lqec_kernels.formats import CompressedLinear, Dense


def fit_block(
    problem: BlockProblem,
    params: Params,
    build: Callable[[Params], Params],
    make_optimizer: Callable[[int], optax.GradientTransformation],
    *,
    epochs: int,
    batch: int,
    aug: bool,
) -> Fitted:
    """Trains `params["train"]` and returns the best parameters seen on the validation windows.

    Args:
      params: {'train': what is trained, 'frozen': what else `build` reads}.
      build: params -> the student's block. Pass one function for all blocks: programs are kept by
        it, and compiled once a shape.
      make_optimizer: updates -> optimizer; one object for one count, for the same reason.
      epochs: passes over the training windows; there is a look at the others after each.
      batch: windows an update sees; all of them where there are fewer.
      aug: whether the second term counts.
    Raises:
      InputError: no window to train on, or none to look at.
    Cost: epochs · n passes forward and backward through one block.
    """
    check_windows(problem)
    batch = min(batch, problem.train)
    an_epoch = problem.train // batch
    length = problem.student.shape[1]
    schedule = Schedule(
        updates=epochs * an_epoch,
        batch=batch,
        accumulate=count_parts(batch, length),
        eval_every=an_epoch,
        patience=None,
    )
    objective = make_objective(problem, build, aug=aug)
    return run_fit(problem, params, objective, make_optimizer(schedule.updates), schedule)


def check_windows(problem: BlockProblem) -> None:
    """Checks that there are windows of both kinds.

    Raises:
      InputError: none to train on, or none to look at.
    """
    if not 1 <= problem.train < len(problem.student):
        raise InputError(
            f"{problem.train} of {len(problem.student)} windows are for training; at least one "
            "of each kind was wanted; give more calibration text"
        )


def run_fit(
    problem: BlockProblem, params: Params, objective: Objective, optimizer, schedule: Schedule
) -> Fitted:
    """Runs the loop of every gradient method on a block, and tells the block's progress."""
    return fit(
        problem.fns, params, objective, optimizer, schedule, problem.key,
        session=_Progress(problem),
    )  # fmt: skip


@dataclass(frozen=True)
class Trainable:
    """A weight whose stored numbers are trained. Make one a step: programs are kept by it.

    Attributes:
      start: leaf -> the trained arrays of one weight, float32.
      read: (leaf, trained) -> the base as it would be stored, float32 [d_in, d_out], differentiable
        in what is trained; or, where more than the base is trained, the whole leaf.
      store: (leaf, trained) -> the leaf as it is stored; its base is `read`'s to the bit.
    """

    start: Callable[[CompressedLinear], Params]
    read: Callable[[CompressedLinear, Params], jax.Array | CompressedLinear]
    store: Callable[[CompressedLinear, Params], CompressedLinear]

    def count(self, leaf: CompressedLinear) -> int:
        """Returns how many numbers are trained for one weight; reads shapes only."""
        return sum(array.size for array in jax.tree.leaves(jax.eval_shape(self.start, leaf)))

    def preview(self, leaf: CompressedLinear) -> CompressedLinear:
        """Returns what becomes of one weight, before any training."""
        return self.store(leaf, self.start(leaf))


def fit_bases(
    problem: BlockProblem, trainable: Trainable, make_optimizer: Callable, **schedule: Any
) -> BlockSolution:
    """Trains the bases of a block's linears together and stores the best.

    Args:
      make_optimizer, schedule: as for `fit_block`.
    """
    block, names = problem.block, {path: f"{path}/kernel" for path in problem.fns.linears}
    leaves = {path: get_at(block, name) for path, name in names.items()}
    train = {path: jax.jit(trainable.start)(leaf) for path, leaf in leaves.items()}
    params = {"train": train, "frozen": {"block": block}}
    fitted = fit_block(problem, params, build_block(trainable.read), make_optimizer, **schedule)
    for path, leaf in leaves.items():
        stored = jax.jit(trainable.store)(leaf, fitted.params["train"][path])
        block = set_at(block, names[path], stored)
    return BlockSolution(block, fitted.history, fitted.best_update, fitted.notes)


@lru_cache(maxsize=32)
def build_block(read: Callable) -> Callable:
    """Returns `fit_block`'s `build` for a block whose weights `read` reads, see `Trainable`."""

    def build(params: Params) -> Params:
        block = params["frozen"]["block"]
        for path, trained in params["train"].items():
            leaf = get_at(block, f"{path}/kernel")
            came = read(leaf, trained)
            whole = came if isinstance(came, CompressedLinear) else _put_weight(leaf, came)
            block = set_at(block, f"{path}/kernel", whole)
        return block

    return build


def _put_weight(leaf: CompressedLinear, w: jax.Array) -> CompressedLinear | jax.Array:
    """Puts a dense base in a leaf; the weight alone where the leaf says no more."""
    leaf = replace_base(leaf, Dense(w))
    others = (*leaf.corrections, leaf.input_transform, leaf.output_transform, leaf.input_grid)
    bare = isinstance(leaf.base, Dense) and all(part is None for part in others)
    return w if bare else leaf


def is_trained(path: tuple, leaf: Any) -> bool:
    """Selects what lies under 'train'."""
    return path[0].key == "train"


def make_objective(problem: BlockProblem, build: Callable, *, aug: bool) -> Objective:
    """Returns the distance of what the block answers, over the windows of both streams."""
    answers, spread, scale = _find_answers(problem, aug=aug)

    def batch(numbers: np.ndarray) -> dict:
        scales = np.full(len(numbers), scale, np.float32)
        return {"h": np.asarray(problem.student[numbers]), "answer": np.asarray(answers[numbers]),
                "spread": spread[numbers], "scale": scales}  # fmt: skip

    val = len(problem.student) - problem.train
    return Objective(_loss(problem.fns, build, aug), batch, problem.train, val, is_trained)


@lru_cache(maxsize=32)
def _loss(fns: ModelFns, build: Callable, aug: bool) -> Callable:
    terms = 2 if aug else 1

    def loss(params: Params, batch: dict) -> tuple[jax.Array, dict]:
        y = fns.block(build(params), batch["h"])[0]
        wide = jnp.promote_types(y.dtype, jnp.float32)
        missing = y.astype(wide) - batch["answer"].astype(wide)
        error = jnp.mean(jnp.square(missing), axis=(1, 2))
        return jnp.mean((terms * error + batch["spread"]) * batch["scale"]), {}

    return loss


def _find_answers(problem: BlockProblem, *, aug: bool) -> tuple[Any, np.ndarray, float]:
    """Returns what the student should answer [n, t, d], what it cannot reach [n], and the scale."""
    shape, dtype = problem.student.shape, np.dtype(problem.student.dtype)
    if problem.scratch is None:
        answers = np.empty(shape, dtype)
    else:
        answers = np.memmap(problem.scratch, dtype, "w+", shape=shape)
    spread, added = np.empty(shape[0], np.float32), np.empty(shape[0], np.float32)
    for rows in cut_rows(*shape[:2]):
        streams = np.asarray(problem.teacher[rows]), np.asarray(problem.student[rows])
        found = _answer(problem.fns, aug)(problem.dense, *streams)
        answers[rows], spread[rows], added[rows] = found
    scale = 1.0 / max(float(added[: problem.train].mean()), np.finfo(np.float32).tiny)
    return answers, spread, scale


@lru_cache(maxsize=16)
def _answer(fns: ModelFns, aug: bool) -> Callable:
    """Returns a compiled (dense block, h, ĥ) -> (answers [b, t, d], spread [b], F's part [b])."""

    def answer(dense: Params, teacher: jax.Array, student: jax.Array):
        own = fns.block(dense, teacher)[0].astype(jnp.float32)
        added = jnp.mean(jnp.square(own - teacher.astype(jnp.float32)), axis=(1, 2))
        if not aug:
            return own.astype(teacher.dtype), jnp.zeros_like(added), added
        other = fns.block(dense, student)[0].astype(jnp.float32)
        spread = jnp.mean(jnp.square(own - other), axis=(1, 2)) / 2
        return ((own + other) / 2).astype(teacher.dtype), spread, added

    return jax.jit(answer)


class _Progress(NoSession):
    """Hands the loop's progress on."""

    def __init__(self, problem: BlockProblem):
        self._tell = problem.progress

    def progress(self, done: int, total: int, message: str) -> None:
        self._tell(done, total, message or "update")
