"""One optimizer update as a pure function, jit-compiled, donated, with its shardings pinned."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core.tree import combine, partition
from lqec_jax.core.types import Params

LEAN = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


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


# Tokens whose activations stay in a processor's caches; with more, most of an update on a CPU is
# spent on fresh pages of memory (8 windows of 256: 1.4 times the CPU seconds of 4 x 2).
CPU_TOKENS = 512


def count_parts(batch: int, length: int, devices: int = 1, backend: str | None = None) -> int:
    """Returns in how many equal parts to walk a batch of windows: 1 but on a CPU.

    There it is the fewest that leave each of the devices that share a batch at most `CPU_TOKENS`
    tokens a part, or one window. `backend` is JAX's own unless given.
    """
    if (backend or jax.default_backend()) != "cpu":
        return 1
    if batch % devices:
        return 1
    share = batch // devices
    parts = (n for n in range(1, share + 1) if share % n == 0)
    return next((n for n in parts if share // n * length <= CPU_TOKENS), share)


def make_update(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    state_sharding: Any = None,
    compiler_options: dict[str, str] | None = None,
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
      compiler_options: XLA's, see `choose_options`. An update with any may not be called from
        inside another compiled program.
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
        metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, train, state.frozen, opt_state), metrics

    if state_sharding is None:
        return jax.jit(update, donate_argnums=0, compiler_options=compiler_options)
    mesh = jax.tree.leaves(state_sharding)[0].mesh.abstract_mesh

    def update_on_mesh(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        # Products ask the mesh in use how to walk a split weight.
        with jax.sharding.use_abstract_mesh(mesh):
            return update(state, batch)

    pinned = (state_sharding, None)
    return jax.jit(
        update_on_mesh,
        donate_argnums=0,
        in_shardings=pinned,
        out_shardings=pinned,
        compiler_options=compiler_options,
    )


def choose_options(segments: int) -> dict[str, str] | None:
    """Returns what to ask of XLA for a model of so many segments; None is nothing.

    XLA's order for CPUs runs whatever is ready. A segment is a loop and runs as one; segments of
    one block are no loops, and that order recomputes all their activations at once and holds them:
    166 MiB against 40 for six blocks. The lean order runs one operation after another: 0.50 s
    against 0.33 for an update of a small model of one segment on two cores.
    """
    return LEAN if segments > 1 and jax.default_backend() == "cpu" else None


def _deal(x: jax.Array, parts: int) -> jax.Array:
    """Deals windows out like cards, so that each part still lies evenly on all devices."""
    return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)  # [parts, b / parts, ...]


def _average(value_and_grad: Callable, train: Params, batch: Any, parts: int):
    """Returns ((loss, metrics), grads), each the mean over `parts` equal parts of the batch."""
    if parts == 1:
        return value_and_grad(train, batch)
    batch = jax.tree.map(lambda x: _deal(x, parts), batch)

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(train, part)), None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(value_and_grad, train, first)
    )
    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda x: x / parts, total)
