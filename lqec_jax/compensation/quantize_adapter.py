"""Rounded adapters: the factors of every low-rank correction in a few bits.

    â[i, k] = s[g, k] · clip(round(a[i, k] / s[g, k]), -M, M),  s = max |a| of the group / M

Mozaffari et al. 2025, "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation",
arXiv:2410.09615 §3.3: entries of the factors have long tails, for which one scale a group of a
component's inputs, or outputs, is better than one for all. With M = 2^(bits-1) - 1 = 7 and normal
factors a group of 128 loses 1.3 % of each factor's energy.

Reference: Paramathic/slim. Differs: factors are balanced first, where the reference leaves all
singular values in a; ties go to the even level, not towards zero; a group that does not divide a
side becomes that side's largest divisor below it, where the reference pads the rank and asserts.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from lqec_jax.core.arguments import check_int
from lqec_jax.core.closed_form import balance
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_jax.errors import InputError
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, LowRank

REFERENCE = "Paramathic/slim@09a5676 slim/lora.py"


def quantize_adapter(*, bits: int = 4, group_size: int | None = 128) -> LinearStep:
    """Makes the step that rounds the factors of every low-rank correction there is.

    Args:
      bits: 2-8; the authors' is that of the weights, 4.
      group_size: inputs of a, and outputs of b, that share a scale; the largest divisor of a side
        that is not above it. None is one scale a component. The authors' is 128, and 256 in their
        examples.
    """
    check_int("quantize_adapter", "bits", bits, 2, 8)
    if group_size is not None:
        check_int("quantize_adapter", "group_size", group_size, 1)

    def round_factors(correction: Any) -> Any:
        if not isinstance(correction, LowRank):
            return correction
        if correction.pool > 1:
            raise InputError(
                "quantize_adapter: a pooled adapter goes into the base's zero points, where it "
                "takes no bits; put merge() in this step's place, or leave pool out"
            )
        factors = balance(correction.a.astype(jnp.float32), correction.b.astype(jnp.float32))
        return QuantizedLowRank.round(*factors, bits=bits, group_size=group_size)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        if not any(isinstance(c, LowRank) for c in leaf.corrections):
            raise InputError(
                "quantize_adapter: there is no adapter to round; put a step before it that adds "
                "one, such as slim_lora(rank=0.1)"
            )
        return dataclasses.replace(leaf, corrections=tuple(map(round_factors, leaf.corrections)))

    return LinearStep(
        name="quantize_adapter",
        run=run,
        arguments={"bits": bits, "group_size": group_size},
        objective=weight_error,
        objective_name="relative weight error",
    )
