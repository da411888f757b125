"""Files that are either whole or absent."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, makes it durable, and renames it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_tensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file under a temporary name and renames it; equal input, equal bytes."""
    temporary = path.with_name(path.name + ".tmp")
    # safetensors writes memory as it lies, so a transposed view would be stored wrong.
    whole = {name: np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
             for name in sorted(arrays)}  # fmt: skip
    save_file(whole, temporary, metadata={"format": "lqec"})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # safetensors makes it readable by its owner alone
    os.replace(temporary, path)


def replace_folder(finished: Path, target: Path) -> None:
    """Moves a finished folder to its name; an older one there disappears only afterwards."""
    if not target.exists():
        os.replace(finished, target)
        return
    # A name of its own: beside OUT may lie an OUT.old that is the user's.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / target.name)
    os.replace(finished, target)
    shutil.rmtree(old, ignore_errors=True)
