"""NormalFloat: the levels at quantiles of a normal, stretched to each group's largest weight.

Dettmers et al. 2023, arXiv:2305.14314 (QLoRA). w ≈ a · level(code), a = max |w| over a group.

Reference: bitsandbytes' NF4; NF2 and NF3 as LoftQ has them. Differs: groups run along d_in of one
output, where bitsandbytes cuts the flattened weight; absmax is float16, not float32, or quantized
again; codes are computed against it as it is stored; a weight half way between two levels goes to
the lower. NF2 has no level between -1 and 0, so it shifts the mean: at 2 bits `rtn` is better.
"""

import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, resolve_group
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_kernels.codebook import Codebook, DoubleScales
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.tables import find_table

REFERENCE = "bitsandbytes-foundation/bitsandbytes@8b3c0f3 bitsandbytes/functional.py"


def quantize(w, bits: int, group_size: int | None, *, double=False, dtype=jnp.float16) -> Codebook:
    """Rounds a weight to NormalFloat levels.

    Args:
      w: float32 [d_in, d_out].
      bits: 2, 3 or 4.
      group_size: inputs that share an absmax; None for all of them.
      double: quantize the absmaxes again to 8 bits, see `DoubleScales`.
      dtype: in which they are stored otherwise.
    Raises:
      InputError: group_size does not divide d_in.
    Cost: O(d_in · d_out · 2^bits).  jit: yes; vmap: yes.
    """
    d_in, d_out = w.shape
    group_size = resolve_group("nf", group_size, d_in)
    grouped = grids.group_rows(w, group_size)
    absmax = jnp.max(jnp.abs(grouped), axis=1)  # [groups, d_out]
    if double:
        stored = DoubleScales.from_scales(absmax)
        scales = stored.dense()
    else:
        stored = scales = store_number(absmax, dtype)
    scales = scales.astype(jnp.float32)[:, None]
    unit = grouped / jnp.where(scales == 0, 1.0, scales)
    table = find_table(f"nf{bits}")
    codes = table.encode(unit.reshape(d_in, 1, d_out))  # [d_in, d_out]
    return Codebook.from_codes(codes, stored, table=f"nf{bits}", group_size=group_size, d_in=d_in)


def nf(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    double: bool = False,
    scale_dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base by its NormalFloat rounding.

    Args:
      bits: 2, 3 or 4.
      group_size: must divide every d_in it meets; None is one group a column. 64 is the paper's.
      double: double quantization: about 8 bits a scale instead of 16, to 1 % of a scale.
      scale_dtype: 'float16', or 'float32' as in the paper; of no use with `double`.
    """
    check_int("nf", "bits", bits, 2, 4)
    if group_size is not None:
        check_int("nf", "group_size", group_size, 1)
    check_choice("nf", "double", double, (True, False))
    check_choice("nf", "scale_dtype", scale_dtype, ("float16", "float32"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        base = quantize(
            base_target(leaf), bits, group_size, double=double, dtype=jnp.dtype(scale_dtype)
        )
        return replace_base(leaf, base)

    return LinearStep(
        name="nf",
        run=run,
        arguments={"bits": bits, "group_size": group_size, "double": double,
                   "scale_dtype": scale_dtype},
        objective=weight_error,
        objective_name="relative weight error",
    )  # fmt: skip
