"""SqueezeLLM: each column's own levels, where the loss feels them, and outliers held apart.

Kim et al. 2024, arXiv:2306.07629. Per output column, weighted k-means on the line,

    min over levels l and codes c of Σ_i F_i (w_i - l_{c_i})²,   F = E[(∂ loss / ∂ w)²],

and the largest weights, with those of the largest F, as a sparse correction.

Reference: SqueezeAILab/SqueezeLLM, which runs Lloyd's algorithm. Differs: the clusters of points on
a line are intervals, so dynamic programming finds the best ones; an outlier's value is what the
base lacks there, so that both together are the weight (theirs adds a level near zero to it).
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice, check_int, check_number
from lqec_jax.core.bases import base_target, inner_rms, replace_base
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, channel_error, weight_error
from lqec_jax.errors import InputError
from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import ChannelScale, CompressedLinear
from lqec_kernels.outliers import Outliers

REFERENCE = "SqueezeAILab/SqueezeLLM@0699e18 quantization/nuq.py"

# A column of more inputs is divided into so many cells of equal count, never parted at first.
CELLS = 512
LLOYD_ROUNDS = 30  # that then move the cuts between single points
COLUMNS = 16  # solved at once: 1 MB each
# Weights of a part so small are round-off of the running sums.
LEAST = 1e-6
# Of the outliers, how many are chosen by sensitivity: 0.05 of 0.45 percent in the paper.
SENSITIVE = 1 / 9


def fit_levels(w: jax.Array, weight: jax.Array, bits: int) -> jax.Array:
    """Solves weighted k-means on the line for every column.

    The optimum where d_in <= 512. Above, the optimum over cuts between 512 cells of sorted inputs,
    then Lloyd's rounds over single inputs, which never raise the error. (Ten inputs a cell cost
    less than 0.2 % of the optimum on Gaussian columns.)

    Args:
      w: float32 [d_in, d_out].
      weight: how much each counts, >= 0; a column of zeros counts all alike, as in the reference.
      bits: 2^bits levels.
    Returns:
      float32 [2^bits, d_out], ascending.
    Cost: O(d_out · (d_in log d_in + 2^bits · 512²)).  jit: yes.
    """
    nothing = jnp.sum(weight, axis=0) == 0
    weight = jnp.where(nothing, 1.0, weight)

    def solve(column: tuple[jax.Array, jax.Array]) -> jax.Array:
        return cluster(*column, 2**bits)

    return jax.lax.map(solve, (w.T, weight.T), batch_size=COLUMNS).T


def cluster(x: jax.Array, weight: jax.Array, count: int) -> jax.Array:
    """Returns the ascending means of the best `count` clusters of points x [n] on a line."""
    order = jnp.argsort(x)
    x, weight = x[order], weight[order] / jnp.sum(weight)
    middle = jnp.sum(weight * x)
    centred = x - middle
    # Sums over the points before each: a cluster's are differences of two.
    mass = jnp.append(0.0, jnp.cumsum(weight))
    moment = jnp.append(0.0, jnp.cumsum(weight * centred))
    n = x.size
    cells = min(n, CELLS)
    edges = jnp.arange(cells + 1) * n // cells
    cuts = edges[_cut_best(mass[edges], moment[edges], count)]

    def improve(_, cuts):
        means = _means(centred, mass, moment, cuts)
        between = (means[:-1] + means[1:]) / 2
        inner = jnp.searchsorted(centred, between, side="right")
        return cuts.at[1:-1].set(inner.astype(cuts.dtype))

    rounds = LLOYD_ROUNDS if n > cells else 0
    cuts = jax.lax.fori_loop(0, rounds, improve, cuts)
    return jnp.sort(_means(centred, mass, moment, cuts)) + middle


def _cut_best(mass: jax.Array, moment: jax.Array, count: int) -> jax.Array:
    """Returns the `count` + 1 cuts that explain most: max Σ moment² / mass over the intervals.

    What intervals explain and their squared error add up to the same for all cuts. Intervals may be
    empty. best[t, i] is the most that t intervals explain of all before cut i.
    """
    apart, moments = mass[None] - mass[:, None], moment[None] - moment[:, None]
    cuts = jnp.arange(mass.size)
    explained = jnp.where(apart > LEAST, jnp.square(moments) / jnp.maximum(apart, LEAST), 0.0)
    explained = jnp.where(cuts[None] >= cuts[:, None], explained, -jnp.inf)  # from row to column

    def add_interval(best, _):
        return jnp.max(best[:, None] + explained, axis=0), best

    # Row t of `bests` is for t + 1 intervals.
    _, bests = jax.lax.scan(add_interval, explained[0], length=count - 1)

    def step_back(cut, best):
        before = jnp.argmax(best + explained[:, cut])
        return before, before

    end = jnp.asarray(mass.size - 1)
    _, inner = jax.lax.scan(step_back, end, bests, reverse=True)
    return jnp.concatenate([jnp.zeros(1, inner.dtype), inner, end[None].astype(inner.dtype)])


def _means(x: jax.Array, mass: jax.Array, moment: jax.Array, cuts: jax.Array) -> jax.Array:
    """Returns each interval's weighted mean; its first point where it has no weight to speak of."""
    apart = mass[cuts[1:]] - mass[cuts[:-1]]
    moments = moment[cuts[1:]] - moment[cuts[:-1]]
    first = x[jnp.minimum(cuts[:-1], x.size - 1)]
    mean = jnp.where(apart > LEAST, moments / jnp.maximum(apart, LEAST), first)
    return jnp.clip(mean, x[0], x[-1])


