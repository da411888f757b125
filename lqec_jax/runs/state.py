"""`state.json`: how far a run is, read as strictly as it is written.

The file ends with a digest of everything before it, so that what was edited, or only damaged, is
not taken for a fact. A run of an earlier version has none; its facts are checked all the same.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lqec_jax.core.hashing import hash_parts
from lqec_jax.errors import InputError
from lqec_jax.io.files import read_json, write_json

STATE, DIGEST = "state.json", "sha256"


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    write_json(folder / STATE, {**state, DIGEST: _digest(state)})


def read_state(folder: Path) -> dict[str, Any]:
    """Reads how far a run is.

    Raises:
      InputError: the file is missing or damaged; a fact that is missing, unknown, of another kind
        or out of range (named).
    """
    state = read_json(folder / STATE)
    digest = state.pop(DIGEST, None)
    if digest is not None and digest != _digest(state):
        raise _refuse(folder, "it is not as the run wrote it (sha256 differs)")
    for name in ("fingerprint", "phase", "blocks"):
        if name not in state:
            raise _refuse(folder, f"{name} is missing")
    for name, value in state.items():
        if name not in FACTS:
            raise _refuse(folder, f"{name[:40]!r} is no fact of a run")
        kind, holds = FACTS[name]
        if not holds(value):
            raise _refuse(folder, f"{name} is {str(value)[:80]}, {kind} was wanted")
    return state


def has_digest(folder: Path) -> bool:
    """Says whether a run is of a version that keeps digests."""
    return DIGEST in read_json(folder / STATE)


def _digest(state: Mapping[str, Any]) -> str:
    # Read back first: JSON makes a list of a tuple and a text of a number that is a key.
    return hash_parts([json.dumps(json.loads(json.dumps(state)))])


def _refuse(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder / STATE} is damaged: {reason}; restore it from a copy, or --overwrite in place "
        "of --resume begins the run again"
    )


# ---- what a fact may be


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_seconds(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_named(holds: Callable) -> Callable:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _is_list(holds: Callable) -> Callable:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_linear(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("steps", []), list)


def _is_fit(value: Any) -> bool:
    return isinstance(value, dict) and _is_count(value.get("phase"))


def _is_stage(value: Any) -> bool:
    return (
        _is_fit(value) and isinstance(value.get("name"), str) and _is_seconds(value.get("seconds"))
    )


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _is_file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"bytes", "sha256"}
        and _is_count(value["bytes"])
        and _is_digest(value["sha256"])
    )


def _is_stream(value: Any) -> bool:
    if not (isinstance(value, dict) and set(value) == {"slot", "bytes", "cut", "sums"}):
        return False
    pieces = value["sums"]
    whole = _is_count(value["bytes"]) and _is_count(value["cut"]) and value["cut"] > 0
    return (
        whole
        and value["slot"] in (0, 1)
        and _is_list(_is_digest)(pieces)
        and len(pieces) == -(-value["bytes"] // value["cut"])
    )


# Fact -> what it is in words, and the check of it.
FACTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "fingerprint": ("an object", lambda value: isinstance(value, dict)),
    "phase": ("a count", _is_count),
    "blocks": ("a count", _is_count),
    "phase_seconds": ("seconds", _is_seconds),
    "linears": ("an object of reports", _is_named(_is_linear)),
    "fits": ("a list of trainings", _is_list(_is_fit)),
    "stages": ("a list of stages", _is_list(_is_stage)),
    "fisher": ("true or false", _is_flag),
    "artifact": ("true or false", _is_flag),
    "files": ("an object of sizes and digests", _is_named(_is_file)),
    "streams": ("an object of sizes and digests", _is_named(_is_stream)),
}
