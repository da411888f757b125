"""Reads other people's Flax trees: transformers-v4 msgpack checkpoints, plain linen trees.

Their modules are named as in the Hugging Face checkpoint, with '/' for '.'; a kernel is
[d_in, d_out] already, an embedding is 'embedding', a norm's vector 'weight' or 'scale'.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from flax.traverse_util import flatten_dict

from lqec_jax.core.hashing import hash_arrays
from lqec_jax.core.tree import set_at, stack_blocks
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.files import read_json
from lqec_jax.io.sources.tokenizer import find_tokenizer
from lqec_jax.io.tensor_file import INDEX, SINGLE
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import StoredTensor
from lqec_jax.models.model import Model
from lqec_jax.models.parameters import with_constants

MSGPACK = "flax_model.msgpack"
MSGPACK_INDEX = "flax_model.msgpack.index.json"
_LAYER = re.compile(r"(layers?|blocks?|h)_(\d+)")
_ROOTS = ("params", "model")  # what wraps a tree, and is left out of names


def is_flax_checkpoint(folder: str | Path) -> bool:
    """Says whether a folder has Flax weights and no safetensors, which are read rather."""
    folder = Path(folder)
    has_flax = any((folder / name).is_file() for name in (MSGPACK, MSGPACK_INDEX))
    return has_flax and not any((folder / name).exists() for name in (SINGLE, INDEX))


def load_flax_checkpoint(folder: str | Path, dtype: Any = jnp.float32) -> Model:
    """Reads config.json and flax_model.msgpack, in one file or in shards, and the tokenizer.

    Args:
      dtype: of activations.
    Raises:
      InputError: as `from_flax`; a file is missing or damaged.
    Cost: host memory of the whole file once more than the model.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    files = [folder / MSGPACK]
    if not files[0].is_file():
        files = [folder / name for name in _read_shards(folder / MSGPACK_INDEX)]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise InputError(
            f"{folder}: {missing[0] if missing else 'its shards'} missing; download it"
        )
    flat: dict[str, np.ndarray] = {}
    for path in files:
        shard = read_msgpack(path)
        twice = [n for n in shard if n in flat and not np.array_equal(shard[n], flat[n])]
        if twice:
            raise InputError(
                f"{path}: {twice[0]!r} lies in an earlier shard too, with different values; the "
                "shards are of two versions, download them again"
            )
        flat |= shard
    model = from_flax(raw, flat)
    return replace(model, tokenizer=find_tokenizer(folder), folder=folder, dtype=dtype)


