"""The best rank-r correction of the error that the inputs see, and the names it has.

With y = x w and Δ = w - ŵ - a b, every method here minimizes Σ_oij Δ_io G_ij Δ_jo: what inputs of
second moments G make of the error. All are one closed form, `core.closed_form.reduce_rank`, and
differ in what they take for G:

    l2qer         diag(E|x_i|)²          Zhang et al. 2024, arXiv:2402.02446
    slim_lora     diag(s_i)², s shifted  Mozaffari et al. 2025, arXiv:2410.09615
    qera_approx   diag(E[x_i²])          Zhang et al. 2025, arXiv:2410.06040, for such G
    qera          E[x xᵀ]                the same, for any
    eora          E[x xᵀ]                Liu et al. 2024, arXiv:2410.21271

(1 gives `svd`; `aser` and `caldera` take E[x xᵀ] too.) QERA takes the symmetric root of G, EoRA
Λ^½ Qᵀ of its eigendecomposition G = Q Λ Qᵀ; the solution is the same for every root: `qera` and
`eora` give the same bytes.

Differs from ChengZhang-98/QERA and the others' code: no root and no inverse of G, hence no damping,
no clamped eigenvalues and no fallback for channels without inputs; factors are balanced, where
those put all singular values into one; sums are float32 over all tokens, where EoRA's forgets its
first windows and L2QER takes the largest of the batches' means; the least saliency is that of the
inputs that are seen, where SLiM's code counts one that never is as 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.core.closed_form import project, reduce_rank, sketch_directions
from lqec_jax.core.corrections import (
    base_weight,
    check_quantizer,
    describe_quantizer,
    make_correction,
    requantize,
    store,
)
from lqec_jax.core.types import LinearProblem, LinearStats, LinearStep, output_error
from lqec_kernels.formats import CompressedLinear

REFERENCE = "closed form"
# Smallest weight of an error in L2QER, in units of the mean, lest an input be left to chance; its
# authors have it in units of the inputs.
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


def l2qer(*, rank: int | float = 64, dtype: str = "float16") -> LinearStep:
    """Makes the step whose correction weighs each input by its mean magnitude.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 256 at 2.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    arguments = {"rank": rank, "dtype": dtype}
    words = "relative error weighted by E|x|²"
    return _make_diagonal("l2qer", arguments, weigh_heuristic, "absmean", words)


def slim_lora(
    *,
    rank: int | float = 0.1,
    saliency: str = "rms",
    requantize: LinearStep | None = None,
    dtype: str = "float16",
) -> LinearStep:
    """Makes the step whose correction weighs each input by SLiM's saliency.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' code rounds 0.1 up to a
        multiple of its tile, 128 or 256.
      saliency: 'rms', as the authors' code, or 'absmean', as their paper; see `weigh_saliency`.
      requantize: a quantizer, such as slim_quant(bits=4), that then rounds what the adapter leaves,
        with the zeros that there are: base = q(mask(w - a b)), as the authors' code deploys it.
        None keeps the base that the adapter was made for, as their paper.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    check_choice("slim_lora", "saliency", saliency, ("rms", "absmean"))
    arguments = {"rank": rank, "saliency": saliency, "requantize": requantize, "dtype": dtype}
    step = _make_diagonal("slim_lora", arguments, weigh_saliency, saliency, "saliency error")
    return step if requantize is None else _round_again(step, requantize)


def _round_again(step: LinearStep, quantizer: LinearStep) -> LinearStep:
    """Makes the step after which the base is rounded anew, near what the correction leaves."""
    check_quantizer(step.name, quantizer)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> tuple:
        leaf = step.run(problem, leaf)
        return requantize(step.name, quantizer, problem, leaf, base_weight(problem, leaf))

    return replace(
        step,
        run=run,
        needs=step.needs | quantizer.needs,
        notes=partial(describe_quantizer, quantizer),
    )


def qera_approx(*, rank: int | float = 64, dtype: str = "float16") -> LinearStep:
    """Makes the step whose correction is the best where inputs are uncorrelated.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 64 at 3.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    arguments = {"rank": rank, "dtype": dtype}
    words = "relative channel error"
    return _make_diagonal("qera_approx", arguments, weigh_channels, "rms", words)


def qera(
    *, rank: int | float = 64, passes: int | None = None, dtype: str = "float16"
) -> LinearStep:
    """Makes the step whose correction leaves the least output error of its rank.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 64 at 3.
      passes: finds the components by so many passes of a random sketch, in place of an eigh of
        order min(d_in, d_out); its error is stated at `core.closed_form.sketch_directions`.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    Cost: of `reduce_rank`; fewer tokens than about eight times d_in overfit them.
    """
    return _make_whole("qera", {"rank": rank, "passes": passes, "dtype": dtype})


def eora(
    *, rank: int | float = 64, passes: int | None = None, dtype: str = "float16"
) -> LinearStep:
    """Makes the step of `qera` under the name of its solution in the gram's eigenspace.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 128, or 512.
      passes: finds the components by so many passes of a random sketch, in place of an eigh of
        order min(d_in, d_out); its error is stated at `core.closed_form.sketch_directions`.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    return _make_whole("eora", {"rank": rank, "passes": passes, "dtype": dtype})


def _make_diagonal(
    name: str, arguments: Mapping[str, Any], weigh: Callable, need: str, objective_name: str
) -> LinearStep:
    """Makes the step for which inputs count weigh(stats), [d_in], one by one."""

    def solve(error: jax.Array, problem: LinearProblem, rank: int) -> tuple:
        factors = reduce_rank(error, weigh(problem.stats), rank)
        return store(*factors, arguments["dtype"]), ()

    objective = weighted_error(weigh)
    return make_correction(name, arguments, solve, objective, objective_name, frozenset({need}))


def _make_whole(name: str, arguments: Mapping[str, Any]) -> LinearStep:
    """Makes the step for a whole gram."""
    passes = arguments["passes"]
    if passes is not None:
        check_int(name, "passes", passes, 0)

    def solve(error: jax.Array, problem: LinearProblem, rank: int) -> tuple:
        gram = problem.stats.gram
        if passes is None:
            return store(*reduce_rank(error, gram, rank), arguments["dtype"]), ()
        basis = sketch_directions(error, gram, rank, problem.key, passes)[1]
        return store(*project(error, basis), arguments["dtype"]), ()

    words = "relative output error"
    return make_correction(name, arguments, solve, output_error, words, frozenset({"gram"}))
