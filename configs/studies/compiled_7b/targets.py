"""Compilers for accelerators that are not here: XLA's own, told of a device instead of given one.

An H200 needs jax's CUDA plugin, `ptxas` and no driver: the one on the path, or triton's, which is
too old for jax 0.12. A TPU needs libtpu. Call `aim` before jax is imported.
"""

import os
from pathlib import Path
from shutil import which
from typing import Any

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 149000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""
PLATFORMS = {"h200": "gpu", "v5e": "tpu"}
CHIPS = {1: "1x1x1", 4: "2x2x1"}  # of a TPU host


def aim(target: str) -> None:
    """Prepares the process for a target of `PLATFORMS`; jax must not have been imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if PLATFORMS[target] == "tpu":
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
                       "TPU_ACCELERATOR_TYPE": "v5litepod-4",
                       "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # fmt: skip
        return
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    if which("ptxas") is None:
        import triton.backends.nvidia

        tools = Path(triton.backends.nvidia.__file__).with_name("bin")
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"


def describe(target: str, chips: int) -> Any:
    """Returns jax's description of so many chips of a target."""
    from jax.experimental import topologies

    if PLATFORMS[target] == "gpu":
        return topologies.get_topology_desc(
            platform="cuda", target_config=H200, topology=f"1x{chips}x1"
        )
    options = {} if chips == 4 else {"chips_per_host_bounds": [1, 1, 1]}
    name = f"{target}:{CHIPS[chips].rpartition('x')[0]}"
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


def pretend(target: str) -> None:
    """Lets the library choose as it would with the device: it asks jax where it runs."""
    import jax

    class Device:
        device_kind = {"h200": "NVIDIA H200", "v5e": "TPU v5 lite"}[target]

    jax.default_backend = lambda: PLATFORMS[target]
    jax.devices = lambda *_: [Device]
    if PLATFORMS[target] == "gpu":
        from jax._src.lib import gpu_triton

        gpu_triton.get_compute_capability = lambda device: 90
