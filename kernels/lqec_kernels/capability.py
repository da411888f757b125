"""What can run where, said before it is tried: an implementation that cannot has a reason."""

import math
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.formats import Base
from lqec_kernels.repacking import REPACKED, can_repack

# What `auto` tries on each platform, first to last. The interpreter is exact, not fast: a CPU has
# XLA alone. On a TPU the compiler expects forty times more of XLA's product than of the kernel's
# for one token. 'mosaic' is asked for by name.
ORDER = {"cpu": ("xla",), "gpu": ("triton", "xla"), "tpu": ("pallas", "xla")}
IMPLEMENTATIONS = ("xla", "pallas", "triton", "pallas_triton", "mosaic")
_FLOATS = ("float32", "bfloat16", "float16")


def why_not(implementation: str, base: Base, dtype: Any, *, shards: int = 1) -> str:
    """Says why an implementation cannot make a product here; '' where it can be tried.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      base: the weight; one that can be repacked counts as repacked.
      dtype: of x.
      shards: over how many devices the columns are split.
    """
    if implementation == "xla":
        return ""
    if not isinstance(base, REPACKED) and not can_repack(base):
        return f"it reads no {_describe(base)}"
    if jnp.dtype(dtype).name not in _FLOATS:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(_FLOATS)}"
    if shards > 1:
        return f"the columns are split over {shards} devices, and a kernel is one device's"
    devices = _count_devices()
    if devices > 1 and jax.default_backend() != "cpu":
        return (
            f"the compiler splits the program over {devices} devices, and a kernel is one "
            "device's; call it inside jax.shard_map"
        )
    return _why_not_here(implementation, jax.default_backend(), jnp.dtype(dtype).name)


def _count_devices() -> int:
    """Returns over how many devices the mesh in use lets the compiler split a program."""
    mesh = jax.sharding.get_abstract_mesh()
    split = (size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
    return math.prod(split)


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
    return _why_not_hopper() if implementation == "mosaic" else ""


def _why_not_hopper() -> str:
    # wgmma, by which it multiplies, is neither on earlier nor on later ones.
    capability = getattr(jax.devices()[0], "compute_capability", "unknown")
    if capability.startswith("9."):
        return ""
    return f"it needs a Hopper GPU, of compute capability 9.0; this one's is {capability}"


def _describe(base: Base) -> str:
    name = type(base).__name__
    bits = getattr(base, "bits", None)
    return name if bits is None else f"{name} of {bits} bits"
