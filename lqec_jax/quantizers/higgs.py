"""HIGGS: rotate a weight until it is normal, then round to the best grid for normal vectors.

Malinovskii et al. 2024, arXiv:2411.17525. In blocks of the inputs w = Hᵀ S w' is near N(0, s²),
s its rms, and w'/s is cut into p-vectors, each rounded to the nearest of 2^(p·bits) points that
are optimal for N(0, I_p). So ||w - ŵ||² / ||w||² is the grid's distortion whatever the weight, on
which the paper's linearity theorem rests (a block of few large weights is flatter than normal when
turned, and its error some percent lower):

    bits          2         3         4
    p = 1     0.11748   0.03455   0.00950
    p = 2     0.10760   0.02975   0.00775

Reference: huggingface/transformers' integrations/higgs.py. Differs: the signs are random, as in the
paper (there is none in the code); a block is the largest divisor of d_in, at most 512, that has a
Hadamard matrix, where theirs pads; scales are one a block in float16; the grids are our own
(kernels/grids), of distortions within 0.6 % of theirs.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.rotations import largest_block, rotate_inputs
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.tables import find_table

REFERENCE = "huggingface/transformers@c223ef0 src/transformers/integrations/higgs.py"


def quantize(w: jax.Array, table: str, group_size: int, dtype=jnp.float16) -> Codebook:
    """Rounds groups of a weight, divided by their rms, to the points of a table.

    Args:
      w: float32 [d_in, d_out], already rotated.
      table: one of `lqec_kernels.tables`, for unit variance; its dim divides group_size.
      group_size: inputs that share a scale, a divisor of d_in.
      dtype: in which scales are stored.
    Cost: 2^(dim · bits) · d_in · d_out multiply-adds.  jit: yes; vmap: yes.
    """
    d_in, d_out = w.shape
    grouped = grids.group_rows(w, group_size)
    rms = jnp.sqrt(jnp.mean(jnp.square(grouped), axis=1, keepdims=True))
    scales = store_number(rms, dtype)  # [groups, 1, d_out]
    stored = scales.astype(jnp.float32)
    unit = grouped / jnp.where(stored == 0, 1.0, stored)
    found = find_table(table)
    codes = found.encode(unit.reshape(-1, found.dim, d_out))  # [d_in / dim, d_out]
    return Codebook.from_codes(codes, scales[:, 0], table=table, group_size=group_size, d_in=d_in)


def higgs(
    *, bits: int = 4, p: int = 2, block: int = 512, scale_dtype: str = "float16"
) -> LinearStep:
    """Makes the step that rotates the inputs and rounds to a grid for normal weights.

    A rotation that the inputs have already, from `hadamard`, is taken as it is.

    Args:
      bits: 2, 3 or 4.
      p: length of the vectors, 2 as in the paper's main tables, or 1 for scalars.
      block: the largest block of inputs that are rotated together and share a scale; each weight
        has the largest divisor of its d_in, at most this, that has a Hadamard matrix. More costs
        little and gains little: 512 is the authors', 16/512 bits a weight for scales.
      scale_dtype: 'float16' or 'float32'.
    """
    check_int("higgs", "bits", bits, 2, 4)
    check_choice("higgs", "p", p, (1, 2))
    check_int("higgs", "block", block, 4)
    check_choice("higgs", "scale_dtype", scale_dtype, ("float16", "float32"))
    table = f"gauss{bits}" if p == 1 else f"gauss{bits}_p2"

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        group_size = largest_block("higgs", "d_in", leaf.d_in, block)
        leaf = rotate_inputs("higgs", leaf, problem.key, group_size)
        base = quantize(base_target(leaf), table, group_size, jnp.dtype(scale_dtype))
        return replace_base(leaf, base)

    return LinearStep(
        name="higgs",
        run=run,
        arguments={"bits": bits, "p": p, "block": block, "scale_dtype": scale_dtype},
        objective=weight_error,
        objective_name="relative weight error",
    )
