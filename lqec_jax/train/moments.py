"""Training a block's weights one after another, each to answer as the teacher's does.

    L = E[ (x w - x̂ ŵ)² + aug · (x̂ w - x̂ ŵ)² ] / E (x w)²

x is what a weight reads in the teacher's block and stream, x̂ what it reads in the student's, behind
all that was solved before it. With Δ = w - ŵ and δ = x - x̂ the first term is

    tr Δᵀ R Δ + 2 tr Δᵀ D w + E (δ w)²,   R = E[x̂ᵀ x̂],  D = E[x̂ᵀ δ],

and the second is tr Δᵀ R Δ, so an update reads moments and no tokens: every one is over the whole
batch. Moments of x̂ and δ rather than of x̂ and x, because the streams lie close together and
differences of large numbers would lose what is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core import sites
from lqec_jax.core.tree import combine, is_compressed, partition
from lqec_jax.core.types import BlockProblem, Evaluation, ModelFns, Params, Solution
from lqec_jax.core.walking import cut_rows
from lqec_jax.errors import InputError
from lqec_jax.train.fit import NoSession
from lqec_jax.train.parts.part import Part
from lqec_jax.train.rates import find_label, make_optimizer
from lqec_kernels.formats import CompressedLinear

# Updates between two looks at the validation windows.
LOOK_EVERY = 10


class Inputs(NamedTuple):
    """What calibration saw of one weight's inputs in both streams; means over tokens, float32.

    Attributes:
      gram: R = E[x̂ᵀ x̂], [d_in, d_in].
      drift: D w = E[x̂ᵀ (x - x̂)] w, [d_in, d_out].
      lost: E |(x - x̂) w|², scalar.
      energy: E |x w|², scalar.
    """

    gram: jax.Array
    drift: jax.Array
    lost: jax.Array
    energy: jax.Array


def find_cross(w: jax.Array, dense: jax.Array, moments: Inputs, *, aug: bool) -> jax.Array:
    """Returns E[x̂ᵀ e] for what the outputs lack, e = x w - x̂ ŵ, for `closed_form.regress`.

    With `aug`, e is the mean of the two terms' errors, which has the same best correction.

    Args:
      w, dense: the teacher's weight and the student's so far, float32 [d_in, d_out].
    """
    share = 0.5 if aug else 1.0
    return jnp.matmul(moments.gram, w - dense, precision="highest") + share * moments.drift


def find_loss(w: jax.Array, dense: jax.Array, moments: Inputs, *, aug: bool) -> jax.Array:
    """Returns L of a weight and what stands for it; 0 where the teacher's inputs are."""
    missing = w - dense
    own = jnp.sum(missing * jnp.matmul(moments.gram, missing, precision="highest"))
    shared = 2.0 * jnp.sum(missing * moments.drift) + moments.lost
    terms = 2.0 if aug else 1.0
    return (terms * own + shared) / jnp.maximum(moments.energy, jnp.finfo(jnp.float32).tiny)


@dataclass(frozen=True)
class Moments:
    """The loss L of one weight on its inputs' moments.

    Attributes:
      aug: whether the second term counts.
    """

    aug: bool = False


