"""Round to nearest: every weight to the closest point of its group's uniform grid.

Asymmetric with zero inside the range, or symmetric with s = 2·absmax / (2^b - 1); the baseline of
Frantar et al. 2023, arXiv:2210.17323 §2. Differs from IST-DASLab/gptq@2d65066 quant.py: groups run
along d_in of [d_in, d_out]; codes are computed against the scale as stored; a symmetric group
without negative weights keeps the symmetric range, where that code would clip half of it.
"""

import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, resolve_group
from lqec_jax.core.bases import base_target, inner_rms, replace_base
from lqec_jax.core.types import LinearProblem, Step, channel_error, weight_error
from lqec_kernels.formats import Affine, CompressedLinear

REFERENCE = "IST-DASLab/gptq@2d65066 quant.py"


def quantize(w, bits: int, group_size: int | None, *, symmetric=False, dtype=jnp.float16, rms=None,
             power=None) -> Affine:  # fmt: skip
    """Rounds a weight to group-wise uniform grids.

    u = clip(round(w/s) + z, 0, 2^b - 1),  s = (hi - lo) / (2^b - 1),  z = round(-lo / s)

    Args:
      w: float32 [d_in, d_out].
      bits: width of a code, 1-8.
      group_size: inputs that share a scale; None for all of them.
      symmetric: z = 2^(b-1) for every group, and not stored.
      dtype: in which scales are stored.
      rms: float32 [d_in], how much an input channel counts in the search; None counts all alike.
      power: exponent of the error that a clip search lowers; None searches nothing.
    Raises:
      InputError: group_size does not divide d_in.
    Cost: O(d_in · d_out), 80 times that with a search.  jit: yes; vmap: yes.
    """
    d_in = w.shape[0]
    group_size = resolve_group("rtn", group_size, d_in)
    grouped = grids.group_rows(w, group_size)
    if power is None:
        lo, hi = grids.find_range(grouped, symmetric=symmetric)
        scales, zeros = grids.fit_grid(lo, hi, bits, symmetric=symmetric, dtype=dtype)
    else:
        weight = jnp.ones(d_in) if rms is None else jnp.square(rms)
        weight = weight.reshape(-1, group_size, 1)
        scales, zeros = grids.search_clip(
            grouped, bits, weight, symmetric=symmetric, dtype=dtype, power=power
        )
    codes = grids.round_to_grid(grouped, scales, zeros, bits)
    codes = codes.reshape(w.shape).astype(jnp.uint8)  # [d_in, d_out]
    zeros = None if symmetric else zeros[:, 0].astype(jnp.uint8)
    return Affine.from_codes(codes, scales[:, 0], zeros, bits=bits, group_size=group_size)


def rtn(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    clip_search: bool | str = False,
    scale_dtype: str = "float16",
) -> Step:
    """Makes the step that replaces the base by its rounding.

    Args:
      bits: 1-8.
      group_size: must divide every d_in it meets; None is one group a column.
      symmetric: no zeros are stored.
      clip_search: True or 'weight' shrinks each group's range to lower Σ|ŵ - w|^2.4; 'output'
        lowers Σ E[x_i²] (ŵ_i - w_i)², the output error were inputs uncorrelated. Off by default: on
        small models at 2 bits the weight error is a poor guide to the model's.
      scale_dtype: 'float16', or 'float32' for twice the scale bits.
    """
    check_int("rtn", "bits", bits, 1, 8)
    if group_size is not None:
        check_int("rtn", "group_size", group_size, 1)
    check_choice("rtn", "symmetric", symmetric, (True, False))
    check_choice("rtn", "clip_search", clip_search, (True, False, "weight", "output"))
    check_choice("rtn", "scale_dtype", scale_dtype, ("float16", "float32"))
    by_output = clip_search == "output"
    power = (2.0 if by_output else 2.4) if clip_search else None

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        rms = inner_rms("rtn", problem, leaf) if by_output else None
        base = quantize(base_target(leaf), bits, group_size, symmetric=symmetric,
                        dtype=jnp.dtype(scale_dtype), rms=rms, power=power)  # fmt: skip
        return replace_base(leaf, base)

    return Step(
        name="rtn",
        scope="linear",
        run=run,
        arguments={"bits": bits, "group_size": group_size, "symmetric": symmetric,
                   "clip_search": clip_search, "scale_dtype": scale_dtype},
        needs=frozenset({"rms"}) if by_output else frozenset(),
        objective=channel_error if by_output else weight_error,
        objective_name="relative channel error" if by_output else "relative weight error",
    )  # fmt: skip
