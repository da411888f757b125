"""The artifact folder: config.json, tokenizer, lqec.json, safetensors, the report, its pages.

lqec.json says what every compressed weight is made of; the safetensors hold the arrays, in shards
with an index where they are large. The folder is written under a temporary name and renamed. Pages
for people, made of the report, are texts that the caller hands over.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.tree import each_block, get_at, stack_blocks
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.digests import (
    DIGESTS,
    META,
    Hashing,
    choose_check,
    find_changes,
    make_digests,
    read_digests,
    read_tensors,
)
from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_jax.io.artifact.report import REPORT, read_report
from lqec_jax.io.carried import copy_carried
from lqec_jax.io.files import check_writable, read_json, staged_folder, write_json, write_text
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.sources.tokenizer import Tokenizer, has_tokenizer
from lqec_jax.io.tensor_file import write_weights
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.model import Model
from lqec_jax.models.parameters import with_constants
from lqec_kernels.formats import CompressedLinear

FORMAT_VERSION = 1


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / META).is_file()


def save_artifact(
    model: Model, out: str | Path, pages: Mapping[str, str], *, overwrite: bool = False
) -> Path:
    """Writes a compressed model as one folder.

    Args:
      pages: name of a file -> its text, written beside the weights for people to read.
    Raises:
      InputError: `out` exists and `overwrite` is not set.
    Returns:
      The folder.
    """
    out = Path(out)
    check_free(out, overwrite)
    with staged_folder(out, replace=overwrite) as temporary:
        write_artifact(model, temporary, pages)
    return out


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses an output that is already there, and one that cannot be written.

    Raises:
      InputError: `out` exists, and either `overwrite` is not set or it is no artifact: replacing
        removes what is there, which must not be anyone's model or home.
    """
    if os.path.lexists(out):
        if not is_artifact(out):
            raise InputError(f"{out} exists and is no lqec artifact; choose another name")
        if not overwrite:
            raise InputError(f"{out} exists; choose another name, or add --overwrite to replace it")
    check_writable(out)


def write_artifact(model: Model, folder: Path, pages: Mapping[str, str]) -> None:
    """Writes the files of an artifact, and its pages, into an empty folder."""
    arrays, weights = name_arrays(model.params)
    hashing = Hashing(sorted(arrays.items()))
    write_weights(folder, hashing, made_by="lqec")
    copy_carried(model, folder)
    write_json(folder / "config.json", model.raw_config)
    write_json(folder / REPORT, model.report)
    for name, text in pages.items():
        write_text(folder / name, text)
    meta = {
        "format_version": FORMAT_VERSION,
        "recipe": model.recipe,
        "seed": model.report.get("seed"),
        "base_fingerprint": model.fingerprint,
        "versions": model.report.get("environment", {}).get("versions", {}),
        "weights": weights,
        **({"made": dict(model.made)} if model.made else {}),
    }
    write_json(folder / META, meta | {DIGESTS: make_digests(folder, meta, hashing.digests)})


def load_artifact(folder: str | Path, dtype: Any = jnp.float32, check: str = "auto") -> Model:
    """Reads an artifact; weights stay packed.

    Names, shapes and whether every number is finite are looked at always.

    Args:
      check: what is compared with the digests on record; see `digests.choose_check`.
    Raises:
      InputError: a missing or damaged file, another format version, weights that are not there,
        numbers that are not finite; what is not as it was written, by name.
    """
    folder = Path(folder)
    meta, checkpoint, config, _ = load_shapes(folder)
    check, report = choose_check(check, checkpoint), read_report(folder)
    digests = read_digests(folder, meta) if check != "none" else None
    faults = find_changes(folder, meta, digests, checkpoint.entries) if digests else []
    _refuse_changes(folder, faults)  # before minutes of reading
    tensors = digests["tensors"] if digests and check == "full" else None
    arrays, faults = read_tensors(checkpoint, tensors)
    _refuse_changes(folder, faults)
    tree = unflatten(arrays, meta["weights"])
    blocks = tree.pop("blocks")
    tree["blocks"] = stack_blocks([blocks[str(layer)] for layer in range(config.layers)])
    return Model(
        config=config,
        params=jax.tree.map(jnp.asarray, tree),
        raw_config=checkpoint.config,
        tokenizer=Tokenizer.load(folder) if has_tokenizer(folder) else None,
        recipe=meta["recipe"],
        report=report,
        fingerprint=meta["base_fingerprint"],
        folder=folder,
        dtype=dtype,
        made=meta.get("made", {}),
    )


