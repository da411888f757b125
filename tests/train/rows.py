"""Every training, each on one tiny problem: a block of one linear, or a model of one block.

A row is run once and kept; what is run again runs the programs that are there. Every training
window has a token, or a stretch of its stream, of its own: spoiling that one spoils the update that
first sees the window, and no program is compiled anew.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import sites
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import (
    BlockProblem,
    ModelProblem,
    Params,
    Schedule,
    Solution,
    TrainingStep,
    Windows,
    Work,
)
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.train import fit, steps
from lqec_jax.train.answers import Answer
from lqec_jax.train.fit import Fitted, _Order
from lqec_jax.train.losses import Discrepancy, Divergence, ModelLoss
from lqec_jax.train.parts import Adapters, Scales, Zeros
from lqec_jax.train.rates import Rates
from lqec_jax.trainings.apiq import apiq
from lqec_jax.trainings.block_ap import block_ap
from lqec_jax.trainings.e2e_qp import e2e_qp
from lqec_jax.trainings.finetune import finetune
from lqec_jax.trainings.lrec import lrec
from lqec_jax.trainings.omniquant import omniquant
from lqec_jax.trainings.peqa import peqa
from lqec_jax.trainings.rilq import rilq
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.train.tiny import VOCAB, plain_fns, training_of

D, LENGTH, TRAIN, VAL, RANK = 32, 8, 5, 2, 4
GRID = GroupGrid(2, 16)
# Five windows, two an update: the fifth is first seen in the third update, after the first look.
COUNTED = {"updates": 6, "batch": 2, "eval_every": 2, "patience": 0}
PASSES = {"epochs": 3, "batch": 2}
GRIDDED = {"bits": 2, "group_size": 16}
KEY = jax.random.key(3)


@dataclass(frozen=True)
class Row:
    """A training and what it begins with.

    Attributes:
      given: what it makes of a dense weight before it begins, see `LEAVES`.
      replaces: its method makes a base of its own, so it begins as its preview and not as given.
    """

    step: TrainingStep
    given: str
    replaces: bool = False


def _moving(rate: float) -> list:
    return [Scales(rates=Rates(rate)), Zeros(whole=True, rates=Rates(5 * rate)),
            Adapters(rank=RANK, rates=Rates(rate))]  # fmt: skip


def _finetune(**arguments: Any) -> TrainingStep:
    return finetune(**COUNTED, warmup=0, lr=0.02, **arguments)


def _rilq(**arguments: Any) -> TrainingStep:
    return rilq(**COUNTED, **{"rank": RANK, "lr": 0.01} | arguments)


ROWS = {
    "omniquant": Row(omniquant(**GRIDDED, **PASSES, lr=0.2), "dense", replaces=True),
    "block_ap": Row(block_ap(**GRIDDED, **PASSES, weight_lr=0.05, scale_lr=0.05), "dense",
                    replaces=True),
    "apiq": Row(apiq(**GRIDDED, **PASSES, rank=RANK, clip_lr=0.2, lr=0.01), "dense", replaces=True),
    "apiq linear": Row(
        apiq(**GRIDDED, rank=2, scope="linear", updates=20, clip_lr=0.1, lr=0.003,
             dtype="float32"), "dense", replaces=True),
    "rilq block": Row(_rilq(scope="block"), "bare"),
    "rilq linear": Row(_rilq(scope="linear"), "bare"),
    "rilq": Row(_rilq(), "bare"),
    "rilq pool": Row(_rilq(pool=True, rank=2), "bare"),
    "lrec": Row(lrec(**COUNTED, rank=RANK, lr=0.01), "bare"),
    "lrec top_k": Row(lrec(**COUNTED, rank=RANK, lr=0.01, logits="top_k", top_k=8), "bare"),
    "e2e_qp": Row(e2e_qp(updates=6, batch=2, eval_every=2, lr=0.02), "bare"),
    "peqa": Row(peqa(**COUNTED, lr=0.02), "bare"),
    "peqa zeros": Row(peqa(**COUNTED, lr=0.02, zeros=True), "bare"),
    "finetune rounded": Row(_finetune(), "rounded adapter"),
    "finetune norms": Row(_finetune(train="adapters+norms"), "adapter"),
    "finetune scales": Row(_finetune(train="scales"), "bare"),
    "finetune scales+zeros": Row(_finetune(train="scales+zeros"), "bare"),
    "own block": Row(
        steps.make_training("own", _moving(0.01), Answer(aug=True), scope="block",
                            schedule=Schedule(**PASSES, accumulate=None, patience=0)), "bare"),
    "own model": Row(
        steps.make_training("own", _moving(0.01), ModelLoss((Divergence(), Discrepancy(0.5))),
                            scope="model", schedule=Schedule(**COUNTED)), "bare"),
}  # fmt: skip


# What a weight is before a training


def _adapter(seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    a = random.standard_normal((D, RANK)).astype(np.float32) / RANK
    return a, 0.02 * random.standard_normal((RANK, D)).astype(np.float32)


def _bare(w: jax.Array) -> CompressedLinear:
    return CompressedLinear(quantize(w, GRID))


def _with_adapter(w: jax.Array) -> CompressedLinear:
    half = (jnp.asarray(array, jnp.float16) for array in _adapter())
    return replace(_bare(w), corrections=(LowRank(*half),))


def _with_rounded(w: jax.Array) -> CompressedLinear:
    few = QuantizedLowRank.round(*map(jnp.asarray, _adapter()), bits=4, group_size=16)
    return replace(_bare(w), corrections=(few,))


LEAVES: dict[str, Callable] = {
    "dense": lambda w: CompressedLinear(Dense(w)),
    "bare": _bare,
    "adapter": _with_adapter,
    "rounded adapter": _with_rounded,
}


# The problems


@cache
def _dense() -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal((D, D)) * D**-0.5, jnp.float32)


@cache
def make_block_problem(given: str) -> BlockProblem:
    """Returns one block, with a norm that nothing reads, and streams that lie a little apart."""
    random = np.random.default_rng(3)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    teacher = draw(TRAIN + VAL, LENGTH, D // 4) @ draw(D // 4, D) / 2
    student = teacher + 0.1 * draw(TRAIN + VAL, LENGTH, D)
    norm = {"scale": jnp.full(3, 0.1, jnp.float16)}
    leaf = LEAVES[given](_dense())
    block, dense = ({"mix": {"kernel": w}, "norm": norm} for w in (leaf, _dense()))
    return BlockProblem(plain_fns(), block, dense, teacher, student, TRAIN, Work(KEY))


@cache
def make_model_problem(given: str) -> ModelProblem:
    """Returns a model of one block; training window n has the token VOCAB - 1 - n once."""
    random = np.random.default_rng(4)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    first = random.integers(0, VOCAB - TRAIN, (TRAIN + VAL, 1))
    tokens = ((first + np.arange(LENGTH)) % (VOCAB - TRAIN)).astype(np.int32)
    tokens[np.arange(TRAIN), 3] = VOCAB - 1 - np.arange(TRAIN)
    outer = {"embed": jnp.asarray(draw(VOCAB, D)), "head": jnp.asarray(draw(D, VOCAB) * D**-0.5),
             "norm": {"scale": jnp.ones(D)}}  # fmt: skip
    teacher = outer | {"blocks": ({"mix": {"kernel": _dense()[None]}},)}
    leaf = jax.tree.map(lambda array: array[None], LEAVES[given](_dense()))
    states = np.asarray(jax.jit(plain_fns().hidden)(teacher, tokens)[0])
    params = outer | {"blocks": ({"mix": {"kernel": leaf}},)}
    return ModelProblem(plain_fns(), params, Windows(tokens, TRAIN), Work(KEY), states)


def problem_of(row: Row) -> BlockProblem | ModelProblem:
    make = make_model_problem if row.step.scope == "model" else make_block_problem
    return make(row.given)


def params_of(problem: BlockProblem | ModelProblem, tree: Params = None) -> Params:
    """Returns what was given, or a solution's, as a model's parameters."""
    if isinstance(problem, ModelProblem):
        return problem.params if tree is None else tree
    return {"blocks": (problem.block if tree is None else tree,)}


def weight_of(problem: BlockProblem | ModelProblem, tree: Params = None) -> CompressedLinear:
    ((_, leaf),) = sites.each(params_of(problem, tree), problem.fns.sites)
    return leaf


def spoil(problem: BlockProblem | ModelProblem, window: int) -> BlockProblem | ModelProblem:
    """Makes one training window's loss not a number."""
    if isinstance(problem, BlockProblem):
        student = problem.student.copy()
        student[window] = np.nan
        return replace(problem, student=student)
    embed = problem.params["embed"].at[VOCAB - 1 - window].set(jnp.nan)
    return replace(problem, params={**problem.params, "embed": embed})


