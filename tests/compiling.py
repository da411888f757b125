"""How programs are compiled in the tests: quickly, because nearly every one of them runs once.

And how long they are kept: a worker holds thousands of them, of one to ten megabytes each.
"""

import ctypes
import gc
import mmap
import os
import resource
import sys
from pathlib import Path

import jax
import jaxlib

# Bytes a process may hold before it drops its programs, and how many more where that did not help.
MAY_HOLD, MORE = 1300 << 20, 200 << 20
# XLA's emitter of CPU loops. The one before it takes half of what compiling still takes once
# nothing is optimized.
EMITTERS = "xla_cpu_use_fusion_emitters"
TURNED_OFF = f"--{EMITTERS}=false"


def compile_quickly() -> None:
    """Turns optimizations off, in this process and in those it starts.

    Must come before the first compilation: XLA reads its flags once.
    """
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    # Which line an operation comes from is a seventh of compiling a small program.
    os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
    jax.config.update("jax_traceback_in_locations_limit", 0)
    flags = os.environ.get("XLA_FLAGS", "")
    if TURNED_OFF not in flags and _is_known_to_xla(EMITTERS):
        os.environ["XLA_FLAGS"] = f"{flags} {TURNED_OFF}".strip()


def _is_known_to_xla(flag: str) -> bool:
    # One that is not known ends the process, and nothing lists those that are.
    library = Path(jaxlib.__file__).with_name("libjax_common.so")
    if not library.is_file():
        return False
    with library.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            # As a string of its own: versions without the flag still name it among reserved fields.
            return code.find(b"\0" + flag.encode() + b"\0") >= 0


def options_for_memory() -> dict[str, bool | int]:
    """Returns the options that give a program the memory it has outside of the tests.

    What is fused, and so what is held, depends on the emitter; machine code is of no account.
    """
    emitters = {EMITTERS: True} if TURNED_OFF in os.environ.get("XLA_FLAGS", "") else {}
    return emitters | {"xla_backend_optimization_level": 0}


class Programs:
    """Compiled programs of this process, dropped where they hold too much."""

    def __init__(self):
        self._limit = MAY_HOLD

    def keep_few(self) -> None:
        """Drops all of them if the process holds more than it may; what is needed comes again."""
        if held_bytes() < self._limit:
            return
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # nothing else gives freed memory back
        self._limit = max(MAY_HOLD, held_bytes() + MORE)


def held_bytes() -> int:
    """Returns what the process holds in memory; its peak where nothing tells the present."""
    pages = Path("/proc/self/statm")
    if pages.is_file():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10
