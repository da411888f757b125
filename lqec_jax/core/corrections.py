"""Low-rank corrections: of the base that there is, or in turns with a quantizer.

    Q_t = q(w - A_{t-1} B_{t-1}),   A_t B_t = solve(w - Q_t),   t = 1 .. iters

(Li et al. 2023, arXiv:2310.08659, and others.) A quantizer whose scales follow the weight may make
an iterate worse than the one before, so that the error is measured after every pair, in the
method's own norm and of the factors as they are stored, and the best pair is kept. The turns are
one loop: what is compiled does not grow with their number.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice, check_int, check_rank, resolve_rank
from lqec_jax.core.bases import replace_base
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, TrainingStep, run_linear
from lqec_jax.errors import InputError
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.sparse import Masked


@dataclass(frozen=True)
class Turns:
    """How a method alternates.

    Attributes:
      method: its name, for messages.
      quantizer: a linear step that makes a base; None where the base stays and there are no turns.
      iters: how many pairs.
      first: 'base' begins with the base of the whole weight, 'factors' with the factors of it.
      keep: 'best' or 'last' of the pairs.
    """

    method: str
    quantizer: LinearStep | None
    iters: int = 1
    first: str = "base"
    keep: str = "best"

    def __post_init__(self):
        if self.quantizer is not None:
            check_quantizer(self.method, self.quantizer)
        check_int(self.method, "iters", self.iters, 1)
        check_choice(self.method, "first", self.first, ("base", "factors"))
        check_choice(self.method, "keep", self.keep, ("best", "last"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.quantizer is None else self.quantizer.needs


def make_correction(
    name: str,
    arguments: Mapping[str, Any],
    solve: Callable,
    objective: Callable,
    objective_name: str,
    needs: frozenset[str] = frozenset(),
    notes: Callable | None = None,
) -> LinearStep:
    """Makes the step that adds the correction of what is missing of a weight.

    Args:
      arguments: all of the method's. 'rank', 'dtype' and those of `Turns` are checked here; with a
        'quantizer' that is not None the step replaces the base too.
      solve: (error [d_in, d_out], problem, rank) -> (correction, facts).
      objective, objective_name, needs: as in `Step`; what `solve` lowers and reads.
      notes: (facts of `solve` as numpy) -> lines.
    Raises:
      InputError: an argument is none of what is wanted.
    """
    check_rank(name, arguments["rank"])
    check_choice(name, "dtype", arguments.get("dtype", "float16"), ("float16", "float32"))
    known = {field.name for field in dataclasses.fields(Turns)} & set(arguments)
    turns = Turns(name, **{"quantizer": None, **{word: arguments[word] for word in known}})
    alone = turns.quantizer is None

    def run(problem: LinearProblem, leaf: CompressedLinear) -> Any:
        rank = resolve_rank(name, arguments["rank"], *problem.w.shape)

        def correct(error: jax.Array) -> tuple:
            return solve(error, problem, rank)

        if not alone:
            return alternate(problem, leaf, turns, correct, objective)
        correction, facts = correct(problem.w - leaf.dense())
        new = add_correction(leaf, correction)
        return new if notes is None else (new, facts)

    def describe_turns(facts: tuple) -> tuple[str, ...]:
        own, errors, won, quantized = facts
        lines = () if notes is None else tuple(notes(own))
        return (*lines, *describe(errors, won), *describe_quantizer(turns.quantizer, quantized))

    return LinearStep(
        name=name,
        run=run,
        arguments=arguments,
        needs=needs | turns.needs,
        notes=notes if alone else describe_turns,
        objective=objective,
        objective_name=objective_name,
    )


def alternate(
    problem: LinearProblem,
    leaf: CompressedLinear,
    turns: Turns,
    correct: Callable,
    objective: Callable,
) -> tuple:
    """Takes turns between a base and factors, and keeps the best pair.

    Transforms, earlier corrections and zeros of the leaf stay, what base it had does not: the
    target is the weight itself.

    Args:
      correct: (error [d_in, d_out]) -> (correction, facts).
      objective: as in `Step`, of the whole leaf.
    Returns:
      (leaf, (facts of `correct`, errors [iters], which was kept, facts of the quantizer)).
    Raises:
      InputError: the quantizer refuses the weight, or makes no base of its own.
    Cost: `iters` times both, and one leaf more is held.  jit: yes.
    """
    target = base_weight(problem, leaf)

    def iterate(correction) -> tuple:
        missing = target - correction.dense()
        new, quantized = requantize(turns.method, turns.quantizer, problem, leaf, missing)
        correction, facts = correct(problem.w - new.dense())
        new = add_correction(new, correction)
        return correction, (new, facts, quantized), objective(problem, new)

    correction = jax.eval_shape(correct, target)[0]
    start = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), correction)
    if turns.first == "factors":
        start, _ = correct(target)
    (new, facts, quantized), errors, won = keep_best(iterate, start, turns.iters, turns.keep)
    return new, (facts, errors, won, quantized)


def keep_best(iterate: Callable, state: Any, count: int, keep: str = "best") -> tuple:
    """Goes through iterates in one loop and keeps that of the least error.

    Args:
      iterate: state -> (next state, iterate, its error, scalar); any trees of arrays.
      count: how many, at least 1.
      keep: 'best', or 'last' whatever its error.
    Returns:
      (the iterate, all errors [count], its number from 0). One that is not finite is kept only
      where it is the first and none is better.
    """

    def step(carry: tuple, number: jax.Array) -> tuple:
        state, best, least, won = carry
        state, new, error = iterate(state)
        take = (error < least) | (number == 0) | (keep == "last")
        best = jax.tree.map(lambda n, b: jnp.where(take, n, b), new, best)
        least = jnp.where(take & jnp.isfinite(error), error, least)
        return (state, best, least, jnp.where(take, number, won)), error

    _, shapes, error = jax.eval_shape(iterate, state)
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    start = (state, nothing, jnp.asarray(jnp.inf, error.dtype), jnp.int32(0))
    (_, best, _, won), errors = jax.lax.scan(step, start, jnp.arange(count, dtype=jnp.int32))
    return best, errors, won


def base_weight(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns what a base and its transforms are to stand for, beside the corrections there are."""
    return problem.w - sum(correction.dense() for correction in leaf.corrections)


