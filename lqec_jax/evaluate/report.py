"""report.json: what a run did and measured, for people and for programs."""

import ctypes
import gc
import math
import platform
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lqec_jax.errors import InputError

PACKAGES = (
    "lqec-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "safetensors",
    "tokenizers",
)
SKIPPED = (
    ("embed", "an embedding is looked up, not multiplied by; kept as it came"),
    ("norm", "a norm has one number a channel; kept as it came, in every block too"),
    ("head", "the head decides tokens directly and is kept as it came, as in the papers"),
)


def build_report(
    state: Mapping[str, Any],
    *,
    recipe: str,
    seed: int,
    dtype: str,
    base: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Puts a run's measurements together.

    Args:
      state: the run's, see `runs.folder`.
      base: what is known of the dense model, see `card.describe_base`.
    Returns:
      `base, recipe, seed, bits_per_weight, stages, linears, fits, skipped, peak_rss_mb, seconds,
      environment`. Bits are over the linears that were compressed; seconds are the stages' sum; a
      number that is not finite is None.
    """
    linears = list(state.get("linears", {}).values())
    weights = [linear["d_in"] * linear["d_out"] for linear in linears]
    bits = sum(linear["bits_per_weight"] * n for linear, n in zip(linears, weights, strict=True))
    stages = list(state.get("stages", []))
    return make_finite(
        {
            "base": dict(base or {}),
            "recipe": recipe,
            "seed": seed,
            "bits_per_weight": bits / sum(weights),
            "stages": stages,
            "linears": linears,
            "fits": list(state.get("fits", [])),
            "skipped": [{"path": path, "reason": reason} for path, reason in SKIPPED],
            "peak_rss_mb": peak_rss_mb(),
            "seconds": sum(stage["seconds"] for stage in stages),
            "environment": describe_environment() | {"compute_dtype": dtype},
        }
    )


def check_report(report: Mapping[str, Any], where: str) -> None:
    """Refuses a report that cannot be gone on with.

    Args:
      report: as `build_report` returns it; any field may be missing.
    Raises:
      InputError: a field is of another kind; `where` says whose.
    """
    for name, kind in (("linears", list), ("fits", list), ("stages", list), ("base", dict)):
        if not isinstance(report.get(name, kind()), kind):
            raise _damaged(where, name)
    for name in ("linears", "fits", "stages"):
        if not all(isinstance(entry, dict) for entry in report.get(name, ())):
            raise _damaged(where, name)
    for linear in report.get("linears", ()):
        if not isinstance(linear.get("path"), str):
            raise _damaged(where, "a linear's path")
    seconds = report.get("seconds", 0.0)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        raise _damaged(where, "seconds")


def _damaged(where: str, what: str) -> InputError:
    return InputError(
        f"{where}: {what} is missing or of another kind; restore the file, or remove it: the model "
        "is whole without"
    )


def make_finite(value: Any) -> Any:
    """Puts None for NaN and Inf, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: make_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [make_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_rss_mb() -> float:
    """Returns the most memory this process has held, in MB of 10^6 bytes.

    Since it began, or since `reset_peak_rss` said True.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def reset_peak_rss() -> bool:
    """Returns free memory to the kernel and makes it forget the most that was held so far.

    Says whether it could; only Linux can.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    except (OSError, AttributeError):  # no such file; a C library without it
        return False
    return True


def describe_environment() -> dict[str, Any]:
    """Returns versions and devices."""
    import jax

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
