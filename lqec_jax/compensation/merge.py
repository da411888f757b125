"""Folds pooled adapters into the zero points of their base, after which there is no adapter.

A pooled adapter adds (a b)[l, o] / pool to every weight of its group l of inputs, and so does a
shift of the group's zero point,

    w = s (q - z),    z' = z - (a b / pool) / s    =>    s (q - z') = w + a b / pool,

exactly but for the round-off of float32 (QA-LoRA, Xu et al., arXiv:2309.14717 §3.3; the merged form
of RILQ, arXiv:2412.01129). Codes stay; zero points become real numbers. It follows
`rilq(pool=True)` or any other training of pooled adapters.

In float32 the shift loses at most 2⁻²⁴ (4 |a b / pool| + |s z| + 2 |w|) however small s is: what a
tiny s makes of z' it takes back in the product. A group with s = 0, or one so small that z' is no
number, has its codes set to 0, its scale to 1 and its zero to -a b / pool; what it stood for is
lost, and is below the round-off of what it now stands for.

Differs from the reference, yuhuixu1993/qa-lora merge.py: rank, alpha and group size are read from
the leaf and not fixed in the code; zeros are unpacked here, where it needs them to be floating
already.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice
from lqec_jax.core.bases import find_grid
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_jax.errors import InputError
from lqec_kernels.formats import Affine, CompressedLinear, LowRank
from lqec_kernels.packing import pack, unpack

REFERENCE = "closed form"
# A relative change of a weight above this is worth a note: a few last places of float32.
SILENT = 1e-6


def merge(*, dtype: str = "float32") -> LinearStep:
    """Makes the step that folds every pooled adapter of a weight into its zero points.

    Needs no data, and changes what the weight is made of, not the weight. Bits per weight lose the
    adapter and gain 32 / group_size less the bits of the zeros before.

    Args:
      dtype: of the new zero points. 'float32' changes nothing that can be seen. 'float16' takes
        half the room and rounds them to 2⁻¹¹ of their size; the report says how much that changed.
    Example:
      >>> lqec.compress(model, "rtn(bits=2, group_size=32) | rilq(pool=True) | merge()", text)
    """
    check_choice("merge", "dtype", dtype, ("float32", "float16"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> tuple[CompressedLinear, Any]:
        return fold(leaf, jnp.dtype(dtype))

    return LinearStep(
        name="merge",
        run=run,
        arguments={"dtype": dtype},
        notes=_say,
        objective=weight_error,
        objective_name="relative weight error, which it leaves as it is",
    )


def fold(leaf: CompressedLinear, dtype: Any) -> tuple[CompressedLinear, Any]:
    """Folds a leaf's adapters into its base; other corrections stay.

    Args:
      leaf: may be a stack.
      dtype: of the new zero points.
    Returns:
      (the leaf without adapters, {'change': ||w' - w|| / ||w||, 'replaced': groups that lost their
      codes}).
    Raises:
      InputError: there is no adapter, one is not pooled over whole groups, or the base cannot take
        it in.
    """
    adapters = [c for c in leaf.corrections if isinstance(c, LowRank)]
    if not adapters:
        raise InputError(
            "merge: there is no adapter to fold; put a step that trains pooled ones before it, "
            "such as rilq(pool=True)"
        )
    base = find_grid("merge", leaf)
    rows = sum(_spread(adapter, base.group_size) for adapter in adapters)
    _, scales, zeros = base.columns()
    if zeros is None:
        zeros = jnp.full(scales.shape, 2.0 ** (base.bits - 1))
    zeros = shift_zeros(zeros, scales, rows).astype(dtype)
    lost = ~jnp.isfinite(zeros)
    merged = dataclasses.replace(
        base,
        codes=_clear(base, lost),
        scales=jnp.where(lost, 1, scales),
        zeros=jnp.where(lost, -rows, zeros).astype(dtype),
    )
    others = tuple(c for c in leaf.corrections if not isinstance(c, LowRank))
    new = dataclasses.replace(leaf, base=merged, corrections=others)
    return new, {"change": _distance(leaf.dense(), new.dense()), "replaced": jnp.sum(lost)}


def shift_zeros(zeros: jax.Array, scales: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns z - δ / s for a correction δ that is constant over groups, all [..., groups, d_out].

    In float32, or wider if δ is.
    """
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    return zeros.astype(dtype) - rows.astype(dtype) / scales.astype(dtype)


def _spread(adapter: LowRank, group_size: int) -> jax.Array:
    """Returns what an adapter adds to each group, float32 [..., groups, d_out].

    Raises:
      InputError: it is not constant over the groups.
    """
    if adapter.pool % group_size == 0:
        return jnp.repeat(adapter.rows(), adapter.pool // group_size, axis=-2)
    if adapter.pool == 1:
        raise InputError(
            f"merge: an adapter of rank {adapter.rank} reads every input by itself, and a zero "
            f"point is one for {group_size} inputs; train it with rilq(pool=True), or export hf, "
            "where any adapter is folded in"
        )
    raise InputError(
        f"merge: an adapter pools {adapter.pool} inputs, and the base has groups of {group_size}; "
        "pool over whole groups, or quantize in groups that divide them"
    )


def _clear(base: Affine, lost: jax.Array) -> jax.Array:
    """Returns a base's packed codes, 0 in the groups [..., groups, d_out] that are lost."""
    codes = unpack(base.codes, base.bits, base.d_in)
    return pack(jnp.where(jnp.repeat(lost, base.group_size, axis=-2), 0, codes), base.bits)


def _distance(before: jax.Array, after: jax.Array) -> jax.Array:
    """Returns ||after - before|| / ||before||, 0 where both are 0."""
    change, size = jnp.linalg.norm(after - before), jnp.linalg.norm(before)
    return jnp.where(change > 0, change / jnp.maximum(size, jnp.finfo(jnp.float32).tiny), 0.0)


def _say(facts: dict[str, Any]) -> tuple[str, ...]:
    lines = []
    if facts["change"] > SILENT:
        lines.append(f"rounding the zero points changed the weight by {facts['change']:.2g} of it")
    if facts["replaced"]:
        lines.append(
            f"{facts['replaced']} groups had scales too small to divide by and hold their "
            "correction alone"
        )
    return tuple(lines)
