"""ASER: no more components than the error's spectrum asks for, outlier channels among them.

Zhao et al. 2025, arXiv:2411.07762. With y = x w, G = E[x xᵀ] and T any root, Tᵀ T = G, the
correction of rank r that leaves the least output error is T⁻¹ SVD_r(T E), whose rank is the least r
with Σ_{i<=r} σ_i >= cumulative · Σ σ_i. Before its base is made, the f channels of the largest
E|x_i| · mean_o |w_io| are smoothed: y = (x M⁻¹)(M w) with m_i = E|x_i| / min of the chosen on them
and 1 elsewhere, and their rows of M w go to the correction, so that neither the inputs' range nor a
group of weights is spoilt by them. What the correction has to make up for is then the base's error
and those rows.

No code of the authors was found. Differs from the paper: a Cholesky factor is not needed
(`core.closed_form.find_directions`); m_i, of which the paper says that it is in units of the least
of the chosen, is our reading.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_int, check_number, resolve_rank
from lqec_jax.core.bases import scale_inputs
from lqec_jax.core.closed_form import find_directions, project
from lqec_jax.core.corrections import (
    base_weight,
    check_quantizer,
    describe_quantizer,
    make_correction,
    requantize,
    store,
)
from lqec_jax.core.types import LinearProblem, LinearStep, output_error
from lqec_jax.errors import InputError
from lqec_kernels.formats import CompressedLinear

REFERENCE = "closed form"
OUTLIERS = 32  # the authors', on models whose widths are thousands


def count_components(spectrum: jax.Array, cumulative: float) -> jax.Array:
    """Returns the least r with Σ_{i<=r} σ_i >= cumulative · Σ σ_i, for falling σ."""
    sums = jnp.cumsum(spectrum)
    return jnp.sum(sums < cumulative * sums[-1]) + 1


def find_outliers(w: jax.Array, absmean: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Finds the channels whose inputs and weights are large.

    Returns:
      (bool [d_in], True for `count` channels; m [d_in], at least 1 on them and 1 elsewhere).
    """
    size = absmean * jnp.mean(jnp.abs(w), axis=1)
    _, chosen = jax.lax.top_k(size, count)
    outlier = jnp.zeros(size.shape, bool).at[chosen].set(True)
    least = jnp.min(absmean[chosen])
    smooth = jnp.where(outlier & (least > 0), absmean / jnp.where(least > 0, least, 1.0), 1.0)
    return outlier, smooth


def aser(
    *,
    rank: int | float = 64,
    cumulative: float = 0.9,
    quantizer: LinearStep | None = None,
    outliers: int | None = None,
    dtype: str = "float16",
) -> LinearStep:
    """Makes the step of `qera` that keeps no more components than a rule asks for.

    The rank is reported where it is below the largest. Components beyond it are zero and are
    stored, as layers of one kind are stacked.

    Args:
      rank: the largest, an integer, or a fraction of min(d_in, d_out).
      cumulative: the share of the sum of singular values, in (0, 1]; the authors' is not known.
      quantizer: any method that makes a base of one weight, to be given the smoothed one; the base
        that there is gives way. None leaves it, and smooths nothing.
      outliers: how many channels are smoothed, where there is a quantizer; at most d_in. None is
        the authors' 32, or half of the rank where that is less, as each takes a component of its
        own: a small model at 2 bits and rank 16 has perplexity 12.6, 12.5 and 22.6 with 0, 8 and 32
        of them.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    check_number("aser", "cumulative", cumulative, 1e-6, 1.0)
    if outliers is not None:
        check_int("aser", "outliers", outliers, 0)
    arguments = {"rank": rank, "cumulative": cumulative, "dtype": dtype}

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        spectrum, basis = find_directions(error, problem.stats.gram, r)
        kept = jnp.minimum(count_components(spectrum, cumulative), r)
        a, b = project(error, basis)
        # Only one half becomes zero, so that training can bring the component back.
        a = jnp.where(jnp.arange(r) < kept, a, 0.0)
        return store(a, b, dtype), (kept, r)

    corrected = make_correction(
        "aser", arguments, solve, output_error, "relative output error", frozenset({"gram"}),
        _say_rank,
    )  # fmt: skip
    arguments = {"rank": rank, "cumulative": cumulative, "quantizer": quantizer,
                 "outliers": outliers, "dtype": dtype}  # fmt: skip
    step = dataclasses.replace(corrected, arguments=arguments)
    return step if quantizer is None else _smooth_first(step, quantizer, outliers)


def _smooth_first(corrected: LinearStep, quantizer: LinearStep, outliers: int | None) -> LinearStep:
    """Makes the step that smooths, quantizes, and then corrects."""
    check_quantizer("aser", quantizer)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> tuple:
        w, count = base_weight(problem, leaf), outliers
        if count is None:
            rank = resolve_rank("aser", corrected.arguments["rank"], *w.shape)
            count = min(OUTLIERS, rank // 2)
        if count:
            leaf, w = _smooth(problem, leaf, w, count)
        leaf, quantized = requantize("aser", quantizer, problem, leaf, w)
        leaf, facts = corrected.run(problem, leaf)
        return leaf, (facts, quantized)

    def describe(facts: tuple) -> tuple[str, ...]:
        return (*corrected.notes(facts[0]), *describe_quantizer(quantizer, facts[1]))

    needs = corrected.needs | quantizer.needs | (set() if outliers == 0 else {"absmean"})
    return dataclasses.replace(corrected, run=run, notes=describe, needs=frozenset(needs))


def _smooth(problem: LinearProblem, leaf: CompressedLinear, w: jax.Array, count: int) -> tuple:
    """Returns the leaf whose inputs are smoothed, and w without the outliers' rows."""
    if count > leaf.d_in:
        raise InputError(
            f"aser: outliers={count} is more than d_in={leaf.d_in}; choose at most as many"
        )
    outlier, smooth = find_outliers(w, problem.stats.absmean, count)
    scale = jnp.maximum(1.0 / smooth, jnp.finfo(jnp.float16).tiny).astype(jnp.float16)
    return scale_inputs("aser", leaf, scale), jnp.where(outlier[:, None], 0.0, w)


def _say_rank(facts: tuple) -> tuple[str, ...]:
    kept, rank = map(int, facts)
    return (f"rank: {kept} of {rank} components by the rule",) if kept < rank else ()
