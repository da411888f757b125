"""A uniform grid in training: its scales, its zeros, and the weights that it rounds."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core import grids
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.group_grid import GroupGrid, suit_grid
from lqec_jax.core.scales import store_scale
from lqec_jax.core.tree import SELECTIONS
from lqec_jax.errors import InputError
from lqec_jax.train.parts.part import Part, attributes, is_floating, put_weight, store_as
from lqec_jax.train.rates import Rates, times_value
from lqec_kernels.fields import static
from lqec_kernels.formats import Affine, Base, CompressedLinear
from lqec_kernels.packing import pack

# Of a scale, an update; what was measured for e2e_qp. In codes, of zeros, it is taken over.
SCALE_LR = 0.002


@dataclass(frozen=True, kw_only=True)
class Scales(Part):
    """What a base multiplies its codes by; codes and zeros stay (PEQA, 2305.14152).

    A scale moves by fractions of its value, so that one rate means the same for every weight.
    """

    kind: str = "scales"

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        arrays = jax.tree_util.tree_leaves_with_path(leaf)
        if not any(self.label(path, array) for path, array in arrays):
            raise InputError(
                f"{self.method}: a {type(leaf.base).__name__} base has no scales to train; put a "
                "quantizer that has them before it"
            )
        return leaf

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return self.kind if SELECTIONS["scales"](path, array) else None

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        dtypes = {p: array.dtype for p, array in jax.tree_util.tree_leaves_with_path(given)}

        def store(path: tuple, array: jax.Array) -> jax.Array:
            dtype = dtypes.get(path, array.dtype)
            stays = array.dtype == dtype or not self.label(path, array)
            if stays:
                return array
            stored = store_scale(jnp.abs(array), dtype)  # a scale may have gone through zero
            return jnp.where(array < 0, -stored, stored)

        return jax.tree_util.tree_map_with_path(store, leaf)

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        lr = SCALE_LR if self.rates.lr is None else self.rates.lr
        return {self.kind: self.rates.chain(lr, updates, after=(times_value(),))}


@dataclass(frozen=True, kw_only=True)
class Zeros(Part):
    """The zero points of a uniform grid, in codes; integers become real numbers.

    Attributes:
      whole: they are read and stored rounded again, straight through, in `bits` bits each.
      dtype: in which real ones are stored; those that were real stay in theirs.
    """

    whole: bool = False
    dtype: str = "float16"

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        base = leaf.base
        if not isinstance(base, Affine):
            raise InputError(
                f"{self.method}: a {type(base).__name__} base has no zeros to train; put a uniform "
                "grid before it, such as rtn or gptq"
            )
        _, scales, zeros = base.columns()
        if zeros is None:
            zeros = jnp.full(scales.shape, 2.0 ** (base.bits - 1))
        zeros = zeros.astype(jnp.float32)
        return dataclasses.replace(leaf, base=dataclasses.replace(base, zeros=zeros))

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return "zeros" if attributes(path) == ["base", "zeros"] else None

    def read(self, leaf: CompressedLinear) -> CompressedLinear:
        if not self.whole:
            return leaf
        zeros = grids.store_through(leaf.base.zeros, _round(leaf.base))
        return dataclasses.replace(leaf, base=dataclasses.replace(leaf.base, zeros=zeros))

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        base = leaf.base
        if self.whole:
            stored = pack(_round(base).astype(jnp.uint8).mT, base.bits).mT
        else:
            before = getattr(given.base, "zeros", None)
            real = before is not None and is_floating(before)
            stored = store_as(before if real else jnp.zeros((), self.dtype), base.zeros)
        return dataclasses.replace(leaf, base=dataclasses.replace(base, zeros=stored))

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        lr = SCALE_LR if self.rates.lr is None else self.rates.lr
        return {"zeros": self.rates.chain(lr, updates)}


def _round(base: Affine) -> jax.Array:
    return jnp.clip(jnp.round(base.zeros), 0, 2**base.bits - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OnGrid:
    """A weight on a grid, all of it in motion; never stored.

    Attributes:
      inner: the weight that the training began with, any base.
      moved: how far each weight has moved, in steps of its group's first grid, float32 [groups,
        group_size, d_out].
      scales: of the first ones, float32 [groups, 1, d_out].
      zeros: in codes, alike; None on a symmetric grid.
    """

    inner: Base
    moved: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    grid: GroupGrid = static()

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    @property
    def d_out(self) -> int:
        return self.inner.d_out

    def unpack(self, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns weights, scales as they will be stored and whole zeros, all grouped."""
        grid = self.grid
        w, scales, zeros = _fit(w, grid, self.moved.shape[-2])
        first = scales.astype(jnp.float32)
        exact = first * self.scales
        stored = store_scale(exact, grid.dtype)
        if self.zeros is not None:
            whole = jnp.clip(jnp.round(self.zeros), 0, 2**grid.bits - 1)
            zeros = grids.store_through(self.zeros, whole)
        return w + first * self.moved, grids.store_through(exact, stored), zeros


