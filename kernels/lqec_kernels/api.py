"""One product for every format and every implementation."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.capability import IMPLEMENTATIONS, ORDER, why_not
from lqec_kernels.formats import Base, LowRank
from lqec_kernels.layers import take_layer
from lqec_kernels.reference import tiled_matmul, vary_alike
from lqec_kernels.repacking import can_repack, repack_for_kernels

# What taking an input into a mean costs, in multiply-adds: on a CPU, over 128 to 352 inputs.
MEANS = 4

_log = logging.getLogger(__name__)
# jit, which remembers programs by their arguments, remembers them by this too.
_in_use = jax.make_user_context(default_value=())


def packed_matmul(
    x: jax.Array,
    base: Base,
    *,
    corrections: Sequence = (),
    layer: jax.Array | None = None,
    implementation: str = "auto",
    shards: int = 1,
) -> jax.Array:
    """Multiplies by a packed weight and adds its corrections: y = x·base + Σ correction(x).

    Args:
      x: floating [..., d_in].
      base: a format of `formats`, unstacked. Kernels read what `repack` makes of it; asked for by
        name, they repack an Affine in the program, at every call.
      corrections: operators with `apply(x)`, such as LowRank.
      layer: int32 []; base and corrections are stacks then, and this layer of them is meant. A
        kernel reads it where it lies.
      implementation: 'xla', in plain XLA, see `reference`; 'pallas', interpreted on a CPU and
        Mosaic's on a TPU; 'triton', for NVIDIA GPUs; 'pallas_triton', the Pallas kernel on them,
        deprecated by jax 0.11; 'mosaic', for Hopper GPUs, x of 16 bits and Planes; or 'auto', what
        `use` says, else the first that the platform has and the base is repacked for
        (`capability.ORDER`), which is logged once.
      shards: see `tiled_matmul`.
    Returns:
      [..., d_out] of x.dtype; sums are float32. Differentiable in x, the corrections and the base's
      floating arrays, through XLA's backward pass whatever the implementation.
    Raises:
      ValueError: x has another width than the base; an unknown implementation.
      NotImplementedError: an implementation that was asked for by name cannot do this; says why.
    Example:
      >>> packed_matmul(x, leaf.base, corrections=leaf.corrections).shape
    """
    if x.shape[-1] != base.d_in:
        raise ValueError(f"x has width {x.shape[-1]}, the weight [{base.d_in}, {base.d_out}]")
    if implementation != "auto":
        _check_names((implementation,))
    named = _in_use.value if implementation == "auto" else (implementation,)
    reasons = {}
    for name in named or ORDER.get(jax.default_backend(), ("xla",)):
        reasons[name] = why_not(name, base, x.dtype, shards=shards)
        if not reasons[name] and name != "xla" and not named and can_repack(base):
            reasons[name] = "the weight is not in its layout; call lqec_kernels.repack once"
        if reasons[name]:
            continue
        try:
            y = _multiply(name, x, base, tuple(corrections), layer, shards)
        except NotImplementedError as cannot:
            reasons[name] = str(cannot)
            continue
        if implementation == "auto":
            _say_once(type(base).__name__, name, tuple(reasons.items()))
        return y
    raise NotImplementedError("; ".join(f"{name}: {why}" for name, why in reasons.items()))


def use(*implementations: str) -> Any:
    """Chooses what 'auto' is within a `with`, for every product of a model at once.

    Args:
      implementations: names, tried first to last; without 'xla' among them, a weight that none of
        them can multiply by is an error. None at all is 'auto' again.
    Raises:
      ValueError: an unknown name.
    Example:
      >>> with lqec_kernels.use("pallas", "xla"):
      ...     logits = lqec.logits(model, tokens)
    """
    _check_names(implementations)
    return _in_use(implementations)


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(("auto", *IMPLEMENTATIONS))
            raise ValueError(f"implementation={name!r} is not one of {known}")


@cache
def _say_once(kind: str, chosen: str, reasons: tuple) -> None:
    refused = "".join(f"; not {name}: {why}" for name, why in reasons if name != chosen)
    _log.info("packed_matmul takes %s for %s%s", chosen, kind, refused)


def _multiply(name: str, x, base: Base, corrections: tuple, layer, shards: int) -> jax.Array:
    if name == "xla":
        inside, beside = _place_corrections(x, base, take_layer(corrections, layer))
        y = tiled_matmul(x, base, low_rank=inside, layer=layer, shards=shards)
    else:
        inside, beside = _join_plain(x, corrections, layer)
        y = _by_kernel(name, *vary_alike((x, base, inside, layer)))
    for correction in beside:
        y = y + correction.apply(x)
    return y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(name: str, x: jax.Array, base: Base, low_rank, layer) -> jax.Array:
    # Repacking changes no number, so that gradients may be of what was stored.
    return _find_kernel(name)(x, repack_for_kernels(base), low_rank, layer=layer)


def _find_kernel(name: str) -> Callable:
    """Imports what a kernel is written in, only where it is called."""
    if name == "triton":
        from lqec_kernels.triton_matmul import triton_matmul

        return triton_matmul
    if name == "mosaic":
        from lqec_kernels.mosaic_matmul import mosaic_matmul

        return mosaic_matmul
    from lqec_kernels.pallas_matmul import pallas_matmul

    return partial(pallas_matmul, on_gpu=name == "pallas_triton")


def _forward(name: str, x, base: Base, low_rank, layer) -> tuple:
    return _by_kernel(name, x, base, low_rank, layer), (x, base, low_rank, layer)


def _backward(name: str, residual: tuple, dy: jax.Array) -> tuple:
    """Goes back through the reference; under jit, its forward product is not computed."""

    def multiply(x: jax.Array, base: Base, low_rank, layer) -> jax.Array:
        base, low_rank = take_layer((base, low_rank), layer)
        y = tiled_matmul(x, base)
        return y if low_rank is None else y + LowRank(*low_rank).apply(x)

    _, pull = jax.vjp(multiply, *residual)
    return pull(dy)


_by_kernel.defvjp(_forward, _backward)


def _join_plain(x: jax.Array, corrections: tuple, layer: jax.Array | None) -> tuple:
    """Says which low-rank corrections a kernel adds in its own pass, and what stands beside it.

    One that is pooled reads means, which are fewer than the inputs: it stands beside. Several are
    united, but not in a stack, which would be copied: there the first goes with the kernel.
    """
    plain = [c for c in corrections if isinstance(c, LowRank) and c.pool == 1]
    taken = plain if layer is None else plain[:1]
    beside = tuple(c for c in corrections if not any(c is p for p in taken))
    beside = take_layer(beside, layer)
    if len(taken) < 2:
        return ((taken[0].a, taken[0].b) if taken else None), beside
    a = jnp.concatenate([c.a.astype(x.dtype) for c in taken], axis=-1)
    b = jnp.concatenate([c.b.astype(x.dtype) for c in taken], axis=-2)
    return (a, b), beside


def _place_corrections(x: jax.Array, base: Base, corrections: Sequence) -> tuple:
    """Says which low-rank correction joins the weight's tiles, and which are products of their own.

    Below float32 joining would round the correction to the weight's few digits, so there it stands
    beside.
    """
    tokens = math.prod(x.shape[:-1])
    joining = [
        c for c in corrections if isinstance(c, LowRank) and _is_cheaper_inside(c, base, tokens)
    ]
    if not joining or x.dtype != jnp.float32:
        return None, tuple(corrections)
    first = joining[0]
    whole = first.expanded()
    factors = (whole.a.astype(x.dtype), whole.b.astype(x.dtype))
    return factors, tuple(c for c in corrections if c is not first)


def _is_cheaper_inside(correction: LowRank, base: Base, tokens: int) -> bool:
    """Compares multiply-adds of a correction in the tiles and beside them.

    Joining costs d_in · d_out · r, standing beside tokens · (d_in + d_out) · r, forward as
    backward. One that is pooled reads less beside, and takes means first; the gradients of its
    factors are counted too, which inside are those of the expanded ones.
    """
    d_in, d_out, rank = base.d_in, base.d_out, correction.rank
    if correction.pool == 1:
        return tokens * (d_in + d_out) > d_in * d_out
    inside = 2 * rank * (d_in * d_out + tokens * (d_in + d_out))
    beside = 3 * tokens * (rank * (d_in // correction.pool + d_out) + MEANS * d_in)
    return inside < beside