def fit_weights(training: Any, problem: BlockProblem) -> Solution:
    """Trains a block's weights in the order of its data and stores the best of each.

    What has its best in closed form (`Part.solve`) is put there before the first update and after
    the last.

    Args:
      training: `steps.Training` with the loss `Moments`; its updates, of each weight, are rounded
        up to tens; there is a look at the validation windows after every ten, and one at what the
        closed form makes of the best.
    Returns:
      The block; a history of the weights' mean losses; as best update the largest of theirs.
    Raises:
      InputError: no window to train on, or none to look at.
    Cost: of each group, a walk of both streams as far as its inputs with tokens · d_in · (2 d_in +
      2 d_out) multiply-adds; then d_in · d_out · (d_in + rank) multiply-adds an update. Held are
      two grams and two drifts, of training and of validation.
    """
    check_windows(problem)
    block, curves, notes = problem.block, [], []
    session = problem.work.session or NoSession()
    looks, total = -(-training.schedule.updates // LOOK_EVERY), len(problem.fns.linears)
    aug, width = training.loss.aug, problem.student.shape[-1]
    for group in problem.fns.linear_groups:
        trained = tuple(path for path in group if path not in training.leave_out)
        moments = collect_moments(problem, block, trained) if trained else {}
        for path in trained:
            w = sites.get(problem.dense, path).astype(jnp.float32)
            leaf = sites.get(block, path)
            parts = tuple(part.suit(leaf) for part in training.parts)
            descend = _compile_descent(parts, aug, width, looks)
            stored, found = descend(leaf, w, moments[path])
            block = sites.put(block, path, stored)
            curves.append(Curve(*jax.device_get(found)))
            notes += curves[-1].describe(path)
            session.progress(len(curves), total, "weight")
    best = max(curve.best_update for curve in curves)
    return Solution(block, _mean_history(curves), best, tuple(notes))


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


class Curve(NamedTuple):
    """A weight's losses: of training between looks, of validation at each, the first at step 0."""

    train: np.ndarray
    val: np.ndarray
    best: np.ndarray

    @property
    def best_update(self) -> int:
        return _update_of(int(self.best), len(self.val))

    def describe(self, path: str) -> list[str]:
        """Returns what is worth saying of a weight's training."""
        if not np.isfinite(self.val).all():
            return [f"{path}: the loss was {self.val.max()}; what update {self.best_update} had is "
                    "kept"]  # fmt: skip
        if not self.best:
            return [f"{path}: no update lowered the validation loss"]
        return []


def _update_of(look: int, looks: int) -> int:
    """Returns the update after which a look is taken; the closed form counts as one more."""
    return LOOK_EVERY * look if look < looks - 1 else LOOK_EVERY * (looks - 2) + 1


def _mean_history(curves: list[Curve]) -> tuple[Evaluation, ...]:
    train, val = (np.mean([getattr(c, n) for c in curves], axis=0) for n in ("train", "val"))
    first = Evaluation(0, None, float(val[0]))
    later = enumerate(zip(train, val[1:], strict=True), start=1)
    return first, *(Evaluation(_update_of(n, len(val)), float(t), float(v)) for n, (t, v) in later)


@lru_cache(maxsize=8)
def _compile_descent(parts: tuple[Part, ...], aug: bool, width: int, looks: int) -> Callable:
    """Returns a compiled (leaf, w, (train, val)) -> (the stored leaf, its `Curve`)."""
    optimizer = make_optimizer(parts, width, looks * LOOK_EVERY)

    def moves(path: tuple, array: jax.Array) -> bool:
        return find_label(parts, path, array) is not None

    def descend(given: CompressedLinear, w: jax.Array, moments: tuple[Inputs, Inputs]):
        begun = given
        for part in parts:
            begun = part.begin(begun, jax.random.key(0))
        first, frozen = partition(begun, moves)

        def read(leaf: CompressedLinear) -> jax.Array:
            for part in parts:
                leaf = part.read(leaf)
            return leaf.dense() if is_compressed(leaf) else leaf

        def lacking(leaf: CompressedLinear) -> tuple[jax.Array, jax.Array]:
            return moments[0].gram, find_cross(w, read(leaf), moments[0], aug=aug)

        def solve(train: Params) -> Params:
            leaf = combine(train, frozen)
            for part in parts:
                leaf = part.solve(leaf, given, lacking)
            return partition(leaf, moves)[0]

        def loss(train: Params, seen: Inputs) -> jax.Array:
            return find_loss(w, read(combine(train, frozen)), seen, aug=aug)

        def update(state: tuple, _) -> tuple:
            value, grads = jax.value_and_grad(loss)(state[0], moments[0])
            changes, opt_state = optimizer.update(grads, state[1], state[0])
            return (optax.apply_updates(state[0], changes), opt_state), value

        def better(train: Params, number: jax.Array, best: tuple) -> tuple:
            new = (loss(train, moments[1]), number, train)
            return jax.tree.map(lambda n, b: jnp.where(new[0] < best[0], n, b), new, best), new[0]

        def look(carry: tuple, number: jax.Array) -> tuple:
            state, values = jax.lax.scan(update, carry[0], length=LOOK_EVERY)
            best, val = better(state[0], number, carry[1])
            return (state, best), (jnp.mean(values), val)

        first = solve(jax.tree.map(lambda array: array.astype(jnp.float32), first))
        best = (loss(first, moments[1]), jnp.int32(0), first)
        carry = ((first, optimizer.init(first)), best)
        (_, last), (train, val) = jax.lax.scan(look, carry, jnp.arange(1, looks + 1))
        solved = solve(last[2])
        last, val_solved = better(solved, jnp.int32(looks + 1), last)
        train = jnp.append(train, loss(solved, moments[0]))
        val = jnp.concatenate([best[0][None], val, val_solved[None]])
        leaf = combine(last[2], frozen)
        for part in parts:
            leaf = part.keep(leaf, given)
        return leaf, (train, val, last[1])

    return jax.jit(descend)


def collect_moments(problem: BlockProblem, block: Params, group: tuple[str, ...]) -> dict:
    """Returns path -> (Inputs of the training windows, of the others) for linears of one input.

    Args:
      block: the student's, with what was solved so far.
    """
    weights = sites.get_all(problem.dense, group)
    add = _compile_sums(problem.fns, group)
    found = []
    for first, last in ((0, problem.train), (problem.train, len(problem.student))):
        total, tokens = None, (last - first) * problem.student.shape[1]
        for rows in cut_rows(last - first, problem.student.shape[1]):
            here = slice(first + rows.start, first + rows.stop)
            streams = (np.asarray(s[here]) for s in (problem.teacher, problem.student))
            part = add(problem.dense, block, *streams)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        found.append(_finish(total, tokens, weights))
    return {path: tuple(half[path] for half in found) for path in group}


@jax.jit
def _finish(total: dict, tokens: int, weights: dict) -> dict[str, Inputs]:
    gram, drift = total["gram"] / tokens, total["drift"] / tokens
    return {
        path: Inputs(
            gram,
            jnp.matmul(drift, w.astype(jnp.float32), precision="highest"),
            total["lost"][path] / tokens,
            total["energy"][path] / tokens,
        )
        for path, w in weights.items()
    }


@lru_cache(maxsize=64)
def _compile_sums(fns: ModelFns, group: tuple[str, ...]) -> Callable:
    """Returns a compiled (dense, block, h, ĥ) -> sums over tokens, for linears of one input."""

    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision="highest")

    def add(dense: Params, block: Params, teacher: jax.Array, student: jax.Array) -> dict:
        ends = (fns.block(dense, teacher)[1][group[0]], fns.block(block, student)[1][group[0]])
        own, x = (end.astype(jnp.float32).reshape(-1, end.shape[-1]) for end in ends)
        weights = {p: w.astype(jnp.float32) for p, w in sites.get_all(dense, group).items()}
        return {
            "gram": multiply(x.T, x),
            "drift": multiply(x.T, own - x),
            "lost": {p: jnp.sum(jnp.square(multiply(own - x, w))) for p, w in weights.items()},
            "energy": {p: jnp.sum(jnp.square(multiply(own, w))) for p, w in weights.items()},
        }

    return jax.jit(add)