def _fit(w: jax.Array, grid: GroupGrid, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    w = grids.group_rows(w, size)
    return w, *grid.fit(w)


@dataclass(frozen=True, kw_only=True)
class Grid(Part):
    """Weights, scales and zeros together: ŵ = s (clip(round(w / s) + round(z)) - round(z)).

    Gradients pass both roundings unchanged (Block-AP, 2407.11062 §3.2). They move in units that
    make one rate mean the same at every size: a weight in steps of its group's first grid, a scale
    as a fraction of its first value, a zero in codes. Weights are held as floats of their own.

    Attributes:
      grid: what the base becomes.
      rates: of weights.
      grid_rates: of scales and zeros.
    """

    grid: GroupGrid
    grid_rates: Rates = Rates()

    def suit(self, leaf: CompressedLinear) -> "Grid":
        return dataclasses.replace(self, grid=suit_grid(self.grid, leaf))

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        size = self.grid.size(self.method, leaf.d_in)
        base = _compile_start(self.suit(leaf).grid, size)(leaf)
        return dataclasses.replace(leaf, base=base)

    def label(self, path: tuple, array: jax.Array) -> str | None:
        names = attributes(path)
        if names[:1] != ["base"] or "inner" in names:
            return None
        return {"moved": "weights", "scales": "grid", "zeros": "grid"}.get(names[-1])

    def read(self, leaf: CompressedLinear) -> CompressedLinear | jax.Array:
        opened, leaf = leaf.base, dataclasses.replace(leaf, base=leaf.base.inner)
        w = grids.dequantize_through(*opened.unpack(base_target(leaf)), self.grid.bits)
        return put_weight(leaf, w.reshape(leaf.d_in, leaf.d_out))

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        opened, leaf = leaf.base, dataclasses.replace(leaf, base=leaf.base.inner)
        w, scales, zeros = opened.unpack(base_target(leaf))
        codes, _ = opened.grid.round(w, scales, zeros)
        codes = codes.reshape(leaf.d_in, leaf.d_out)
        base = opened.grid.pack(codes, scales[:, 0].astype(opened.grid.dtype), zeros[:, 0])
        return replace_base(leaf, base)

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        weights, grid = self.rates, self.grid_rates
        return {
            "weights": weights.chain(weights.lr, updates),
            "grid": grid.chain(grid.lr, updates),
        }


@lru_cache(maxsize=16)
def _compile_start(grid: GroupGrid, size: int) -> Any:
    """Returns a compiled leaf -> its base as a training begins."""

    def start(leaf: CompressedLinear) -> OnGrid:
        w, scales, zeros = _fit(base_target(leaf), grid, size)
        ones = jnp.ones(scales.shape, jnp.float32)
        moved = jnp.zeros(w.shape, jnp.float32)
        return OnGrid(leaf.base, moved, ones, None if grid.symmetric else zeros, grid)

    return jax.jit(start)
