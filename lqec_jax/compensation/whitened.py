"""The best rank-r correction of the weight error as inputs see it: one closed form, many names.

    min over a, b of tr(Δᵀ G Δ),  Δ = w - ŵ - a b,  solved by `core.closed_form.reduce_rank`,

and the methods of this file are what they take for G:

    naive_lora    1                      SLiM's name for the plain SVD, which LQER and LoRC are
    l2qer         diag(E|x_i|)²          Zhang et al. 2024, arXiv:2402.02446
    slim_lora     diag(s_i)², s shifted  Mozaffari et al. 2025, arXiv:2410.09615
    qera_approx   diag(E[x_i²])          Zhang et al. 2025, arXiv:2410.06040, for such G
    qera          E[x xᵀ]                the same, for any
    eora          E[x xᵀ]                Liu et al. 2024, arXiv:2410.21271
    aser          E[x xᵀ]                Zhao et al. 2025, arXiv:2411.07762, and a rule for r
    lq_lora       diag(mean_o F_io)      Guo et al. 2024, arXiv:2311.12023, outputs weighed too

QERA takes the symmetric root of G, EoRA Λ^½ Qᵀ of its eigendecomposition G = Q Λ Qᵀ, ASER a
Cholesky factor; the solution is the same for every root: `qera` and `eora` give the same bytes.

Differs from ChengZhang-98/QERA and the others' code: no root and no inverse of G, hence no damping,
no clamped eigenvalues and no fallback for channels without inputs; factors are balanced, where
those put all singular values into one; sums are float32 over all tokens, where EoRA's forgets its
first windows and L2QER takes the largest of the batches' means.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice, check_int, check_number, check_rank, resolve_rank
from lqec_jax.core.closed_form import (
    balance,
    find_directions,
    project,
    reduce_rank,
    sketch_directions,
    truncate,
)
from lqec_jax.core.types import LinearProblem, LinearStats, Step, output_error, weight_error
from lqec_kernels.formats import CompressedLinear, LowRank

REFERENCE = "closed form"
# Smallest weight of an error in L2QER and LQ-LoRA, in units of the mean, lest an input or output
# be left to chance; L2QER's authors have it in units of the inputs.
LEAST = 1e-4


def weigh_heuristic(stats: LinearStats) -> jax.Array:
    """Returns L2QER's weights of squared errors, E|x_i|² of at least a little, [d_in]."""
    return jnp.square(jnp.maximum(stats.absmean, LEAST * jnp.mean(stats.absmean)))


def weigh_saliency(stats: LinearStats) -> jax.Array:
    """Returns SLiM's weights of squared errors, s_i², [d_in].

    s_i² = E[x_i²] + min E[x²] as its code has it, or s_i = E|x_i| + min E|x| as its paper has it;
    the minimum is over the inputs that are not zero, and keeps s from vanishing.
    """
    if stats.rms is None:
        return jnp.square(_shift(stats.absmean))
    return _shift(jnp.square(stats.rms))


def weigh_channels(stats: LinearStats) -> jax.Array:
    """Returns E[x_i²], [d_in]."""
    return jnp.square(stats.rms)


def _shift(size: jax.Array) -> jax.Array:
    least = jnp.min(jnp.where(size > 0, size, jnp.inf))
    return size + jnp.where(jnp.isfinite(least), least, 0.0)


def weighted_error(weigh: Callable) -> Callable:
    """Makes the objective Σ g_i Δ_io² / Σ g_i w_io², g = weigh(stats)."""

    def objective(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
        root = jnp.sqrt(weigh(problem.stats))[:, None]
        error = jnp.sum(jnp.square(root * (problem.w - leaf.dense())))
        whole = jnp.sum(jnp.square(root * problem.w))
        return error / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)

    return objective


