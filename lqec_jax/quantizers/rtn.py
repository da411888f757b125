"""Round to nearest: every weight to the closest point of its group's uniform grid.

Asymmetric with zero inside the range, or symmetric with s = 2·absmax / (2^b - 1); the baseline of
Frantar et al. 2023, arXiv:2210.17323 §2. Differs from IST-DASLab/gptq@2d65066 quant.py: groups run
along d_in of [d_in, d_out]; codes are computed against the scale as stored; a symmetric group
without negative weights keeps the symmetric range, where that code would clip half of it.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core.bases import base_target, inner_rms, replace_base
from lqec_jax.core.grids import group_rows
from lqec_jax.core.group_grid import GroupGrid, make_grid
from lqec_jax.core.types import LinearProblem, LinearStep, channel_error, weight_error
from lqec_kernels.formats import Affine, CompressedLinear

REFERENCE = "IST-DASLab/gptq@2d65066 quant.py"


def quantize(w: jax.Array, grid: GroupGrid, rms: jax.Array | None = None) -> Affine:
    """Rounds a weight to group-wise uniform grids.

    u = clip(round(w/s) + z, 0, 2^b - 1),  s = (hi - lo) / (2^b - 1),  z = round(-lo / s)

    Args:
      w: float32 [d_in, d_out].
      grid: bits, groups, symmetry, clip search and the dtype of scales.
      rms: float32 [d_in], how much an input channel counts in a search by output; None counts all
        alike.
    Raises:
      InputError: group_size does not divide d_in.
    Cost: O(d_in · d_out), 80 times that with a search.  jit: yes; vmap: yes.
    Example:
      >>> quantize(jnp.ones((8, 4)), GroupGrid(bits=2, group_size=4)).bits_per_weight
    """
    size = grid.size("rtn", w.shape[0])
    grouped = group_rows(w, size)
    weight = 1.0 if rms is None else jnp.square(rms).reshape(-1, size, 1)
    scales, zeros = grid.fit(grouped, weight)
    codes, _ = grid.round(grouped, scales, zeros)
    return grid.pack(codes.reshape(w.shape), scales[:, 0], zeros[:, 0])


def rtn(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    clip_search: bool | str = False,
    scale_dtype: str = "float16",
) -> LinearStep:
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
    grid = make_grid("rtn", bits=bits, group_size=group_size, symmetric=symmetric,
                     clip_search=clip_search, scale_dtype=scale_dtype)  # fmt: skip
    by_output = grid.clip_search == "output"

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        rms = inner_rms("rtn", problem, leaf) if by_output else None
        return replace_base(leaf, quantize(base_target(leaf), grid, rms))

    return LinearStep(
        name="rtn",
        run=run,
        arguments={"bits": bits, "group_size": group_size, "symmetric": symmetric,
                   "clip_search": clip_search, "scale_dtype": scale_dtype},
        needs=frozenset({"rms"}) if by_output else frozenset(),
        objective=channel_error if by_output else weight_error,
        objective_name="relative channel error" if by_output else "relative weight error",
    )  # fmt: skip