def requantize(
    method: str, quantizer: LinearStep, problem: LinearProblem, leaf: CompressedLinear, w: jax.Array
) -> tuple:
    """Puts the base of another weight in a leaf.

    Args:
      w: what the base behind the leaf's transforms is to stand for, float32 [d_in, d_out].
    Returns:
      (leaf, the quantizer's facts); corrections of its own come after those of the leaf.
    Raises:
      InputError: the quantizer refuses the weight, or leaves it dense.
    """
    start = replace_base(dataclasses.replace(leaf, corrections=()), Dense(_enter(leaf, w)))
    new, facts = run_linear(quantizer, dataclasses.replace(problem, w=w), start)
    inner = new.base.inner if isinstance(new.base, Masked) else new.base
    if isinstance(inner, Dense):
        raise InputError(
            f"{method}: quantizer={quantizer.name} leaves the weight dense; "
            "one that makes a base was wanted, e.g. rtn(bits=2)"
        )
    corrections = (*leaf.corrections, *new.corrections)
    return dataclasses.replace(new, corrections=corrections), facts


def check_quantizer(method: str, quantizer: Any) -> LinearStep:
    """Returns a step that may stand where a quantizer of single weights is wanted.

    Raises:
      InputError: it is none, or sees more than one weight.
    """
    if not isinstance(quantizer, LinearStep):
        trains = isinstance(quantizer, TrainingStep)
        came = f"{quantizer.name}, a {quantizer.scope} step" if trains else ""
        raise InputError(
            f"{method}: quantizer={came or repr(quantizer)}; "
            "a method that quantizes single weights was wanted, e.g. nf(bits=2)"
        )
    return quantizer


def add_correction(leaf: CompressedLinear, correction: Any) -> CompressedLinear:
    """Puts a correction behind those of a leaf."""
    return dataclasses.replace(leaf, corrections=(*leaf.corrections, correction))


def store(a: jax.Array, b: jax.Array, dtype: str) -> LowRank:
    """Makes the correction of two factors, as they are stored."""
    return LowRank(store_number(a, jnp.dtype(dtype)), store_number(b, jnp.dtype(dtype)))


def describe(errors: Any, won: Any) -> tuple[str, ...]:
    """Returns what a report should say of the turns; nothing where there was one."""
    if len(errors) == 1:
        return ()
    number, count = int(won), len(errors)
    return (
        f"turns: pair {number + 1} of {count} kept, its error {errors[number]:.4g}, "
        f"{errors[0]:.4g} after the first and {errors[-1]:.4g} after the last",
    )


def describe_quantizer(quantizer: LinearStep, facts: Any) -> tuple[str, ...]:
    """Returns what a report should say of a quantizer that a method was given."""
    return () if quantizer.notes is None else tuple(quantizer.notes(facts))


def _enter(leaf: CompressedLinear, w: jax.Array) -> jax.Array:
    """Returns the base that stands for w behind the leaf's transforms, M_in⁻¹ w M_out⁻¹."""
    inputs, outputs = leaf.input_transform, leaf.output_transform
    if isinstance(inputs, ChannelScale):
        w = w * _invert(inputs)[:, None]
    elif inputs is not None:
        w = inputs.apply(w.T).T  # Mᵀ w, and Mᵀ M = 1
    if isinstance(outputs, ChannelScale):
        return w * _invert(outputs)
    return w if outputs is None else outputs.apply_transpose(w)


def _invert(transform: ChannelScale) -> jax.Array:
    scale = transform.scale.astype(jnp.float32)
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
