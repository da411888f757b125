"""What can run where, said before it is tried: an implementation that cannot has a reason."""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.formats import Base
from lqec_kernels.level_planes import LevelPlanes
from lqec_kernels.planes import Planes
from lqec_kernels.prepare import can_prepare
from lqec_kernels.sparse_planes import SparsePlanes

# What `auto` tries on each platform, first to last. The interpreter is exact, not fast: a CPU has
# XLA alone. So has a TPU until the Pallas kernel, which lowers for it, has run on one: there it is
# asked for by name.
ORDER = {"cpu": ("xla",), "gpu": ("triton", "xla"), "tpu": ("xla",)}
IMPLEMENTATIONS = ("xla", "pallas", "triton", "pallas_triton")
# Formats in the order in which kernels read them.
PREPARED = (Planes, LevelPlanes, SparsePlanes)
_FLOATS = ("float32", "bfloat16", "float16")


def why_not(implementation: str, base: Base, dtype: Any, *, shards: int = 1) -> str:
    """Says why an implementation cannot make a product here; '' where it can be tried.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      base: the weight; one that `prepare` would repack counts as repacked.
      dtype: of x.
      shards: over how many devices the columns are split.
    """
    if implementation == "xla":
        return ""
    if not isinstance(base, PREPARED) and not can_prepare(base):
        return f"it reads no {_describe(base)}"
    if jnp.dtype(dtype).name not in _FLOATS:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(_FLOATS)}"
    if shards > 1:
        return f"the columns are split over {shards} devices, and a kernel is one device's"
    return _why_not_here(implementation, jax.default_backend(), jnp.dtype(dtype).name)


def _why_not_here(implementation: str, platform: str, dtype: str) -> str:
    if implementation == "pallas":
        if platform == "gpu":
            return (
                "on a GPU Pallas lowers through Mosaic, which has no jnp.dot; ask for 'triton', or "
                "for 'pallas_triton', deprecated since jax 0.11"
            )
        if platform == "tpu" and dtype == "float16":
            return "a TPU has no float16; use bfloat16"
        return ""
    if platform != "gpu":
        return f"it needs an NVIDIA GPU; the default backend is {platform!r}"
    if implementation == "triton" and find_spec("jax_triton") is None:
        return "jax-triton is not installed; pip install 'lqec-jax[triton]'"
    return ""


def _describe(base: Base) -> str:
    name = type(base).__name__
    bits = getattr(base, "bits", None)
    return name if bits is None else f"{name} of {bits} bits"