def window_at(row: Row, place: int) -> int:
    """Returns which training window an update sees at a place of the sequence of all."""
    _, key = training_of(row.step).keys(KEY)
    return int(_Order(key, TRAIN).windows(place, 1)[0])


# The runs


class Ran(NamedTuple):
    """What a run made.

    Attributes:
      fitted: the best as it was trained and scored; None where one program trains and stores.
      program: an update as it was lowered; None alike.
    """

    solution: Solution
    fitted: Fitted | None
    program: str | None


def run(row: Row, problem: BlockProblem | ModelProblem, **where: Any) -> Ran:
    """Runs a training where `Work` says, and keeps what it had before storing."""
    with _watched() as seen:
        work = dataclasses.replace(problem.work, **where)
        solution = row.step.run(replace(problem, work=work))
    return Ran(solution, seen.get("fitted"), seen.get("program"))


@cache
def run_once(name: str) -> Ran:
    return run(ROWS[name], problem_of(ROWS[name]))


@contextmanager
def _watched() -> Iterator[dict]:
    seen: dict[str, Any] = {}
    finish, plain = steps._finish, fit._plain_update

    def keep(training, fns, fitted, *rest) -> Params:
        seen["fitted"] = fitted
        return finish(training, fns, fitted, *rest)

    def tell(*arguments) -> Callable:
        update = plain(*arguments)

        def call(state, batch):
            if "program" not in seen:
                seen["program"] = update.lower(state, batch).as_text()
            return update(state, batch)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_finish", keep)
        patch.setattr(fit, "_plain_update", tell)
        yield seen
