"""Low-rank adapters as what moves: how they begin, how far they move, how they are kept.

Adapters and moments are float32 whatever the compute dtype; the base stays packed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core.arguments import check_choice, check_number, check_rank, resolve_rank
from lqec_jax.core.bases import find_grid
from lqec_jax.core.closed_form import balance, regress
from lqec_jax.core.scales import store_number
from lqec_jax.core.tree import SELECTIONS
from lqec_jax.errors import InputError
from lqec_jax.train.parts.part import Part
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import Affine, CompressedLinear, LowRank

# A learning rate of None is this over the model's width, see `Adapters.optimizers`.
LR_TIMES_WIDTH = 0.256
DEFAULT_RANK = 64


@dataclass(frozen=True, kw_only=True)
class Adapters(Part):
    """Every weight's adapters; new ones where there are none.

    Attributes:
      rank: of new ones, an integer or a fraction of min(d_in, d_out); None is `new_rank`, and takes
        those that are there whatever their rank.
      alpha: the published form is y += (alpha/rank) (x A) B; b is stored with that factor inside.
      times_width: a learning rate of None is this over the width, see `optimizers`.
      coupled: weight decay is added to the gradients of (A, B), as Adam's L2 does.
      pool: new adapters read means over the groups of the base's grid, see `add_adapter`.
      dtype: in which they are stored.
    """

    rank: int | float | None = None
    alpha: float = 16.0
    times_width: float = LR_TIMES_WIDTH
    coupled: bool = False
    pool: bool = False
    new_rank: int = DEFAULT_RANK
    dtype: str = "float16"

    def check(self, method: str) -> None:
        """Checks what a recipe said.

        Raises:
          InputError: the first that cannot be.
        """
        if self.rank is not None:
            check_rank(method, self.rank)
        check_number(method, "alpha", self.alpha, 0.0)
        check_choice(method, "dtype", self.dtype, ("float16", "float32"))
        check_choice(method, "pool", self.pool, (True, False))
        check_choice(method, "coupled", self.coupled, (True, False))
        check_choice(method, "decay", self.rates.decay, ("cosine", "constant"))
        self.rates.check(method)

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        rank, new = self.rank, self.new_rank
        return add_adapter(self.method, leaf, rank, key, pool=self.pool, new_rank=new)

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return "adapters" if SELECTIONS["adapters"](path, array) else None

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        return store_adapters(leaf, jnp.dtype(self.dtype))

    def unmoved(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        """Returns a weight whose own adapters stay to the bit; storing may round them."""
        return leaf if find_adapters(given) else self.keep(leaf, given)

    def solve(
        self, leaf: CompressedLinear, given: CompressedLinear, lacking: Callable
    ) -> CompressedLinear:
        """Puts a new adapter where it is best beside the base; those that were there only move."""
        if find_adapters(given):
            return leaf
        *others, adapter = leaf.corrections
        gram, cross = lacking(dataclasses.replace(leaf, corrections=tuple(others)))
        best = LowRank(*regress(gram, cross, adapter.rank))
        return dataclasses.replace(leaf, corrections=(*others, best))

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        """Returns Adam on (A, B), said in terms of a = A and b = (alpha/rank) B.

        The published form is y += (alpha/rank) (x A) B. The gradient of B is alpha/rank times that
        of b, and b moves alpha/rank times as far as B. Decoupled weight decay shrinks both alike
        and needs no factor; a coupled one adds weight_decay · (A, B) to the gradients of A and B. A
        learning rate of None is `times_width` / width / (alpha/rank), by which b moves as far at
        every rank.

        A pooled adapter is trained as y += (alpha/rank) (Σ x A) B, with sums where it takes means:
        its a is `pool` A, so that its matrix moves as far at every weight as one that is not
        pooled.
        """
        alpha, lr, decay = self.alpha, self.rates.lr, self.rates.weight_decay or 0.0
        into_b = _scale(
            lambda leaf: _with_factors(leaf, leaf.a * leaf.pool, leaf.b * (alpha / leaf.rank))
        )
        moved = into_b
        if lr is None:  # b moves by the same at every rank, a by more where B counts for less
            lr = self.times_width / width
            moved = _scale(
                lambda leaf: _with_factors(leaf, leaf.a * (leaf.pool * leaf.rank / alpha), leaf.b)
            )
        rates = replace(self.rates, weight_decay=0.0 if self.coupled else decay)
        before = into_b, _add_published(decay if self.coupled else 0.0, alpha)
        return {"adapters": rates.chain(lr, updates, before, (moved,))}

    def count(self, leaf: CompressedLinear) -> int:
        """Returns how many numbers a training moves in one weight; reads shapes only.

        Later steps may have rounded the adapters, or done away with them; then those that a new
        training would have count.
        """
        there = count_adapters(leaf)
        if there or not (self.pool and not isinstance(leaf.base, Affine)):
            return there or super().count(leaf)
        # A step of blocks is shown the dense weight, which has no groups yet to pool over.
        return replace(self, pool=False).count(leaf)


def add_adapter(
    method: str,
    leaf: CompressedLinear,
    rank: int | float | None,
    key: jax.Array,
    *,
    pool: bool = False,
    new_rank: int = DEFAULT_RANK,
) -> CompressedLinear:
    """Adds a ~ N(0, 1/rank²), b = 0 [.., d_in, r], [.., r, d_out], unless an adapter is there.

    Args:
      pool: the adapter reads means over the groups of the base's grid. Its rank is at most their
        number, more would add nothing. a is `group_size` times that of one that reads sums: normal,
        or with a rank for every group 1/√rank times the identity, which is as large and no worse in
        any direction (a small Llama after 150 updates: perplexity 3.33; with a normal one 3.45).
      new_rank: for a rank of None.
    Raises:
      InputError: `rank` or `pool` is not that of the adapters there, those there are rounded and
        no rank is given for new ones, `rank` is larger than the weight allows, or the base has no
        grid to pool over.
    """
    size = find_grid(method, leaf).group_size if pool else 1
    if present := find_adapters(leaf):
        _check_present(method, leaf, present, rank, size)
        return leaf
    if rank is None and find_rounded(leaf):
        raise InputError(
            f"{method}: the adapters here are rounded, which only finetune trains; put "
            f"quantize_adapter after {method}, or give rank={new_rank} for new ones beside them"
        )
    r = _find_rank(method, leaf, new_rank if rank is None else rank, size)
    shape = (*leaf.stack_shape, leaf.d_in // size, r)
    if size > 1 and r == leaf.d_in // size:
        a = jnp.broadcast_to(jnp.eye(r) * (size / r**0.5), shape)
    else:
        a = jax.random.normal(key, shape) * (size / r)
    adapter = LowRank(a, jnp.zeros((*leaf.stack_shape, r, leaf.d_out)), size)
    return dataclasses.replace(leaf, corrections=(*leaf.corrections, adapter))


def find_adapters(leaf: CompressedLinear) -> list[LowRank]:
    """Returns a weight's low-rank corrections."""
    return [c for c in leaf.corrections if isinstance(c, LowRank)]


