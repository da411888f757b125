"""Files and folders that are written whole or not at all, and JSON read with its faults named."""

import glob
import json
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lqec_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: what a killed run left is not removed there
    fcntl = None

# The dtypes of safetensors, in the order in which a file keeps them.
_CODES = {"uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32",
          "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16",
          "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Gives a name beside `path`; what is written there is made durable and takes its place.

    An exception leaves `path` as it was and nothing else; a kill leaves `path`.HOST-PID.tmp, which
    the next call for the same `path` on that host removes. No two processes have one name.
    """
    _remove_left(path)
    temporary = path.with_name(f"{path.name}.{_host()}-{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_left(path: Path) -> None:
    """Removes what processes of this host that live no more began to write for `path`."""
    if os.name != "posix":  # elsewhere signal 0 is no question
        return
    for left in path.parent.glob(f"{glob.escape(path.name)}.{_host()}-*.tmp"):
        pid = re.search(r"-(\d+)\.tmp$", left.name)
        if pid and not _lives(int(pid[1])):
            left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _host() -> str:
    """Returns this host in eight letters that any file system takes."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def read_json(path: str | Path) -> dict:
    """Reads one JSON object.

    Raises:
      InputError: the file is missing, is not UTF-8 JSON (file and line named), or is not an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; restore it or name another folder") from None
    except OSError as err:
        raise InputError(f"{path} cannot be read: {err.strerror}; wanted a JSON file") from err
    except json.JSONDecodeError as err:
        raise InputError(
            f"{path}, line {err.lineno}: not JSON ({err.msg}); the file is cut short or damaged, "
            "restore it"
        ) from err
    except UnicodeDecodeError as err:
        line = err.object[: err.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; restore the file") from err
    except (RecursionError, ValueError) as err:  # nested without end; a number of 5000 digits
        raise InputError(f"{path} cannot be read as JSON ({err}); restore the file") from err
    if not isinstance(value, dict):
        raise InputError(
            f"{path}, line 1: holds a {type(value).__name__}, wanted an object {{...}}"
        )
    return value


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, whole or not at all."""
    with staged_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, whole or not at all."""
    with staged_file(path) as temporary, temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def write_tensors(path: Path, arrays: dict[str, np.ndarray], *, made_by: str = "lqec") -> None:
    """Writes a safetensors file, whole or not at all; equal input, equal bytes.

    `made_by` is the metadata's `format`; transformers reads a file only where it is "pt".

    Raises:
      OSError: what the disk refuses, as of any other file.
    """
    # safetensors writes memory as it lies, so a transposed view would be stored wrong.
    whole = {name: np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
             for name in sorted(arrays)}  # fmt: skip
    with staged_file(path) as temporary:
        try:
            save_file(whole, temporary, metadata={"format": made_by})
        except SafetensorError as error:
            raise _as_os_error(error, path) from error
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes it readable by its owner alone


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """Returns the disk's own error where safetensors wrapped one, which is no OSError there."""
    number = re.search(r"os error (\d+)", str(error))
    if not number:
        return error
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path))


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


def check_writable(out: Path) -> None:
    """Refuses an output for which no folder can be made.

    Raises:
      InputError: the nearest folder above it that is there may not be written to.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(
            f"{out} cannot be written: {parent} is no folder that you may write to; choose another "
            "place"
        )


@contextmanager
def staged_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `out` that takes its name when all has been written to it.

    An exception leaves nothing of it. A kill leaves a hidden folder, `.OUT-*.partial`, which the
    next call for the same `out` removes; what another process is writing now is left alone.

    Args:
      replace: a folder at `out` gives way; without it none is ever lost.
    Raises:
      InputError: `out` cannot be written.
      OSError: something came to be at `out` meanwhile, and `replace` is not set.
    """
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in _find_beside(out, ".partial"):
        _remove_unless_held(left)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=out.parent))
    held = os.open(temporary, os.O_RDONLY)
    try:
        # Where the file system knows no locks, nobody can take one to remove the folder either.
        with suppress(OSError):
            _lock(held, "LOCK_SH")
        temporary.chmod(0o755)
        yield temporary
        if replace:
            replace_folder(temporary, out)
        else:
            os.rename(temporary, out)
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(finished: Path, target: Path) -> None:
    """Moves a finished folder to its name; an older one there disappears only afterwards."""
    if target.exists():
        # A name of its own: beside OUT may lie an OUT.old that is the user's.
        old = tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".old", dir=target.parent)
        os.replace(target, Path(old) / target.name)
    os.replace(finished, target)
    for old in _find_beside(target, ".old"):  # a killed run's too
        shutil.rmtree(old, ignore_errors=True)


def _find_beside(out: Path, suffix: str) -> list[Path]:
    """Returns the folders that `mkdtemp` made beside `out` with this suffix."""
    return list(out.parent.glob(f".{glob.escape(out.name)}-{'[a-z0-9_]' * 8}{suffix}"))


def _remove_unless_held(folder: Path) -> None:
    """Removes a folder that no living process has locked."""
    with suppress(OSError):  # locked, or removed by another
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(descriptor, "LOCK_EX")
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, kind: str) -> None:
    """Takes a lock or raises OSError, at once."""
    if fcntl is None:
        raise OSError("no locks here")
    fcntl.flock(descriptor, getattr(fcntl, kind) | fcntl.LOCK_NB)