def quantize(w: jax.Array, weight: jax.Array, bits: int, *, dtype=jnp.float16) -> Codebook:
    """Takes every weight to the nearest of its column's levels, as they are stored."""
    levels = store_number(fit_levels(w, weight, bits), dtype)
    stored = levels.astype(jnp.float32)
    between = (stored[:-1] + stored[1:]) / 2

    def count_below(code, codes):
        return codes + (w > between[code]).astype(jnp.uint8)

    codes = jax.lax.fori_loop(0, 2**bits - 1, count_below, jnp.zeros(w.shape, jnp.uint8))
    return Codebook.from_levels(codes, levels, bits=bits)


def find_outliers(w: jax.Array, weight: jax.Array | None, fraction: float) -> jax.Array:
    """Returns the places of the outliers, uint32 [k] ascending, row · d_out + column.

    A ninth are those of the largest weight, where there are weights; the others the largest |w|.
    """
    count = max(1, round(fraction * w.size))
    sensitive = 0 if weight is None else round(SENSITIVE * count)
    size = jnp.abs(w).reshape(-1)
    chosen = jnp.zeros(0, jnp.int32)
    if sensitive:
        _, chosen = jax.lax.top_k(weight.reshape(-1), sensitive)
        size = size.at[chosen].set(-1.0)
    _, large = jax.lax.top_k(size, count - sensitive)
    return jnp.sort(jnp.concatenate([chosen, large])).astype(jnp.uint32)


def fisher_error(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns Σ F (w - ŵ)² / Σ F w², the loss's relative second-order rise, F as it is diagonal."""
    fisher = problem.stats.fisher
    error = jnp.sum(fisher * jnp.square(problem.w - leaf.dense()))
    whole = jnp.sum(fisher * jnp.square(problem.w))
    return error / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


OBJECTIVES = {
    "fisher": (fisher_error, "relative Fisher error", frozenset({"fisher"})),
    "rms": (channel_error, "relative channel error", frozenset({"rms"})),
    "ones": (weight_error, "relative weight error", frozenset()),
}


def squeezellm(
    *,
    bits: int = 3,
    weights: str = "fisher",
    outliers: float = 0.0045,
    level_dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base by levels of each column, and adds outliers.

    Args:
      bits: 1-4; the authors' are 3 and 4.
      weights: what an error counts: 'fisher', the mean square gradient of the loss; 'rms', the mean
        square of the input; 'ones', all alike, which needs no data.
      outliers: fraction of the weights that is kept apart, at 48 bits each; 0.0045 is the authors'
        dense-and-sparse number, 0 the dense-only one.
      level_dtype: 'float16' or 'float32', of the levels.
    """
    check_int("squeezellm", "bits", bits, 1, 4)
    check_choice("squeezellm", "weights", weights, OBJECTIVES)
    check_number("squeezellm", "outliers", outliers, 0, 0.5)
    check_choice("squeezellm", "level_dtype", level_dtype, ("float16", "float32"))
    objective, objective_name, needs = OBJECTIVES[weights]

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        w = base_target(leaf)
        weight = _weigh(weights, problem, leaf)
        counted = jnp.where(w == 0, 0.0, jnp.ones_like(w) if weight is None else weight)
        places = None
        if outliers:
            places = find_outliers(w, weight if weights == "fisher" else None, outliers)
            counted = counted.at[places // w.shape[1], places % w.shape[1]].set(0.0)
        new = replace_base(leaf, quantize(w, counted, bits, dtype=jnp.dtype(level_dtype)))
        return new if places is None else _add_outliers(new, w, places)

    return LinearStep(
        name="squeezellm",
        run=run,
        arguments={"bits": bits, "weights": weights, "outliers": outliers,
                   "level_dtype": level_dtype},
        needs=needs,
        objective=objective,
        objective_name=objective_name,
    )  # fmt: skip


def _weigh(weights: str, problem: LinearProblem, leaf: CompressedLinear) -> jax.Array | None:
    """Returns what an error of each weight of the base counts, [d_in, d_out]; None: all alike."""
    if weights == "ones":
        return None
    if weights == "rms":
        square = jnp.square(inner_rms("squeezellm", problem, leaf))
        return jnp.broadcast_to(square[:, None], leaf.base.dense().shape)
    rows, columns = _sides(leaf, "the Fisher weights")
    return problem.stats.fisher * jnp.square(rows) * jnp.square(columns)


def _sides(leaf: CompressedLinear, what: str) -> tuple[jax.Array, jax.Array]:
    """Returns the factors [d_in, 1] and [d_out] between an entry of the base and the weight's.

    Raises:
      InputError: a transform mixes entries.
    """
    factors = []
    for transform in (leaf.input_transform, leaf.output_transform):
        if not isinstance(transform, ChannelScale | None):
            raise InputError(
                f"squeezellm: {what} are of single weights, which a {type(transform).__name__} "
                "transform mixes; leave the rotation out, or use weights='ones', outliers=0"
            )
        factors.append(jnp.ones(()) if transform is None else transform.scale.astype(jnp.float32))
    rows, columns = factors
    return rows[..., None], columns


def _add_outliers(leaf: CompressedLinear, w: jax.Array, places: jax.Array) -> CompressedLinear:
    """Adds the correction that makes the weight exact at the outliers, to float16 of the rest."""
    rows, columns = _sides(leaf, "outliers")
    missing = (rows * (w - leaf.base.dense()) * columns).reshape(-1)[places]
    correction = Outliers(places, store_number(missing, jnp.float16), *w.shape)
    return replace(leaf, corrections=(*leaf.corrections, correction))
