"""A randomized Hadamard rotation on either side of a weight, for whatever quantizer follows.

Chee et al. 2023, arXiv:2307.13304 and Tseng et al. 2024, arXiv:2402.04396 §3: with random signs S
and an orthonormal Hadamard matrix H the base is Hᵀ S w S H, whose entries are near normal and none
of them large; the inputs are turned while the model runs, the weight is never turned back.

Reference: closed form. The matrices are `lqec_kernels.hadamard`'s; a width of which there is none
is rotated in the largest equal blocks of which there is one.
"""

import jax

from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.core.rotations import check_block, largest_block, rotate_inputs, rotate_outputs
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_jax.errors import InputError
from lqec_kernels.formats import CompressedLinear

REFERENCE = "closed form"


def hadamard(*, input: bool = True, output: bool = False, block: int | None = None) -> LinearStep:
    """Makes the step that rotates a dense weight and changes nothing else of it.

    Args:
      input: rotate d_in.
      output: rotate d_out.
      block: channels that are mixed with one another; None for all, or where no matrix is so large
        for the largest equal parts. A power of two times a small number costs least.
    Example:
      >>> lqec.quantize(w, "hadamard() | gptq(bits=2, group_size=32)", x=x)
    """
    check_choice("hadamard", "input", input, (True, False))
    check_choice("hadamard", "output", output, (True, False))
    if block is not None:
        check_int("hadamard", "block", block, 2)
    if not (input or output):
        raise InputError("hadamard: input=False and output=False leave nothing; set one to True")

    def find_block(side: str, size: int) -> int:
        if block is None:
            return largest_block("hadamard", side, size)
        return check_block("hadamard", side, size, block)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        input_key, output_key = jax.random.split(problem.key)
        if input:
            leaf = rotate_inputs("hadamard", leaf, input_key, find_block("d_in", leaf.d_in))
        if output:
            leaf = rotate_outputs("hadamard", leaf, output_key, find_block("d_out", leaf.d_out))
        return leaf

    return LinearStep(
        name="hadamard",
        run=run,
        arguments={"input": input, "output": output, "block": block},
        objective=weight_error,
        objective_name="relative weight error",
    )
