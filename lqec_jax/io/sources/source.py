"""What lies in a folder, decided once, and where dense weights are read from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lqec_jax.core.tree import unstack_blocks
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import is_artifact
from lqec_jax.io.exports.record import RECORD, read_record
from lqec_jax.io.sources.flax import is_flax_checkpoint, load_flax_checkpoint
from lqec_jax.io.sources.hf import (
    Checkpoint,
    check_tensors,
    find_folder,
    read_block,
    read_outer,
)
from lqec_jax.io.sources.tokenizer import find_tokenizer
from lqec_jax.io.tensor_file import INDEX, SINGLE
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Family
from lqec_jax.models.model import Model

# Dense blocks that take no more than so many bytes together are read once, where several phases of
# a run read them; those of a larger model are read again.
KEPT_BYTES = 2**28

# Ours; one of our exports but 'hf', whose folder is a dense checkpoint; safetensors as Hugging Face
# lays them out; transformers' flax_model.msgpack; no weights, perhaps a config.json.
Kind = Literal["artifact", "export", "dense", "flax", "bare"]


@dataclass(frozen=True)
class Found:
    """A folder that is there, and what lies in it; nothing of it has been read."""

    folder: Path
    kind: Kind


@dataclass(frozen=True)
class Source:
    """Where dense weights come from, one block at a time.

    Attributes:
      config: the model.
      outer: embedding, norm and head.
      block: layer number -> one block's tree, kernels [d_in, d_out].
      fingerprint: sha256 of the checkpoint.
      raw_config: config.json, parsed.
      tokenizer: None where there is none.
      folder: None for a model that was never on disk.
    """

    config: ModelConfig
    outer: Params
    block: Callable[[int], Params]
    fingerprint: str
    raw_config: Mapping[str, Any]
    tokenizer: Any
    folder: Path | None


def open_folder(name: str | Path) -> Found:
    """Decides what lies in a folder; nobody else asks.

    Args:
      name: a folder, a hub id, or 'demo'; see `hf.find_folder`.
    Raises:
      InputError: there is no such folder.
    """
    folder = find_folder(name)
    return Found(folder, _find_kind(folder))


def _find_kind(folder: Path) -> Kind:
    if is_artifact(folder):
        return "artifact"
    if (folder / RECORD).is_file() and read_record(folder)["format"] != "hf":
        return "export"
    if is_flax_checkpoint(folder):
        return "flax"
    return "dense" if any((folder / name).exists() for name in (SINGLE, INDEX)) else "bare"


def open_dense(found: Found) -> tuple[Checkpoint, ModelConfig, Family]:
    """Opens safetensors of dense weights; names and shapes are checked, no weight is read.

    Raises:
      InputError: what is there is compressed, or an export that only its own tool reads; no
        weights; as `Checkpoint.open`, `read_config` and `check_tensors`.
    """
    if found.kind == "artifact":
        raise InputError(
            f"{found.folder} is compressed already; name the dense folder it was made from"
        )
    if found.kind == "export":
        raise InputError(
            f"{found.folder} is an export for other tools, which is not read back; name the "
            "artifact it was written from"
        )
    checkpoint = Checkpoint.open(found.folder)
    config = families.read_config(checkpoint.config)
    family = families.family(config.family)
    check_tensors(checkpoint, family, config)
    return checkpoint, config, family


def read_source(found: Found) -> Source:
    """Reads a dense checkpoint's outer arrays, and all its bytes once to check and to name them.

    Raises:
      InputError: as `open_dense`; a weight that is not finite.
    """
    if found.kind == "flax":
        return make_source(load_flax_checkpoint(found.folder))
    checkpoint, config, family = open_dense(found)
    stored = checkpoint.dtype(family.outer_tensors(config)["embed/embedding"].name)
    return Source(
        config=config,
        outer=read_outer(checkpoint, family, config, stored),
        block=lambda layer: read_block(checkpoint, family, config, layer, stored),
        fingerprint=checkpoint.fingerprint(),
        raw_config=checkpoint.config,
        tokenizer=find_tokenizer(checkpoint.folder),
        folder=checkpoint.folder,
    )


def make_source(model: Model) -> Source:
    """Gives the weights of a dense model in memory.

    Raises:
      InputError: the model is compressed; a weight that is not finite.
    """
    if model.recipe:
        raise InputError("compress: the model is compressed already; give the dense one")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.params)):
        raise InputError("compress: the model's weights hold NaN or Inf; give finite ones")
    blocks = unstack_blocks(model.params["blocks"])
    outer = {name: value for name, value in model.params.items() if name != "blocks"}
    return Source(
        config=model.config,
        outer=outer,
        block=lambda layer: blocks[layer],
        fingerprint=model.fingerprint,
        raw_config=model.raw_config,
        tokenizer=model.tokenizer,
        folder=model.folder,
    )


def keep_blocks(source: Source) -> Source:
    """Returns the source with each block read once, where all of them take little memory."""
    kept: dict[int, Params] = {}

    def block(layer: int) -> Params:
        if layer in kept:
            return kept[layer]
        read = source.block(layer)
        if keeps_blocks(sum(leaf.nbytes for leaf in jax.tree.leaves(read)), source.config):
            kept[layer] = read
        return read

    return replace(source, block=block)


def keeps_blocks(block_bytes: int, config: ModelConfig) -> bool:
    """Says whether `keep_blocks` keeps blocks of so many bytes each."""
    return block_bytes * config.layers <= KEPT_BYTES