def read_msgpack(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of `flax.serialization.to_bytes` as arrays by '/'-joined path.

    Raises:
      InputError: it is no msgpack, is cut short, or holds no tree of arrays.
    """
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as err:
        reason = " ".join(str(err).split())[:200] or type(err).__name__
        raise InputError(
            f"{path}: not a whole Flax msgpack file ({reason}); download it again"
        ) from err
    if not isinstance(tree, Mapping):
        raise InputError(f"{path}: holds a {type(tree).__name__}, wanted a tree of parameters")
    return flatten_dict(tree, sep="/")


def _read_shards(path: Path) -> list[str]:
    """Returns the files that an index names, each once, in order."""
    names = read_json(path).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange or not names:
        came = f"names {strange[0]!r}" if strange else "names no shard"
        raise InputError(f"{path} {came}; wanted files in this folder, download the index again")
    return sorted(set(names))


def from_flax(
    config: Mapping[str, Any],
    tree: Mapping[str, Any],
    *,
    rename: Callable[[str], str] | None = None,
) -> Model:
    """Makes a model of a Flax parameter tree.

    Args:
      config: the model's config.json, parsed.
      tree: nested dicts of arrays; a 'params' or 'model' around it does not matter. Kernels are
        [d_in, d_out], or have heads as an axis of their own (DenseGeneral). Partitioning boxes are
        taken off.
      rename: from a path in `tree` to the path transformers' Flax models use, as
        'model/layers/0/self_attn/q_proj/kernel', where modules are named otherwise.
    Returns:
      A dense Model; its arrays keep their dtype.
    Raises:
      InputError: arrays that are missing, unknown, of another shape, not floating, not finite.
    Example:
      >>> model = from_flax(json.load(open("config.json")), variables["params"])
    """
    parsed = families.read_config(config)
    named = _name_arrays(tree, rename)
    family = families.family(parsed.family)
    outer = _take_tree(named, family.outer_tensors(parsed), parsed)
    tensors = family.block_tensors(parsed)
    blocks = []
    for layer in range(parsed.layers):
        block = {p: s._replace(name=s.name.format(layer=layer)) for p, s in tensors.items()}
        blocks.append(with_constants(parsed, layer, _take_tree(named, block, parsed)))
    _check_rest(named, outer, parsed)
    params = {**outer, "blocks": stack_blocks(blocks)}
    return Model(
        config=parsed,
        params=jax.tree.map(jnp.asarray, params),
        raw_config=dict(config),
        fingerprint=_fingerprint(params),
    )


def _name_arrays(tree: Mapping[str, Any], rename: Callable | None) -> dict[str, np.ndarray]:
    """Returns arrays by normal name: 'layers/0/...', roots left out."""
    named: dict[str, np.ndarray] = {}
    for path, value in _walk(tree, ""):
        words = (rename(path) if rename else path).split("/")
        while words[0] in _ROOTS:
            words = words[1:]
        name = _LAYER.sub(r"\1/\2", "/".join(words))
        unboxed = value.unbox() if hasattr(value, "unbox") else value
        named[name] = np.asarray(jax.device_get(unboxed))
    return named


def _walk(tree: Mapping[str, Any], prefix: str):
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _walk(value, path)
        else:
            yield path, value


def _take_tree(named: dict, tensors: Mapping[str, StoredTensor], config: ModelConfig) -> Params:
    """Moves arrays out of `named` into a nested dict of ours."""
    tree: Params = {}
    for path, stored in tensors.items():
        tree = set_at(tree, path, _take(named, stored, config))
    return tree


def _take(named: dict[str, np.ndarray], stored: StoredTensor, config: ModelConfig) -> np.ndarray:
    names = flax_names(stored)
    name = next((n for n in names if n in named), None)
    if name is None:
        raise InputError(
            f"Flax tree: {names[0]!r} is missing for a {config.family} of {config.layers} layers; "
            f"left are {', '.join(sorted(named)[:3]) or 'none'}; give rename= where modules are "
            "named otherwise"
        )
    array = named.pop(name)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"Flax tree: {name!r} is {array.dtype}, wanted floating weights")
    if array.ndim > len(stored.shape) and array.size == np.prod(stored.shape):
        array = array.reshape(stored.inner_shape)  # heads and their channels are one axis
    if array.shape != tuple(stored.inner_shape):
        raise InputError(
            f"Flax tree: {name!r} is {list(array.shape)}, config.json asks for "
            f"{list(stored.inner_shape)}; the config and the tree are of two models"
        )
    if not np.isfinite(array).all():
        raise InputError(f"Flax tree: {name!r} holds NaN or Inf; give finite weights")
    return array


def flax_names(stored: StoredTensor) -> list[str]:
    """Returns the names that a checkpoint's tensor may have in a Flax tree, roots left out."""
    module, _, last = stored.name.removeprefix("model.").rpartition(".")
    if last != "weight":
        leaves = [last]
    elif stored.transposed:
        leaves = ["kernel"]
    else:
        leaves = ["embedding"] if len(stored.shape) == 2 else ["weight", "scale"]
    return [f"{module}.{leaf}".replace(".", "/") for leaf in leaves]


def _check_rest(named: dict[str, np.ndarray], outer: Params, config: ModelConfig) -> None:
    """Refuses arrays that found no place; a tied head may be there again."""
    head = named.pop("lm_head/kernel", None)
    if head is not None and not np.array_equal(head, outer["embed"]["embedding"].T):
        raise InputError(
            "Flax tree: 'lm_head/kernel' differs from the embedding, but config.json says "
            "tie_word_embeddings: true; set it to false to use this head"
        )
    if named:
        raise InputError(
            f"Flax tree: {len(named)} arrays that a {config.family} of {config.layers} layers does "
            f"not have: {', '.join(sorted(named)[:3])}; dropping weights would change the model"
        )


def _fingerprint(params: Params) -> str:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return hash_arrays((jax.tree_util.keystr(path), np.asarray(array)) for path, array in leaves)
