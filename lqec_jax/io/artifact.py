"""The artifact folder: config.json and tokenizer as given, lqec.json, safetensors, report.json.

lqec.json says what every compressed weight is made of; the safetensors hold the arrays, in shards
with an index where they are large. The folder is written under a temporary name and renamed.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.tree import stack_blocks, unstack_blocks
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.files import replace_folder, write_json, write_tensors
from lqec_jax.io.hf import INDEX, SINGLE, Checkpoint, read_json
from lqec_jax.io.leaves import flatten, unflatten
from lqec_jax.io.tokenizer import Tokenizer, has_tokenizer
from lqec_jax.models import families
from lqec_jax.models.model import Model

FORMAT_VERSION = 1
META = "lqec.json"
REPORT = "report.json"
SHARD_BYTES = 4 * 2**30


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / META).is_file()


def save_artifact(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a compressed model as one folder.

    Raises:
      InputError: `out` exists and `overwrite` is not set.
    Returns:
      The folder.
    """
    out = Path(out)
    check_free(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        temporary.chmod(0o755)
        write_artifact(model, temporary)
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def check_free(out: Path, overwrite: bool) -> None:
    """Refuses an output that is already there."""
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists; choose another name, or add --overwrite to replace it")


def write_artifact(model: Model, folder: Path) -> None:
    """Writes the files of an artifact into an empty folder."""
    arrays, weights = name_arrays(model.params)
    shards = list(_shards(arrays))
    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0])
    else:
        index = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / name, shard)
            index |= dict.fromkeys(shard, name)
        write_json(folder / INDEX, {"weight_map": index})
    for path in model.tokenizer.files() if model.tokenizer else []:
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "config.json", model.raw_config)
    write_json(folder / REPORT, model.report)
    meta = {
        "format_version": FORMAT_VERSION,
        "recipe": model.recipe,
        "seed": model.report.get("seed"),
        "base_fingerprint": model.fingerprint,
        "versions": model.report.get("environment", {}).get("versions", {}),
        "weights": weights,
    }
    write_json(folder / META, meta)


def load_artifact(folder: str | Path, dtype: Any = jnp.float32) -> Model:
    """Reads an artifact; weights stay packed.

    Raises:
      InputError: a missing or damaged file, another format version, weights that are not there.
    """
    folder = Path(folder)
    meta = read_json(folder / META)
    if meta.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder / META}: format_version {meta.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}; upgrade lqec-jax"
        )
    checkpoint = Checkpoint.open(folder)
    arrays = {name: checkpoint.read(name) for name in checkpoint.names()}
    try:
        tree = unflatten(arrays, meta["weights"])
        blocks = tree.pop("blocks")
        tree["blocks"] = stack_blocks([blocks[str(i)] for i in range(len(blocks))])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder}: {META} and the weights do not belong together ({error}); write it again"
        ) from error
    return Model(
        config=families.read_config(checkpoint.config),
        params=jax.tree.map(jnp.asarray, tree),
        raw_config=checkpoint.config,
        tokenizer=Tokenizer.load(folder) if has_tokenizer(folder) else None,
        recipe=meta["recipe"],
        report=read_json(folder / REPORT) if (folder / REPORT).exists() else {},
        fingerprint=meta["base_fingerprint"],
        folder=folder,
        dtype=dtype,
    )


def name_arrays(params: Params) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Returns a model's arrays by name and the descriptions of its compressed weights."""
    blocks = {str(i): block for i, block in enumerate(unstack_blocks(params["blocks"]))}
    return flatten({**params, "blocks": blocks})


def _shards(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Cuts arrays, in order of name, into shards of at most `SHARD_BYTES` or one array."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name in sorted(arrays):
        if shard and size + arrays[name].nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = arrays[name]
        size += arrays[name].nbytes
    yield shard
