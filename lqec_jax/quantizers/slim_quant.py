"""SLiM-Quant: one scale for a whole matrix, clipped where its error is least.

Mozaffari et al. 2025, "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation",
arXiv:2410.09615 §3.1. Symmetric, levels s·{-2^(b-1), .., 2^(b-1) - 1}, s = α / (2^(b-1) - 1); the
clip α minimizes ||w - ŵ||², here measured on the weight itself among 4096 clips.

Reference: Paramathic/slim. Its default instead integrates an error over the histogram of |w|, with
the rounding taken for a floor to steps of α/2^b: `search='integral'`. Differs: the exact search
looks at 16 clips, then twice at the sixteenths beside the best, 78 measurements in place of 830;
with boosted channels, errors count by the mean square of their input, or the clip would cut off the
very weights that were enlarged (the reference takes the clip of the weight before that).
"""

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice, check_int, check_number
from lqec_jax.core.bases import base_target, inner_rms, replace_base, scale_inputs
from lqec_jax.core.types import LinearProblem, LinearStep, channel_error, weight_error
from lqec_kernels.formats import Affine, CompressedLinear

REFERENCE = "Paramathic/slim@09a5676 slim/quantization/quantization.py"

STEPS = 16  # clips are multiples of max|w| / STEPS³
BOOST = 2.0  # what the most salient channels are multiplied by
COARSE = 10  # parts into which the integral's bins are cut first


def quantize(w: jax.Array, bits: int, clip: jax.Array) -> Affine:
    """Rounds a weight to 2^b levels of one step.

    u = clip(round(w / s), -2^(b-1), 2^(b-1) - 1) + 2^(b-1),  s = α / (2^(b-1) - 1)

    Args:
      w: float32 [d_in, d_out].
      bits: 2-8.
      clip: α, in units of the weight; > 0.
    """
    half = 2 ** (bits - 1)
    scale = (clip / (half - 1)).astype(jnp.float32)
    codes = jnp.clip(jnp.round(w / scale), -half, half - 1) + half
    scales = scale.reshape(1, 1)
    return Affine.from_codes(
        codes.astype(jnp.uint8), scales, None, bits=bits, group_size=w.shape[0]
    )


def measure(w: jax.Array, bits: int, clip: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns Σ weight (w - ŵ)² for a clip."""
    half = 2 ** (bits - 1)
    scale = clip / (half - 1)
    rounded = scale * jnp.clip(jnp.round(w / scale), -half, half - 1)
    return jnp.sum(weight * jnp.square(w - rounded))


def search_exactly(w: jax.Array, bits: int, weight: jax.Array) -> jax.Array:
    """Returns argmin over α of Σ weight (w - ŵ(α))² among max|w| · {1/4096, .., 1}.

    Args:
      weight: how much an input channel counts, [d_in, 1].
    Cost: 78 roundings of w.  jit: yes.
    """
    largest = jnp.max(jnp.abs(w))
    unit = jnp.where(largest > 0, largest, 1.0) / STEPS**3

    def best_of(steps: jax.Array) -> jax.Array:
        errors = jax.lax.map(lambda step: measure(w, bits, step * unit, weight), steps)
        return steps[jnp.argmin(errors)]

    best = best_of(jnp.arange(1, STEPS + 1, dtype=jnp.float32) * STEPS**2)
    for spacing in (STEPS, 1):
        beside = best + spacing * jnp.arange(1 - STEPS, STEPS, dtype=jnp.float32)
        best = best_of(jnp.clip(beside, 1, STEPS**3))
    return best * unit


def search_by_integral(w: jax.Array, bits: int, weight: jax.Array) -> jax.Array:
    """Returns the clip of the least integrated error over the histogram of |w|.

    E(α) = Σ_{x < α} f(x) (x - ⌊x / δ⌋ δ)² + Σ_{x >= α} f(x) (x - α)²,  δ = α / 2^b

    over the centres of clip(size/1000, 512, 20000) bins, first every tenth of them; f adds up the
    weight of what lies in a bin.
    """
    bins = min(max(w.size // 1000, 512), 20000)
    size = jnp.abs(w).reshape(-1)
    largest = jnp.max(size)
    width = jnp.where(largest > 0, largest, 1.0) / bins
    place = jnp.minimum(jnp.floor(size / width).astype(jnp.int32), bins - 1)
    density = jnp.zeros(bins).at[place].add(jnp.broadcast_to(weight, w.shape).reshape(-1))
    centres = (jnp.arange(bins) + 0.5) * width

    def integrate(index: jax.Array) -> jax.Array:
        clip = centres[index]
        delta = clip / 2**bits
        floored = jnp.floor(centres / delta) * delta
        there = jnp.where(jnp.arange(bins) < index, floored, clip)
        return jnp.sum(density * jnp.square(centres - there))

    def best_of(indices: jax.Array) -> jax.Array:
        return indices[jnp.argmin(jax.lax.map(integrate, indices))]

    tenth = bins // COARSE
    best = best_of(jnp.minimum(jnp.arange(COARSE + 1) * tenth, bins - 1))
    return centres[best_of(jnp.clip(best + jnp.arange(-tenth, tenth), 0, bins - 1))]


def find_salient(w: jax.Array, rms: jax.Array, fraction: float) -> jax.Array:
    """Returns 2 for the channels with the largest rms · Σ|w|, else 1; [d_in]."""
    count = max(1, round(fraction * w.shape[0]))
    _, channels = jax.lax.top_k(rms * jnp.sum(jnp.abs(w), axis=1), count)
    return jnp.ones(w.shape[0]).at[channels].set(BOOST)


SEARCHES = {"exact": search_exactly, "integral": search_by_integral}


def slim_quant(*, bits: int = 4, search: str = "exact", boost: float = 0.0) -> LinearStep:
    """Makes the step that replaces the base by one uniform grid for all of it.

    Args:
      bits: 2-8.
      search: 'exact' measures the error of every clip it looks at; 'integral' is the authors'
        faster estimate, made from a histogram.
      boost: SLiM-Quant^O: this fraction of the input channels, those of the largest rms · Σ|w|, is
        doubled before the rounding and halved in the input, and errors count by the mean square of
        their input; 0.01 is the authors' number. 0 needs no data.
    """
    check_int("slim_quant", "bits", bits, 2, 8)
    check_choice("slim_quant", "search", search, SEARCHES)
    check_number("slim_quant", "boost", boost, 0, 1)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        w, weight = base_target(leaf), jnp.ones((leaf.d_in, 1))
        if boost:
            rms = inner_rms("slim_quant", problem, leaf)
            salient = find_salient(w, rms, boost)
            leaf = scale_inputs("slim_quant", leaf, (1 / salient).astype(jnp.float16))
            w, weight = salient[:, None] * w, jnp.square(rms / salient)[:, None]
        return replace_base(leaf, quantize(w, bits, SEARCHES[search](w, bits, weight)))

    return LinearStep(
        name="slim_quant",
        run=run,
        arguments={"bits": bits, "search": search, "boost": boost},
        needs=frozenset({"rms"}) if boost else frozenset(),
        objective=channel_error if boost else weight_error,
        objective_name="relative channel error" if boost else "relative weight error",
    )
