"""Programs of a 7-billion-parameter Llama, traced from shapes alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from configs.studies.llama_7b import make_params, read_config
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.stepping import step_fns
from lqec_jax.train.fit import shard_state
from lqec_jax.train.losses import Discrepancy, ModelLoss, NextToken
from lqec_jax.train.update import init_state, make_update
from lqec_kernels import repack, use

DTYPE = jnp.bfloat16


def shape_params(config: Any, *, repacked: bool) -> Any:
    """Returns the shapes of a model's parameters, as stored or as they are multiplied by."""

    def draw(leaf: Any) -> Any:
        return jax.tree.map(lambda a: jnp.zeros((config.layers, *a.shape), a.dtype), leaf)

    def make() -> Any:
        params = make_params(config, DTYPE, draw, lambda shape: jnp.zeros(shape, DTYPE))
        return repack(params, dtype=DTYPE) if repacked else params

    return jax.eval_shape(make)


def place(tree: Any, shardings: Any) -> Any:
    """Says where arrays lie; shardings are one for all, or a tree of them."""
    if isinstance(shardings, NamedSharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings
    )


def make_mesh(topology: Any, data: int, model: int) -> Mesh:
    grid = np.array(topology.devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def trace_generation(mesh, layers: int, sequences: int, tokens: int, implementation: str) -> Any:
    """Traces one token after `tokens` others, or where `sequences` is 0 reading that many."""
    config = read_config(layers)
    fns, whole = step_fns(config, DTYPE), NamedSharding(mesh, PartitionSpec())
    params = shape_params(config, repacked=implementation != "xla")
    prompt = jax.ShapeDtypeStruct((max(sequences, 1), tokens), jnp.int32)

    def prefill(params: Any, prompt: jax.Array) -> Any:
        return fns.prefill(params, prompt, tokens, tokens)

    with use(implementation, "xla"):
        if not sequences:
            return jax.jit(prefill).trace(*place((params, prompt), whole))
        caches = jax.eval_shape(prefill, params, prompt)[1]
        token = jax.ShapeDtypeStruct((sequences,), jnp.int32)
        position = jax.ShapeDtypeStruct((), jnp.int32)
        given = place((params, token, position, caches), whole)
        return jax.jit(fns.decode, donate_argnums=3).trace(*given)


def trace_update(mesh: Mesh, layers: int, windows: int, tokens: int) -> Any:
    """Traces an update of RILQ: adapters and Adam's moments in float32, the rest packed."""
    config = read_config(layers)
    fns, optimizer = model_fns(config, DTYPE), optax.adam(1e-3)
    params = shape_params(config, repacked=False)

    both = ModelLoss((Discrepancy(0.5), NextToken(0.5)))

    def loss(params: Any, batch: Any) -> Any:
        return both(fns, params, batch)

    state = jax.eval_shape(partial(init_state, optimizer=optimizer), params)
    shardings, notes = shard_state(fns, params, optimizer, state, mesh)
    for note in notes:
        print(note)
    by_window = NamedSharding(mesh, PartitionSpec("data"))
    batch = {"tokens": jax.ShapeDtypeStruct((windows, tokens), jnp.int32),
             "answers": jax.ShapeDtypeStruct((windows, tokens, config.d_model), DTYPE)}  # fmt: skip
    update = make_update(loss, optimizer, state_sharding=shardings)
    return update.trace(place(state, shardings), place(batch, by_window))
