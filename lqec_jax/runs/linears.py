"""Linear steps applied to one weight: for real, with a report, or on shapes alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import STATISTICS, describe_tokens
from lqec_jax.core import scales
from lqec_jax.core.arguments import check_all
from lqec_jax.core.types import (
    LinearProblem,
    LinearStats,
    ModelFns,
    Step,
    run_linear,
    weight_error,
)
from lqec_jax.errors import InputError, NotFinite, did_you_mean
from lqec_jax.recipe import Recipe, check_chain
from lqec_kernels.formats import CompressedLinear, Dense

WORSE = "the adapter raises the error that it is to lower; it is kept as it was asked for"
TOO_LARGE = (
    "its weights or inputs are too large for that: look at them (lqec inspect), take a step that "
    "reads no inputs such as rtn, or --dtype float32"
)


def apply_steps(
    name: str,
    steps: Sequence[Step],
    problem: LinearProblem,
    leaf: CompressedLinear,
    tokens: int | None = None,
) -> tuple[CompressedLinear, dict]:
    """Runs linear steps on one weight, in its unit where float16 has no place for its scales.

    Args:
      tokens: of how many the statistics of its inputs are, where that is known.
    Returns:
      The compressed weight and its report: sizes, error, and what every step did to its objective.
    Raises:
      InputError: a step refuses this weight; the weight's name is put before its reason.
      NotFinite: a step made something that is not finite.
    """
    unit, w, entries = scales.find_exponent(problem.w), problem.w, []
    if unit:
        problem = replace(problem, w=scales.times_power(w, -unit))
        leaf = scales.rescale(leaf, -unit)
    for step in steps:
        had = len(leaf.corrections)
        try:
            leaf, facts, before, after = _jitted(step)(problem, leaf)
        except InputError as error:
            raise InputError(f"{error} (at {name})") from error
        if not np.isfinite(after):
            raise NotFinite(f"{step.name} made {name} non-finite ({step} -> {after}); {TOO_LARGE}")
        notes = _notes(step, facts)
        if tokens is not None and step.needs & STATISTICS.keys():
            notes += describe_tokens(tokens, leaf.d_in)
        # Before a step that quantizes too, the error is that of the dense weight: 0.
        if len(leaf.corrections) > had and after > before > 0:
            notes.append(WORSE)
        entries.append(
            {"method": step.name, "objective": step.objective_name, "before": float(before),
             "after": float(after), "notes": notes}
        )  # fmt: skip
    stored = scales.rescale(leaf, unit) if unit else leaf
    if entries:
        entries[-1]["notes"] += scales.describe(leaf, stored, unit)
    return stored, {**describe(name, w, stored), "steps": entries}


def describe(name: str, w: jax.Array, leaf: CompressedLinear) -> dict:
    """Returns what is reported of a compressed weight, whatever made it."""
    unit = scales.find_exponent(w)
    if unit:  # squares of small weights would be zero, those of large ones infinite
        error = _relative_error(scales.times_power(w, -unit), scales.rescale(leaf, -unit))
    else:
        error = _relative_error(w, leaf)
    return {
        "path": name,
        "d_in": leaf.d_in,
        "d_out": leaf.d_out,
        "bits_per_weight": leaf.bits_per_weight,
        "relative_error": float(error),
    }


def preview(fns: ModelFns, shapes: dict[str, tuple[int, int]], recipe: Recipe) -> dict:
    """Runs a recipe on shapes alone: finds what a step would refuse, and every size exactly.

    Args:
      shapes: a block's linears, path -> (d_in, d_out).
    Returns:
      path -> CompressedLinear of `jax.ShapeDtypeStruct`.
    Raises:
      InputError: a step refuses a shape; the paths are named. A step leaves out what is not there.
        Steps that cannot be good for anything, see `recipe.check_chain`.
    """
    for step in recipe.steps:
        for path in sorted(step.leave_out - set(fns.linears)):
            hint = did_you_mean(path, fns.linears)
            raise InputError(f"{step.name}: leave_out names no linear of a block: {path!r}{hint}")
    leaves = check_all(
        lambda path: preview_leaf(recipe, *shapes[path], path),
        {path: shapes[path] for path in fns.linears},
        "every block's ",
    )
    check_chain(recipe)
    return leaves


def preview_leaf(
    recipe: Recipe, d_in: int, d_out: int, path: str | None = None
) -> CompressedLinear:
    """Returns what a recipe makes of one weight, the block's linear at `path`, as shapes.

    Raises:
      InputError: a step refuses the shape.
    """
    w = jax.ShapeDtypeStruct((d_in, d_out), jnp.float32)
    stats = LinearStats.shapes(recipe.needs, d_in, d_out)
    problem = LinearProblem(w, stats, jax.eval_shape(jax.random.key, 0))
    leaf = CompressedLinear(Dense(w))
    for step in recipe.steps:
        if step.scope == "linear":
            leaf, _ = jax.eval_shape(partial(run_linear, step), problem, leaf)
        elif path not in step.leave_out:
            leaf = jax.eval_shape(step.preview, leaf)
    return leaf


def _notes(step: Step, facts: Any) -> list[str]:
    return [] if step.notes is None else list(step.notes(jax.device_get(facts)))


@lru_cache(maxsize=64)
def _jitted(step: Step) -> Callable:
    """Compiles a step once a shape, with its objective before and after."""

    def run(problem: LinearProblem, leaf: CompressedLinear):
        new, facts = run_linear(step, problem, leaf)
        return new, facts, step.objective(problem, leaf), step.objective(problem, new)

    return jax.jit(run)


@jax.jit
def _relative_error(w: jax.Array, leaf: CompressedLinear) -> jax.Array:
    return weight_error(LinearProblem(w, LinearStats(), jax.random.key(0)), leaf)


def check_inputs(x: Any, w: jax.Array) -> jax.Array:
    """Returns what a matrix reads, or says why it cannot be that."""
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[1] != w.shape[0] or not len(x):
        raise InputError(
            f"quantize: x has shape {list(x.shape)}; [tokens, {w.shape[0]}] was wanted for w "
            f"{list(w.shape)}"
        )
    if not bool(jnp.isfinite(x).all()):
        raise InputError("quantize: x holds NaN or Inf; give finite inputs")
    return x
