"""A step's view of the base alone: its target, its inputs' statistics, and how it is replaced.

A transform around a base changes what the base has to be and what it reads:

    y = T_out( base( T_in(x) ) ),   so the base reads x M_in, whose gram is M_inᵀ G M_in.

Steps that put another base in a leaf work in those terms, so any of them may follow a transform.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lqec_jax.core.types import LinearProblem
from lqec_jax.errors import InputError
from lqec_kernels.formats import Affine, Base, ChannelScale, CompressedLinear, Dense
from lqec_kernels.sparse import QUAD, Masked, Sparse24


def base_target(leaf: CompressedLinear) -> jax.Array:
    """Returns what a new base is to be near: the present one, float32 [d_in, d_out]."""
    return leaf.base.dense()


def kept(leaf: CompressedLinear) -> jax.Array | None:
    """Returns which weights of the base may be other than zero, bool; None where all may."""
    return _kept(leaf.base)


def replace_base(leaf: CompressedLinear, base: Base) -> CompressedLinear:
    """Puts another base in a leaf; transforms, corrections and the base's zeros stay."""
    keep = _kept(leaf.base)
    if keep is not None:
        base = _mask(base, keep, _pattern(leaf.base))
    return dataclasses.replace(leaf, base=base)


def mask_base(leaf: CompressedLinear, keep: jax.Array, pattern: str = "") -> CompressedLinear:
    """Makes weights of the base zero, beside those that are zero already.

    Args:
      keep: bool [d_in, d_out], False where a weight becomes zero.
      pattern: 'n:m' where exactly n of every m consecutive inputs are kept, else ''.
    """
    if _kept(leaf.base) is not None:
        return dataclasses.replace(leaf, base=Masked.from_mask(leaf.base, keep))
    return dataclasses.replace(leaf, base=_mask(leaf.base, keep, pattern))


def _kept(base: Base) -> jax.Array | None:
    if not isinstance(base, Masked | Sparse24):
        return None
    inner = _kept(base.inner) if isinstance(base, Masked) else None
    return base.kept() if inner is None else base.kept() & inner


def _pattern(base: Masked | Sparse24) -> str:
    return base.pattern if isinstance(base, Masked) else "2:4"


def _mask(base: Base, keep: jax.Array, pattern: str) -> Masked | Sparse24:
    """Returns a base with zeros, without room for them where its format allows."""
    if pattern == "2:4" and isinstance(base, Affine) and base.group_size % QUAD == 0:
        return Sparse24.from_mask(base, keep)
    if isinstance(base, Dense):
        base = Dense(jnp.where(keep, base.w, 0))
    return Masked.from_mask(base, keep, pattern)


def find_grid(method: str, leaf: CompressedLinear) -> Affine:
    """Returns the base whose zeros can take in what is constant over its groups of inputs.

    Raises:
      InputError: the base is no uniform grid, or a transform stands between it and what corrections
        read and add to.
    """
    for side in ("input", "output"):
        transform = getattr(leaf, f"{side}_transform")
        if transform is not None:
            raise InputError(
                f"{method}: a {type(transform).__name__} transform stands between the {side}s and "
                "the base, so no zero of it can stand for a pooled adapter; leave one of them out"
            )
    if isinstance(leaf.base, Masked | Sparse24):
        raise InputError(
            f"{method}: pooled adapters go into a base's zero points, and in a "
            f"{type(leaf.base).__name__} base would fill weights that were set to zero; leave "
            "sparsity or pooling out"
        )
    if not isinstance(leaf.base, Affine):
        raise InputError(
            f"{method}: a {type(leaf.base).__name__} base has no zero points for pooled adapters; "
            "put a uniform grid first, such as rtn or gptq"
        )
    return leaf.base


def scale_inputs(method: str, leaf: CompressedLinear, scale: jax.Array) -> CompressedLinear:
    """Multiplies what the base reads by scale [d_in]; the base stays, so the weight changes.

    A channel scale that is there already takes the new one in, in float32.

    Raises:
      InputError: the inputs are mixed by a transform, after which there is no place for a scale.
    """
    before = leaf.input_transform
    if isinstance(before, ChannelScale):
        scale = before.scale.astype(jnp.float32) * scale.astype(jnp.float32)
    elif before is not None:
        raise InputError(
            f"{method}: scales the inputs of a weight, and a {type(before).__name__} transform "
            "mixes them first; leave the rotation out"
        )
    return dataclasses.replace(leaf, input_transform=ChannelScale(scale))


def inner_gram(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns the gram of what the base reads, M_inᵀ G M_in, float32 [d_in, d_in]."""
    if leaf.input_transform is None:
        return problem.stats.gram
    half = leaf.input_transform.apply(problem.stats.gram)  # G M
    return leaf.input_transform.apply(half.T).T  # Mᵀ G M


def inner_rms(method: str, problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns the rms of what the base reads, float32 [d_in].

    Raises:
      InputError: a transform mixes channels, of which rms alone says nothing.
    """
    if leaf.input_transform is None:
        return problem.stats.rms
    if isinstance(leaf.input_transform, ChannelScale):
        return problem.stats.rms * jnp.abs(leaf.input_transform.scale.astype(jnp.float32))
    raise InputError(
        f"{method}: the inputs are mixed by a {type(leaf.input_transform).__name__} transform "
        "before the weight reads them, so their rms says nothing of it; put the rotation after"
    )