def find_rounded(leaf: CompressedLinear) -> list[QuantizedLowRank]:
    """Returns a weight's low-rank corrections whose factors are stored in a few bits."""
    return [c for c in leaf.corrections if isinstance(c, QuantizedLowRank)]


def count_adapters(leaf: CompressedLinear) -> int:
    """Returns how many numbers the factors of a weight's adapters have, rounded or not."""
    exact = sum(array.size for array in jax.tree.leaves(find_adapters(leaf)))
    return exact + sum(c.rank * (c.d_in + c.d_out) for c in find_rounded(leaf))


def store_adapters(leaf: CompressedLinear, dtype: Any) -> CompressedLinear:
    """Returns a weight with its adapters balanced and in the dtype they are stored in."""

    def store(correction: Any) -> Any:
        if not isinstance(correction, LowRank):
            return correction
        a, b = balance(correction.a.astype(jnp.float32), correction.b.astype(jnp.float32))
        return _with_factors(correction, store_number(a, dtype), store_number(b, dtype))

    return dataclasses.replace(leaf, corrections=tuple(store(c) for c in leaf.corrections))


def _find_rank(method: str, leaf: CompressedLinear, rank: int | float, pool: int) -> int:
    return min(resolve_rank(method, rank, leaf.d_in, leaf.d_out), leaf.d_in // pool)


def _check_present(
    method: str, leaf: CompressedLinear, present: list[LowRank], rank: int | float | None, pool: int
) -> None:
    """Refuses to be told of adapters that are there what they are not."""
    pools, ranks = [c.pool for c in present], [c.rank for c in present]
    if pool > 1 and set(pools) != {pool}:
        raise InputError(
            f"{method}: pool=True was asked for, but there are adapters that pool "
            f"{', '.join(map(str, pools))} inputs, not the groups of {pool}; leave pool out to "
            "train those"
        )
    if rank is not None and [_find_rank(method, leaf, rank, pools[0])] != ranks:
        raise InputError(
            f"{method}: rank={rank} was asked for, but there are adapters of rank "
            f"{', '.join(map(str, ranks))}; leave rank out to train those"
        )


def _add_published(rate: float, alpha: float) -> optax.GradientTransformation:
    """Adds rate · (A, B) to gradients, the published factors of every trained adapter."""
    if not rate:
        return optax.identity()

    def add(updates: Any, params: Any) -> Any:
        def add_one(update: Any, value: Any) -> Any:
            if not _is_trained(update):
                return update
            a, b = value.a / value.pool, value.b * (value.rank / alpha)
            return _with_factors(update, update.a + rate * a, update.b + rate * b)

        return jax.tree.map(add_one, updates, params, is_leaf=_is_trained)

    return optax.stateless(add)


def _scale(change: Callable[[LowRank], LowRank]) -> optax.GradientTransformation:
    """Applies `change` to every trained adapter's gradient or update."""

    def rescale(updates: Any, _) -> Any:
        return jax.tree.map(
            lambda node: change(node) if _is_trained(node) else node, updates, is_leaf=_is_trained
        )

    return optax.stateless(rescale)


def _is_trained(node: Any) -> bool:
    return isinstance(node, LowRank) and isinstance(node.a, jax.Array)


def _with_factors(adapter: LowRank, a: jax.Array, b: jax.Array) -> LowRank:
    return dataclasses.replace(adapter, a=a, b=b)
