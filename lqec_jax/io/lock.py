"""One writer of an output at a time, also across processes and hosts that share the disk."""

import inspect
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

from lqec_jax.errors import InputError
from lqec_jax.io.files import check_writable

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out there
    fcntl = None


@contextmanager
def hold(out: Path | None) -> Iterator[None]:
    """Keeps every other writer of `out` away while the block runs; None needs no keeping.

    The lock is the kernel's, on `.OUT.lock` beside `out`, so the death of its holder gives it back;
    the file is removed with it. Where a file system knows no locks, nobody is kept out.

    Raises:
      InputError: somebody holds it: who, where and since when; no file can be made there.
    """
    if out is None or not out.name or fcntl is None:
        yield
        return
    check_writable(out)
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    path = out.with_name(f".{out.name}.lock")
    descriptor = _take(path, out)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # what a refused call would leave of folders
            for folder in made:
                folder.rmdir()


def one_writer(verb: Callable) -> Callable:
    """Makes a verb hold its argument `out` from before it reads anything until it returns."""
    signature = inspect.signature(verb)

    @wraps(verb)
    def held(*arguments, **named):
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        out = bound.arguments["out"]
        with hold(None if out is None else Path(out)):
            return verb(*arguments, **named)

    return held


def _take(path: Path, out: Path) -> int:
    """Returns the descriptor that holds the lock."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                f"{out} cannot be written: {error.strerror}; choose another place"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            raise InputError(
                f"{out} is being written by {holder}; wait until it ends, or choose another name"
            ) from None
        except OSError:  # no locks on this file system
            return descriptor
        if _is_at(descriptor, path):
            _sign(descriptor)
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and locking it


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there, held = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def _sign(descriptor: int) -> None:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    holder = {"pid": os.getpid(), "host": platform.node(), "since": since}
    with suppress(OSError):  # a full disk; the lock holds without a name too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):  # it has not signed yet
        return "another process"
