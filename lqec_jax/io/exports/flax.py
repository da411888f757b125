"""Flax: our models as a plain linen module with a plain parameter tree, and msgpack files.

The folder holds config.json, the tokenizer, and safetensors whose names are the tree's paths joined
by '/'. Blocks of one structure are stacked on a leading axis, so that the module scans over them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict

from lqec_jax.core.tree import is_compressed
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_jax.io.exports.record import read_record
from lqec_jax.io.exports.walk import cast, to_dense, write_config
from lqec_jax.io.files import read_json, write_json
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.tensor_file import write_weights
from lqec_jax.models import families
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.flax_module import Decoder
from lqec_jax.models.model import Model

WEIGHTS = "flax_weights.json"


def write(model: Model, folder: Path, dtype: np.dtype | None, *, dense: bool = False) -> list[str]:
    """Writes the tree's arrays and, as JSON, what its packed weights are made of.

    Args:
      dense: packed weights are unpacked.
    Raises:
      InputError: a weight holds values that `dtype` cannot.
    """
    params = _unpack(model.params) if dense else model.params
    arrays, weights = flatten({**params, "blocks": _number(params["blocks"])})
    tensors = (_cast(name, arrays[name], dtype) for name in sorted(arrays))
    write_weights(folder, tensors)
    write_json(folder / WEIGHTS, weights)
    write_config(model, folder, dtype)
    return ["module, params = lqec_jax.load_flax(folder); module.apply({'params': params}, ids)"]


def load(folder: str | Path, dtype: Any = jnp.float32) -> tuple[nn.Module, dict[str, Any]]:
    """Reads a flax export.

    Args:
      dtype: of activations.
    Returns:
      A linen module and its parameters: nested dicts of arrays, packed weights still packed.
    Raises:
      InputError: the folder is no flax export, or it is damaged.
    Example:
      >>> module, params = lqec_jax.load_flax("small-flax")
      >>> logits = module.apply({"params": params}, tokens)  # int [b, t] -> float32 [b, t, vocab]
      >>> # The same through nnx; eval_shape spares the zeros that update would replace:
      >>> init = lambda: nnx.bridge.ToNNX(module).lazy_init(tokens, rngs=nnx.Rngs(0))
      >>> model = nnx.eval_shape(init)
      >>> nnx.update(model, nnx.State(params))
      >>> logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    """
    folder = Path(folder)
    if read_record(folder)["format"] != "flax":
        raise InputError(f"{folder} is no flax export; write one with lqec export --format flax")
    checkpoint = Checkpoint.open(folder)
    flat = {name: jnp.asarray(checkpoint.read(name)) for name in checkpoint.names()}
    params = unflatten_dict(flat, sep="/")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    fns = model_fns(families.read_config(checkpoint.config), dtype)
    weights = read_json(folder / WEIGHTS)
    return Decoder(fns, _freeze(shapes), _freeze(weights), build_params), params


def build_params(values: Mapping[str, Any], weights: Mapping[str, Any]) -> Params:
    """Returns the decoder's tree over a plain one: packed weights put together, nothing copied."""
    tree = unflatten(flatten_dict(values, sep="."), weights)
    blocks = tree.pop("blocks")
    return {**tree, "blocks": tuple(blocks[str(number)] for number in range(len(blocks)))}


def _freeze(value: Any) -> Any:
    """Returns nested dicts and lists as hashable ones."""
    if isinstance(value, Mapping):
        return FrozenDict({key: _freeze(inner) for key, inner in value.items()})
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _unpack(params: Params) -> Params:
    def dense(node: Any) -> Any:
        return to_dense(node) if is_compressed(node) else node

    return jax.tree.map(dense, params, is_leaf=is_compressed)


def _number(segments: tuple[Params, ...]) -> dict[str, Params]:
    return {str(number): segment for number, segment in enumerate(segments)}


def _cast(name: str, array: np.ndarray, dtype: np.dtype | None) -> tuple[str, np.ndarray]:
    """Returns a tensor as it is stored; integers, codes and zeros, are left alone."""
    path = name.replace(".", "/")
    return path, cast(array, dtype if jnp.issubdtype(array.dtype, jnp.floating) else None, path)