def naive_lora(*, rank: int | float = 0.1, dtype: str = "float16") -> Step:
    """Makes the step that adds the rank-r approximation of what is missing, blind to inputs.

    As `svd`, with the rank that SLiM compares it at.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out).
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        return *truncate(error, r), ()

    return _make(
        "naive_lora",
        {"rank": rank, "dtype": dtype},
        solve,
        (),
        weight_error,
        "relative weight error",
    )


def l2qer(*, rank: int | float = 64, dtype: str = "float16") -> Step:
    """Makes the step whose correction weighs each input by its mean magnitude.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 256 at 2.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    return _make(
        "l2qer",
        {"rank": rank, "dtype": dtype},
        _weigh_inputs(weigh_heuristic),
        ("absmean",),
        weighted_error(weigh_heuristic),
        "relative error weighted by E|x|²",
    )


def slim_lora(*, rank: int | float = 0.1, saliency: str = "rms", dtype: str = "float16") -> Step:
    """Makes the step whose correction weighs each input by SLiM's saliency.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' code rounds 0.1 up to a
        multiple of its tile, 128 or 256.
      saliency: 'rms', as the authors' code, or 'absmean', as their paper; see `weigh_saliency`.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    check_choice("slim_lora", "saliency", saliency, ("rms", "absmean"))
    arguments = {"rank": rank, "saliency": saliency, "dtype": dtype}
    return _make(
        "slim_lora",
        arguments,
        _weigh_inputs(weigh_saliency),
        (saliency,),
        weighted_error(weigh_saliency),
        "saliency error",
    )


def qera_approx(*, rank: int | float = 64, dtype: str = "float16") -> Step:
    """Makes the step whose correction is the best where inputs are uncorrelated.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 64 at 3.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    return _make(
        "qera_approx",
        {"rank": rank, "dtype": dtype},
        _weigh_inputs(weigh_channels),
        ("rms",),
        weighted_error(weigh_channels),
        "relative channel error",
    )


def qera(*, rank: int | float = 64, passes: int | None = None, dtype: str = "float16") -> Step:
    """Makes the step whose correction leaves the least output error of its rank.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 64 at 3.
      passes: finds the components by so many passes of a random sketch, in place of an eigh of
        order min(d_in, d_out); its error is stated at `core.closed_form.sketch_directions`.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    Cost: of `reduce_rank`; fewer tokens than about eight times d_in overfit them.
    """
    return _make_exact("qera", rank, passes, dtype)


def eora(*, rank: int | float = 64, passes: int | None = None, dtype: str = "float16") -> Step:
    """Makes the step of `qera` under the name of its solution in the gram's eigenspace.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 128, or 512.
      passes: finds the components by so many passes of a random sketch, in place of an eigh of
        order min(d_in, d_out); its error is stated at `core.closed_form.sketch_directions`.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    return _make_exact("eora", rank, passes, dtype)


def _make_exact(name: str, rank: int | float, passes: int | None, dtype: str) -> Step:
    """Makes the step for a whole gram, under either name."""
    if passes is not None:
        check_int(name, "passes", passes, 0)

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        gram = problem.stats.gram
        if passes is None:
            return *reduce_rank(error, gram, r), ()
        return *project(error, sketch_directions(error, gram, r, problem.key, passes)[1]), ()

    arguments = {"rank": rank, "passes": passes, "dtype": dtype}
    return _make(name, arguments, solve, ("gram",), output_error, "relative output error")


def aser(*, rank: int | float = 64, cumulative: float = 0.9, dtype: str = "float16") -> Step:
    """Makes the step of `qera` that keeps no more components than a rule asks for.

    The rank of a weight is the least r with Σ_{i<=r} σ_i >= cumulative · Σ σ_i, σ_i being those of
    the whitened error; it is reported where it is below the largest. Components beyond it are zero
    and are stored, as layers of one kind are stacked.

    Differs from the paper: its smoothing takes the largest channels out of the base before that is
    quantized, for the sake of quantized inputs; a correction comes after, and finds them there.

    Args:
      rank: the largest, an integer, or a fraction of min(d_in, d_out).
      cumulative: the share of the sum of singular values, in (0, 1]; the authors' is not known.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    check_number("aser", "cumulative", cumulative, 1e-6, 1.0)

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        spectrum, basis = find_directions(error, problem.stats.gram, r)
        kept = jnp.minimum(count_components(spectrum, cumulative), r)
        a, b = project(error, basis)
        # Only one half becomes zero, so that training can bring the component back.
        return jnp.where(jnp.arange(r) < kept, a, 0.0), b, (kept, r)

    arguments = {"rank": rank, "cumulative": cumulative, "dtype": dtype}
    return _make(
        "aser", arguments, solve, ("gram",), output_error, "relative output error", _say_rank
    )


