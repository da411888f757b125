"""Each side of the GPTQ benchmark, in a process of its own: `sides.py lqec|torch FOLDER PEER`.

FOLDER holds w.npy and gram.npy and gets the side's weight; PEER is a clone of IST-DASLab/gptq. The
last line printed is the side's figures.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

BITS, GROUP, DAMP, THREADS = 4, 128, 0.01, 2


class Meter:
    """Wall and CPU seconds, and peak memory above what the process holds when it begins."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.idle = memory_mb("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Begins the seconds anew."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict:
        return {
            "wall_seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "peak_mb_above_idle": memory_mb("VmHWM") - self.idle,
        }


def memory_mb(field: str) -> float:
    """Returns a size that Linux keeps of this process: VmRSS is held now, VmHWM was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def run_lqec(folder: Path, peer: Path) -> dict:
    """Returns this library's figures: what compiling took, what a run takes."""
    import jax
    import jax.numpy as jnp

    from lqec_jax.core.group_grid import GroupGrid
    from lqec_jax.quantizers.gptq import quantize

    grid = GroupGrid(BITS, GROUP, dtype=jnp.float32)
    read = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("w", "gram")]
    meter = Meter()
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in read]
    solve = jax.jit(lambda w, gram: quantize(w, gram, grid, damp=DAMP)[0]).lower(*shapes).compile()
    compiling = meter.read()
    jax.block_until_ready(jnp.ones((256, 256)) @ jnp.ones((256, 256)))
    meter = Meter()
    w, gram = (jax.device_put(np.load(folder / f"{name}.npy")) for name in ("w", "gram"))
    jax.block_until_ready((w, gram))
    meter.restart()
    base = jax.block_until_ready(solve(w, gram))
    figures = meter.read() | {"compiling": compiling}
    np.save(folder / "lqec.npy", np.asarray(base.dense()))
    return figures


def run_torch(folder: Path, peer: Path) -> dict:
    """Returns the authors' routine's figures."""
    import torch

    sys.path.insert(0, str(peer))
    from gptq import GPTQ
    from quant import Quantizer

    torch.set_num_threads(THREADS)
    torch.cuda.synchronize = lambda: None  # it waits for a GPU even where there is none
    torch.linalg.cholesky(torch.eye(256) @ torch.eye(256))
    meter = Meter()
    w = torch.from_numpy(np.load(folder / "w.npy")).T.contiguous()
    gram = torch.from_numpy(np.load(folder / "gram.npy"))
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(w, requires_grad=False)
    method = GPTQ(layer)
    method.quantizer = Quantizer()
    method.quantizer.configure(BITS, perchannel=True, sym=False, mse=False)
    method.H = gram
    del w, gram
    meter.restart()
    with torch.no_grad():
        method.fasterquant(percdamp=DAMP, groupsize=GROUP)
    figures = meter.read()
    np.save(folder / "torch.npy", layer.weight.data.T.contiguous().numpy())
    return figures


if __name__ == "__main__":
    side, folder, peer = sys.argv[1:]
    run = {"lqec": run_lqec, "torch": run_torch}[side]
    print(json.dumps(run(Path(folder), Path(peer))))
