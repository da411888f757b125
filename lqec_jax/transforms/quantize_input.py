"""Quantized inputs: what a linear reads, rounded to 8 bits or fewer, weights left as they are.

    y = x̂ W + Σ correction(x̂),   x̂ = s · round(x / s),   s = max |x| / M

Mozaffari et al. 2025, "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation",
arXiv:2410.09615, whose table 5 asks what 8-bit floating inputs cost. Emulated: x̂ has x's own dtype,
and what is measured is the loss of such inputs, not their speed. Training goes straight through.

Reference: Paramathic/slim. Differs: its scale of a float is (M - 1) / max |x|, here the largest
magnitude is the largest number; it takes e5m2 for tensors that reach 488, which scaling makes
needless (`format='fp8_e5m2'` is that format for all); 'tensor' is a window, which is what it is
where windows run one at a time, so that no window's answer depends on another's.
"""

import dataclasses

from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_jax.errors import InputError
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.inputs import FLOATS, FORMATS, SPANS, InputGrid

REFERENCE = "Paramathic/slim@09a5676 slim/quantization/quantization.py"


def quantize_input(*, bits: int = 8, format: str = "fp8", per: str | None = None) -> LinearStep:
    """Makes the step after which a linear reads rounded inputs.

    Statistics of later steps are still those of exact inputs to the linear, which come through
    rounded ones of the linears before it.

    Args:
      bits: 8; 2-8 for 'int'.
      format: 'fp8' (e4m3), 'fp8_e5m2', or 'int', which is symmetric.
      per: a scale for each 'tensor', one window's, or each 'token'. None is the authors' choice,
        'tensor' for floats and 'token' for integers.
    """
    check_choice("quantize_input", "format", format, FORMATS)
    check_choice("quantize_input", "per", per, (None, *SPANS))
    check_int("quantize_input", "bits", bits, 2, 8)
    if format in FLOATS and bits != 8:
        raise InputError(
            f"quantize_input: bits={bits}, and format={format!r} has 8; leave bits out, or take "
            "format='int'"
        )
    grid = InputGrid(format, bits, per or ("tensor" if format in FLOATS else "token"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        return dataclasses.replace(leaf, input_grid=grid)

    return LinearStep(
        name="quantize_input",
        run=run,
        arguments={"bits": bits, "format": format, "per": grid.per},
        objective=weight_error,
        objective_name="relative weight error, which inputs do not change",
    )
