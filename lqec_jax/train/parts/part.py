"""What moves in a training: a part of every weight, in the form in which it is trained.

    begin   puts in what is to move and is not there: an adapter, float zeros, a clipped grid
    label   names what moves of it; the numbers lie in the weight itself, float32
    read    gives the weight as a forward pass reads it, straight through where it rounds
    keep    gives the weight as it is stored: what `read` read, to the bit where it rounds
    optimizers   take Adam's steps to the units that the numbers move in

A training names several; each is a frozen record of settings, equal by value, and holds no array.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core.bases import replace_base
from lqec_jax.core.scales import store_number
from lqec_jax.train.rates import Rates
from lqec_kernels.formats import CompressedLinear, Dense

Self = TypeVar("Self", bound="Part")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that adds nothing and moves nothing; others say where they differ.

    Attributes:
      rates: how far its numbers move.
      method: the training that it is part of, for messages.
    """

    rates: Rates = Rates()
    method: str = "training"

    def named(self: Self, method: str) -> Self:
        return replace(self, method=method)

    def suit(self: Self, leaf: CompressedLinear) -> Self:
        """Returns the part as it is for one weight; reads how large that is."""
        return self

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        """Returns a weight as its training begins; the very same one where it has all it needs.

        Raises:
          InputError: the weight has no place for what is to move.
        """
        return leaf

    def label(self, path: tuple, array: jax.Array) -> str | None:
        """Returns under which label of `optimizers` an array moves; None where it stays.

        Args:
          path: as `jax.tree_util` gives it, in a model, a block or a weight.
        """
        return None

    def read(self, leaf: CompressedLinear) -> CompressedLinear | jax.Array:
        return leaf

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        """Returns a trained weight as it is stored.

        Args:
          given: the weight before `begin`.
        """
        return leaf

    def unmoved(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        """Returns a weight that no update improved as it is stored; `leaf` is what `begin` gave."""
        return self.keep(leaf, given)

    def solve(
        self, leaf: CompressedLinear, given: CompressedLinear, lacking: Callable
    ) -> CompressedLinear:
        """Returns a weight in training with what has its best in closed form put there.

        Args:
          given: the weight before `begin`.
          lacking: a weight in training -> (E[x̂ᵀ x̂], E[x̂ᵀ e]) of what its output lacks, as
            `core.closed_form.regress` takes them.
        """
        return leaf

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        """Returns label -> optimizer, for a model so wide and so many updates."""
        return {}

    def count(self, leaf: CompressedLinear) -> int:
        """Returns how many numbers move in one weight; reads shapes only."""
        begun = jax.eval_shape(self.begin, leaf, jax.eval_shape(jax.random.key, 0))
        arrays = jax.tree_util.tree_leaves_with_path(begun)
        return sum(array.size for path, array in arrays if self.label(path, array) is not None)


def attributes(path: tuple) -> list[str]:
    """Returns the fields that a path goes through, empty outside of compressed weights."""
    return [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]


def is_floating(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def store_as(before: jax.Array, after: jax.Array) -> jax.Array:
    """Returns an array in the dtype that it had, within its range."""
    if before.dtype == after.dtype:
        return after
    return store_number(after, before.dtype)


def put_weight(leaf: CompressedLinear, w: jax.Array) -> CompressedLinear | jax.Array:
    """Puts a dense base in a leaf; the weight alone where the leaf says no more."""
    leaf = replace_base(leaf, Dense(w))
    others = (*leaf.corrections, leaf.input_transform, leaf.output_transform, leaf.input_grid)
    bare = isinstance(leaf.base, Dense) and all(part is None for part in others)
    return w if bare else leaf
