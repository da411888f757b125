"""What a finished model has, as what moves: adapters in the form they came in, norms, the rest."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core.scales import store_number
from lqec_jax.core.tree import SELECTIONS
from lqec_jax.errors import InputError
from lqec_jax.train.parts.adapters import (
    LR_TIMES_WIDTH,
    add_adapter,
    count_adapters,
    find_adapters,
    find_rounded,
    store_adapters,
)
from lqec_jax.train.parts.part import Part, attributes, is_floating
from lqec_kernels.adapters import QuantizedLowRank, round_columns
from lqec_kernels.fields import static
from lqec_kernels.formats import CompressedLinear, LowRank

# One optimizer moves all that is stored: the state of a run has one place for it.
LABEL = "tuned"


class Rounding(NamedTuple):
    """How an adapter's factors are stored: bits, and groups of a and of b."""

    bits: int
    a_group: int
    b_group: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unrounded:
    """A rounded adapter in training: float factors, and how they are rounded; never stored.

    Attributes:
      a, b: float32 [..., d_in, r] and [..., r, d_out].
    """

    a: jax.Array
    b: jax.Array
    rounding: Rounding = static()

    @classmethod
    def open(cls, adapter: QuantizedLowRank) -> "Unrounded":
        a, b = adapter.a, adapter.b
        exact = adapter.factors()
        return cls(exact.a, exact.b, Rounding(a.bits, a.group_size, b.group_size))

    def axes(self, axis: int) -> dict[str, int]:
        return {"a": -2} if axis == -2 else {"b": -1}

    def close(self) -> QuantizedLowRank:
        """Returns the adapter in the bits and groups that it is stored in."""
        bits, a_group, b_group = self.rounding
        return QuantizedLowRank(
            round_columns(self.a, bits, a_group), round_columns(self.b.mT, bits, b_group)
        )

    def read(self) -> LowRank:
        """Returns the rounded factors; the gradient of each is the exact one's."""
        stored = self.close().factors()
        return LowRank(_through(self.a, stored.a), _through(self.b, stored.b))


def _through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    # The exact factor less itself is zero, so what is read is the rounded one to the bit.
    return jax.lax.stop_gradient(rounded) + (exact - jax.lax.stop_gradient(exact))


@dataclass(frozen=True, kw_only=True)
class Tuned(Part):
    """What moves by plain steps, with one rate for all."""

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        lr = LR_TIMES_WIDTH / width if self.rates.lr is None else self.rates.lr
        # A place is kept for what turns steps into units, as scales have it.
        return {LABEL: self.rates.chain(lr, updates, after=(optax.identity(),))}


@dataclass(frozen=True, kw_only=True)
class StoredAdapters(Tuned):
    """Adapters as they are stored, quantized ones straight through their rounding.

    Attributes:
      rank: of new ones where there are none; None wants some to be there.
      dtype: in which new ones are stored; others stay in theirs.
    """

    rank: int | float | None = None
    dtype: str = "float16"

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        if rounded := find_rounded(leaf):
            self._check_rounded(rounded)
            return _change(leaf, QuantizedLowRank, Unrounded.open)
        if self.rank is None and not find_adapters(leaf):
            raise InputError(
                f"{self.method}: the model has no adapters; give rank=16 for new ones, put a step "
                "before it that adds some, such as slim_lora(rank=0.1), or train='scales'"
            )
        begun = add_adapter(self.method, leaf, self.rank, key)
        return leaf if begun is leaf else store_adapters(begun, jnp.dtype(self.dtype))

    def _check_rounded(self, rounded: list[QuantizedLowRank]) -> None:
        if self.rank is not None:
            raise InputError(
                f"{self.method}: rank={self.rank} was asked for, but there are quantized adapters "
                f"of rank {', '.join(str(c.rank) for c in rounded)}; leave rank out to train those"
            )

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return LABEL if SELECTIONS["adapters"](path, array) and is_floating(array) else None

    def read(self, leaf: CompressedLinear) -> CompressedLinear:
        return _change(leaf, Unrounded, Unrounded.read)

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        dtypes = [c.a.dtype for c in find_adapters(given)] or [jnp.dtype(self.dtype)]
        stored = store_adapters(leaf, jnp.float32)
        kept = iter(dtypes)

        def as_it_came(adapter: LowRank) -> LowRank:
            dtype = next(kept)
            a, b = store_number(adapter.a, dtype), store_number(adapter.b, dtype)
            return dataclasses.replace(adapter, a=a, b=b)

        stored = _change(stored, LowRank, as_it_came)
        return _change(stored, Unrounded, Unrounded.close)

    def unmoved(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        # Rounding anew may change a last place; what other parts put in stays.
        rounded = find_rounded(given)
        return dataclasses.replace(leaf, corrections=given.corrections) if rounded else leaf

    def count(self, leaf: CompressedLinear) -> int:
        return count_adapters(leaf) or super().count(leaf)


def holds_rounded(params: Any) -> bool:
    """Says whether a model as a training begins has rounded adapters."""
    is_unrounded = lambda node: isinstance(node, Unrounded)  # noqa: E731
    return any(map(is_unrounded, jax.tree.leaves(params, is_leaf=is_unrounded)))


def _change(leaf: CompressedLinear, kind: type, change: Any) -> CompressedLinear:
    corrections = tuple(change(c) if isinstance(c, kind) else c for c in leaf.corrections)
    return dataclasses.replace(leaf, corrections=corrections)


@dataclass(frozen=True, kw_only=True)
class Norms(Tuned):
    """The norms' scales and shifts."""

    def label(self, path: tuple, array: jax.Array) -> str | None:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        norm = len(names) > 1 and names[-2].endswith("norm")
        return LABEL if norm and not attributes(path) and is_floating(array) else None


@dataclass(frozen=True, kw_only=True)
class Rest(Tuned):
    """All that is no compressed weight: norms, biases, embedding and head."""

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return None if attributes(path) or not is_floating(array) else LABEL
