"""Times GPTQ of one matrix beside the authors' PyTorch routine, and writes JSON and a table.

    python configs/studies/gptq_seconds/study.py --peer CHECKOUT --out results.json \\
        --shapes 4096x4096

CHECKOUT is a clone of IST-DASLab/gptq, read where it lies. Both sides get the same weight and the
same gram from files and run in processes of their own, one after the other, on two threads. Memory
is the peak above what the process holds when it is ready to read them, its program compiled; so it
counts both inputs. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

BITS, GROUP, DAMP, THREADS = 4, 128, 0.01, 2
TOKENS = 2048


def make_inputs(d_in: int, d_out: int, folder: Path) -> None:
    """Writes w [d_in, d_out] and a gram [d_in, d_in] of correlated inputs, fewer than channels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, d_in), np.float32)
    x += 0.5 * np.roll(x, 1, axis=1) + 0.5 * rng.standard_normal((TOKENS, 1), np.float32)
    x *= np.exp(0.5 * rng.standard_normal(d_in)).astype(np.float32)
    np.save(folder / "gram.npy", x.T @ x / TOKENS)
    np.save(folder / "w.npy", 0.02 * rng.standard_normal((d_in, d_out), np.float32))


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


def compare_results(folder: Path) -> dict:
    """Returns how many weights agree, and both output errors tr(Δᵀ G Δ) / tr(wᵀ G w)."""
    w, gram, ours, theirs = (
        np.load(folder / f"{name}.npy") for name in ("w", "gram", "lqec", "torch")
    )
    whole = np.sum(w * (gram @ w), dtype=np.float64)

    def lost(w_hat: np.ndarray) -> float:
        error = w - w_hat
        return float(np.sum(error * (gram @ error), dtype=np.float64) / whole)

    same = np.abs(ours - theirs) < 1e-3 * np.abs(w).max()
    return {
        "same_weights": float(same.mean()),
        "output_error": {"lqec_jax": lost(ours), "torch": lost(theirs)},
    }


def measure(shape: str, peer: Path) -> dict:
    """Runs both sides on one shape."""
    d_in, d_out = map(int, shape.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(d_in, d_out, Path(folder))
        load_before = os.getloadavg()[0]
        sides = {side: run_side(side, folder, peer) for side in ("lqec", "torch")}
        compared = compare_results(Path(folder))
    megabyte = 4 / 2**20
    allowed = 3 * d_in * (d_out + d_in) * megabyte
    return {"d_in": d_in, "d_out": d_out, "three_dense_and_three_grams_mb": allowed,
            "load_before": load_before, **sides, **compared}  # fmt: skip


def run_side(side: str, folder: str, peer: Path) -> dict:
    """Runs one side in a process of its own; its last line is its figures."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder, "--peer", str(peer)]
    threads = {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    return json.loads(done.stdout.splitlines()[-1])


def write_table(results: dict, path: Path) -> None:
    """Writes a row a shape and side."""
    lines = [
        f"GPTQ, {BITS} bits, groups of {GROUP}, damping {DAMP}, no clip search; "
        f"{results['machine']}, {THREADS} threads, jax {results['versions']['jax']}, torch "
        f"{results['versions']['torch']}, {results['date']}. Memory is the peak above the idle "
        "process, its program compiled and both inputs counted; the limit is three dense weights "
        "and three grams. Compiling happens once a shape and is not in the other columns.",
        "",
        "| [d_in, d_out] | side | wall s | CPU s | peak MB | limit MB | compile CPU s "
        "| output error | same weights |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["shapes"]:
        for side, name in (("lqec", "lqec_jax"), ("torch", "torch")):
            took = row[side]
            compiling = f"{took['compiling']['cpu_seconds']:.1f}" if side == "lqec" else "-"
            lines.append(
                f"| [{row['d_in']}, {row['d_out']}] | {name} | {took['wall_seconds']:.1f} "
                f"| {took['cpu_seconds']:.1f} | {took['peak_mb_above_idle']:.0f} "
                f"| {row['three_dense_and_three_grams_mb']:.0f} | {compiling} "
                f"| {row['output_error'][name]:.5f} | {row['same_weights']:.4%} |"
            )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a clone of IST-DASLab/gptq")
    parser.add_argument("--out", type=Path, help="results.json; the table is written beside it")
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008", "11008x4096"])
    parser.add_argument("--side", choices=("lqec", "torch"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        run = {"lqec": run_lqec, "torch": run_torch}[given.side]
        print(json.dumps(run(given.folder, given.peer)))
        return
    results = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "versions": {name: version(name) for name in ("jax", "torch", "numpy")},
        "bits": BITS, "group_size": GROUP, "damp": DAMP, "threads": THREADS,
        "shapes": [measure(shape, given.peer) for shape in given.shapes],
    }  # fmt: skip
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results, given.out.with_suffix(".md"))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
