"""The index of a checkpoint in shards: what it names must be what the shards hold, once.

Weights that nobody reads, or that are read from one of two places, change a model without a word.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqec_jax.errors import InputError, shorten
from lqec_jax.io.tensor_file import TensorEntry, read_header, same_bytes

INERT = re.compile(r".*rotary_emb\.inv_freq")  # a constant that old checkpoints saved
_log = logging.getLogger(__name__)


def read_index(path: Path, index: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Returns the tensors of an index, each checked to be in its shard and in no other.

    Args:
      path: of the index; its shards lie beside it.
      index: what it holds.
    Raises:
      InputError: no map of tensors to files of this folder; a shard is missing or damaged; index
        and shards disagree about what there is; a tensor in two shards with different values.
    """
    folder, weight_map = path.parent, index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path} has no weight_map {{tensor: file}}; download the index again")
    shards = {shard for shard in weight_map.values() if _is_shard_name(shard)}
    strange = [name for name, shard in weight_map.items() if not _is_shard_name(shard)]
    if strange:
        raise InputError(
            f"{path}: the shard of {few(strange)} is no file name in this folder; repair the index"
        )
    lost = sorted(shard for shard in shards if not (folder / shard).is_file())
    if lost:
        raise InputError(
            f"{folder}: {len(lost)} of {len(shards)} shards missing: {few(lost)}; download them"
        )
    headers = {shard: read_header(folder / shard) for shard in sorted(shards)}
    absent = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if absent:
        raise InputError(
            f"{path} names {count(absent)} that the shard does not hold: {few(absent)}; the "
            "index and the shards are of two versions, download both again"
        )
    entries = {name: headers[shard][name] for name, shard in weight_map.items()}
    _check_strays(path, entries, headers)
    _check_twice(path, entries, headers)
    return entries


def _check_strays(
    path: Path, entries: Mapping[str, TensorEntry], headers: Mapping[str, Mapping]
) -> None:
    """Refuses tensors of the shards that the index does not name: nobody would read them."""
    strays = sorted({name for header in headers.values() for name in header} - set(entries))
    lost = [name for name in strays if not INERT.fullmatch(name)]
    if lost:
        where = next(shard for shard, header in headers.items() if lost[0] in header)
        raise InputError(
            f"{path} does not name {count(lost)} that the shards hold: {few(lost)} ({where}); "
            "dropping weights would change the model, so download the index and the shards again"
        )
    if strays:
        _say(f"{path} does not name {few(strays)}, constants that are not needed; not read")


def _check_twice(
    path: Path, entries: Mapping[str, TensorEntry], headers: Mapping[str, Mapping]
) -> None:
    """Refuses tensors that lie in two shards with different values."""
    for shard, header in headers.items():
        for name, entry in header.items():
            known = entries.get(name, entry)
            if known.file == entry.file or INERT.fullmatch(name) or same_bytes(known, entry):
                continue
            raise InputError(
                f"{path.parent}: {name!r} lies in {known.file.name} and in {shard} with different "
                "values; the shards are of two versions, download them again"
            )


def _say(line: str) -> None:
    _log.warning("%s", shorten(line))


def _is_shard_name(shard: object) -> bool:
    return isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard


def say_unread(folder: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Logs which safetensors of a folder are not read, as a `consolidated.safetensors`."""
    read = {entry.file.name for entry in entries.values()}
    unread = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in read)
    if unread:
        _say(f"{folder}: {few(unread)} beside the weights not read")


def count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def few(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