def _say_rank(facts: tuple) -> tuple[str, ...]:
    kept, rank = map(int, facts)
    return (f"rank: {kept} of {rank} components by the rule",) if kept < rank else ()


def count_components(spectrum: jax.Array, cumulative: float) -> jax.Array:
    """Returns the least r with Σ_{i<=r} σ_i >= cumulative · Σ σ_i, for falling σ."""
    sums = jnp.cumsum(spectrum)
    return jnp.sum(sums < cumulative * sums[-1]) + 1


def lq_lora(*, rank: int | float = 64, dtype: str = "float16") -> Step:
    """Makes the step whose correction weighs inputs and outputs by the loss's curvature.

    Minimizes Σ r_i² Δ_io² c_o² with r_i² = mean_o F_io, c_o² = mean_i F_io, F the diagonal Fisher
    information: exact if F has rank one, where the sum over F itself is hard. The paper alternates
    this with its quantizer; this is one such step on the base that there is.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 64.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        rows, columns = weigh_sides(problem.stats)
        a, b = reduce_rank(error * columns, jnp.square(rows), r)
        return *balance(a, b / columns), ()

    return _make(
        "lq_lora",
        {"rank": rank, "dtype": dtype},
        solve,
        ("fisher",),
        sides_error,
        "relative error by rank-one Fisher",
    )


def weigh_sides(stats: LinearStats) -> tuple[jax.Array, jax.Array]:
    """Returns LQ-LoRA's weights of errors: (r [d_in], c [d_out]), each at least a little.

    Both are roots of means over the other side, in units of the root of their mean; ones where the
    Fisher information is zero.
    """
    sides = (jnp.mean(stats.fisher, axis=1), jnp.mean(stats.fisher, axis=0))
    mean = jnp.mean(sides[0])
    unit = jnp.where(mean > 0, mean, 1.0)
    rows, columns = (jnp.where(mean > 0, jnp.sqrt(side / unit), 1.0) for side in sides)
    return jnp.maximum(rows, LEAST), jnp.maximum(columns, LEAST)


def sides_error(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns Σ (r_i Δ_io c_o)² / Σ (r_i w_io c_o)², what `lq_lora` lowers."""
    rows, columns = weigh_sides(problem.stats)
    error, whole = (
        jnp.sum(jnp.square(rows[:, None] * w * columns))
        for w in (problem.w - leaf.dense(), problem.w)
    )
    return error / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def _weigh_inputs(weigh: Callable) -> Callable:
    """Makes the solver for which inputs count weigh(stats), [d_in]."""

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        return *reduce_rank(error, weigh(problem.stats), r), ()

    return solve


def _make(
    name: str,
    arguments: Mapping[str, Any],
    solve: Callable,
    needs: tuple[str, ...],
    objective: Callable,
    objective_name: str,
    notes: Callable | None = None,
) -> Step:
    """Makes a step of this file from (error, problem, rank) -> (a, b, facts)."""
    rank, dtype = arguments["rank"], arguments["dtype"]
    check_rank(name, rank)
    check_choice(name, "dtype", dtype, ("float16", "float32"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> Any:
        error = problem.w - leaf.dense()
        a, b, facts = solve(error, problem, resolve_rank(name, rank, *error.shape))
        correction = LowRank(a.astype(jnp.dtype(dtype)), b.astype(jnp.dtype(dtype)))
        new = dataclasses.replace(leaf, corrections=(*leaf.corrections, correction))
        return new if notes is None else (new, facts)

    return Step(
        name=name,
        scope="linear",
        run=run,
        arguments=arguments,
        needs=frozenset(needs),
        notes=notes,
        objective=objective,
        objective_name=objective_name,
    )