def _refuse_changes(folder: Path, faults: list[str]) -> None:
    if faults:
        raise InputError(
            f"{folder}: {'; '.join(faults)}; restore the files, or take them as they are with "
            "--check none"
        )


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads lqec.json.

    Raises:
      InputError: another format version; an entry that is missing or of another type.
    """
    meta = read_json(folder / META)
    if meta.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / META}: format_version {meta.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}; upgrade lqec-jax"
        )
    for name, kind in (("recipe", str), ("base_fingerprint", str), ("weights", dict)):
        if not isinstance(meta.get(name), kind):
            raise InputError(f"{folder / META}: {name} is missing or damaged; write it again")
    if not isinstance(meta.get("made", {}), dict):
        raise InputError(f"{folder / META}: made is damaged; restore the file")
    return meta


def load_shapes(folder: Path) -> tuple[dict, Checkpoint, ModelConfig, Params]:
    """Opens an artifact and reads no array.

    Returns:
      lqec.json, the opened weights, the model, and its parameters as shapes, 'blocks' a list.
    Raises:
      InputError: as `load_artifact`.
    """
    meta, checkpoint = read_meta(folder), Checkpoint.open(folder)
    config = families.read_config(checkpoint.config)
    shapes = {n: jax.ShapeDtypeStruct(e.shape, e.dtype) for n, e in checkpoint.entries.items()}
    try:
        tree = unflatten(shapes, meta["weights"])
        blocks = tree.pop("blocks")
        tree["blocks"] = [blocks.pop(str(layer)) for layer in range(config.layers)]
        _check_shapes(config, tree)
        if blocks:
            raise ValueError(f"there are blocks {', '.join(blocks)} more")
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder}: {META}, config.json and the weights do not belong together ({reason}); "
            "write it again"
        ) from error
    return meta, checkpoint, config, tree


def _check_shapes(config: ModelConfig, tree: Params) -> None:
    """Raises ValueError where names or shapes are not those that config.json asks for."""
    family = families.family(config.family)
    outer = {path: stored.inner_shape for path, stored in family.outer_tensors(config).items()}
    block = family.block_shapes(config)
    constants = name_leaves(with_constants(config, 0, {}))
    bare = {name: node for name, node in tree.items() if name != "blocks"}
    for part, shapes in [(bare, outer), *((part, block) for part in tree["blocks"])]:
        strange = name_leaves(part) - set(shapes) - (constants if shapes is block else set())
        if strange:
            raise ValueError(f"{min(strange)} is no weight of this model")
        for path, shape in shapes.items():
            leaf = get_at(part, path)
            if isinstance(leaf, CompressedLinear):
                leaf = jax.eval_shape(CompressedLinear.dense, leaf)
            if leaf.shape != shape:
                raise ValueError(f"{path} is {list(leaf.shape)}, not {list(shape)}")


def name_leaves(tree: Params, prefix: str = "") -> set[str]:
    """Returns the paths of arrays and compressed weights in nested dicts."""
    if not isinstance(tree, dict):
        return {prefix.removesuffix("/")}
    return {path for key, node in tree.items() for path in name_leaves(node, f"{prefix}{key}/")}


def name_arrays(params: Params) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Returns a model's arrays by name and the descriptions of its compressed weights."""
    blocks = {str(number): block for number, block in enumerate(each_block(params))}
    return flatten({**params, "blocks": blocks})
