"""Checks an artifact against its own digests: every tensor, config, tokenizer and lqec.json."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lqec_jax.core.hashing import hash_arrays
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.io.artifact.artifact import load_shapes
from lqec_jax.io.artifact.digests import (
    META,
    find_changes,
    name_changed,
    read_digests,
    read_finite,
)
from lqec_jax.io.artifact.report import read_report
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.sources.tokenizer import Tokenizer, has_tokenizer
from lqec_jax.io.tensor_file import read_metadata

READERS = 4  # tensors in memory at once


@dataclass(frozen=True)
class CheckedArtifact:
    """An artifact that is as it was written.

    Attributes:
      tensors, bytes: how many were hashed, and their bytes.
      files: whose digests were compared, beside the weights.
    """

    folder: Path
    format: str
    tensors: int
    bytes: int
    files: tuple[str, ...]


def verify_artifact(folder: str | Path) -> CheckedArtifact:
    """Compares an artifact with the digests that it was written with; nothing is computed.

    Raises:
      CheckFailed: names what is damaged, missing, or not as it was written.
      InputError: the artifact was written before there were digests.
    Cost: reads every byte once; memory of four tensors.
    """
    folder = Path(folder)
    try:
        checked, faults = _compare(folder)
    except InputError as error:
        raise CheckFailed(str(error)) from error
    if checked is None:
        raise InputError(
            f"verify: {folder / META} has no digests, so nothing says what was written; load the "
            "artifact and save it again where you trust it"
        )
    if faults:
        raise CheckFailed(f"{folder}: {'; '.join(faults)}; restore the files or write it again")
    return checked


def _compare(folder: Path) -> tuple[CheckedArtifact | None, list[str]]:
    """Returns what was compared, None without digests, and what is wrong, in words."""
    meta, checkpoint, _, _ = load_shapes(folder)
    read_report(folder)
    if has_tokenizer(folder):
        Tokenizer.load(folder)
    digests = read_digests(folder, meta)
    if digests is None:
        return None, []
    faults = find_changes(folder, meta, digests, checkpoint.entries)
    faults += name_changed(_find_tensors(checkpoint, digests["tensors"]))
    for path in sorted({entry.file for entry in checkpoint.entries.values()}):
        if read_metadata(path) != {"format": "lqec"}:
            faults.append(f"the header of {path.name} is not as written")
    size = sum(entry.bytes for entry in checkpoint.entries.values())
    files = (META, *digests["files"])
    return CheckedArtifact(folder, "artifact", len(checkpoint.entries), size, files), faults


def _find_tensors(checkpoint: Checkpoint, digests: Mapping[str, Any]) -> list[str]:
    """Returns the names of tensors that have another digest; those without one are known."""
    names = [name for name in checkpoint.names() if name in digests]
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as pool:
        found = pool.map(partial(_hash_tensor, checkpoint), names)
        return [name for name, digest in zip(names, found, strict=True) if digest != digests[name]]


def _hash_tensor(checkpoint: Checkpoint, name: str) -> str:
    return hash_arrays([(name, read_finite(checkpoint, name))])
