"""One optimizer update as a pure function, jit-compiled, donated, with its shardings pinned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core.tree import combine, partition
from lqec_jax.core.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that an update reads and writes.

    Attributes:
      step: int32 scalar, updates done.
      train: what gradients are taken of, None elsewhere; float32 whatever the compute dtype.
      frozen: everything else, packed; passes through an update untouched.
      opt_state: optax's.
    """

    step: jax.Array
    train: Params
    frozen: Params
    opt_state: Any

    @property
    def params(self) -> Params:
        return combine(self.train, self.frozen)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, select: str | Callable = "adapters"
) -> TrainState:
    """Splits parameters and starts the optimizer; trained arrays become float32.

    Arrays are copied, because an update consumes its state.
    """
    train, frozen = partition(params, select)
    train = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), train)
    train, frozen = jax.tree.map(jnp.copy, (train, frozen))
    return TrainState(jnp.zeros((), jnp.int32), train, frozen, optimizer.init(train))


def make_update(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    state_sharding: Any = None,
) -> Callable:
    """Builds (state, batch) -> (state, metrics).

    Args:
      loss_fn: (params, batch) -> (scalar mean over the batch, dict of scalars).
      optimizer: any optax transformation.
      accumulate: in how many equal parts a batch is walked; gradients are averaged in float32, so
        the result is that of the whole batch up to round-off.
      state_sharding: a TrainState of shardings for a mesh. Pinned for input and output both: left
        to itself XLA returns trained arrays in another layout than they came in, and neither
        donation nor the next call's cache hit happens.
    Returns:
      A compiled function. The state given to it is donated: use the one it returns. Metrics are the
      loss function's dict, with 'loss' and 'grad_norm'.
    Example:
      >>> update = make_update(loss_fn, optax.adam(1e-3))
      >>> state, metrics = update(init_state(params, optax.adam(1e-3)), batch)
    """

    def update(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        def loss_of(train, part):
            return loss_fn(combine(train, state.frozen), part)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, metrics), grads = _average(value_and_grad, state.train, batch, accumulate)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.train)
        train = optax.apply_updates(state.train, changes)
        metrics = {**metrics, "loss": loss, "grad_norm": optax.global_norm(grads)}
        return TrainState(state.step + 1, train, state.frozen, opt_state), metrics

    if state_sharding is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(
        update,
        in_shardings=(state_sharding, None),
        out_shardings=(state_sharding, None),
        donate_argnums=0,
    )


def _average(value_and_grad: Callable, train: Params, batch: Any, parts: int):
    """Returns ((loss, metrics), grads), each the mean over `parts` equal parts of the batch."""
    if parts == 1:
        return value_and_grad(train, batch)
    batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)  # [parts, b, ...]

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(train, part)), None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_grad, train, first)
    )
    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda x: x / parts, total)
