"""Files that are either whole or absent."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# The dtypes of safetensors, in the order in which a file keeps them.
_CODES = {"uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32",
          "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
          "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name, makes it durable, and renames it into place."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_tensors(path: Path, arrays: dict[str, np.ndarray], *, made_by: str = "lqec") -> None:
    """Writes a safetensors file under a temporary name and renames it; equal input, equal bytes.

    `made_by` is the metadata's `format`; transformers reads a file only where it is "pt".
    """
    temporary = path.with_name(path.name + ".tmp")
    # safetensors writes memory as it lies, so a transposed view would be stored wrong.
    whole = {name: np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
             for name in sorted(arrays)}  # fmt: skip
    save_file(whole, temporary, metadata={"format": made_by})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # safetensors makes it readable by its owner alone
    os.replace(temporary, path)


def measure_tensors(arrays: dict[str, np.ndarray], *, made_by: str = "lqec") -> int:
    """Returns the bytes of the file that `write_tensors` would write of these arrays.

    The format: 8 bytes of length, a JSON header filled up with spaces to a multiple of 8, the data.
    Arrays lie in order of dtype, then of name; offsets are in the header, so the order counts.
    """
    header: dict[str, Any] = {"__metadata__": {"format": made_by}}
    end = 0
    codes = {name: _CODES[array.dtype.name] for name, array in arrays.items()}
    order = list(_CODES.values())
    for name in sorted(arrays, key=lambda name: (order.index(codes[name]), name)):
        begin, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": codes[name], "shape": list(arrays[name].shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


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
