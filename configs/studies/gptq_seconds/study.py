"""Times GPTQ of one matrix beside the authors' PyTorch routine.

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
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.gptq_seconds.sides import BITS, DAMP, GROUP, THREADS
from configs.studies.harness import Study, open_row, table

TOKENS = 2048
COLUMNS = (
    ("[d_in, d_out]", "[{d_in}, {d_out}]"),
    ("side", "{side}"),
    ("wall s", "{wall_seconds:.1f}"),
    ("CPU s", "{cpu_seconds:.1f}"),
    ("peak MB", "{peak_mb_above_idle:.0f}"),
    ("limit MB", "{three_dense_and_three_grams_mb:.0f}"),
    ("compile CPU s", "{compile_seconds}"),
    ("output error", "{error:.5f}"),
    ("same weights", "{same_weights:.4%}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    shapes = [map(int, shape.split("x")) for shape in arguments.shapes]
    return [{"d_in": d_in, "d_out": d_out} for d_in, d_out in shapes]


def make_inputs(d_in: int, d_out: int, folder: Path) -> None:
    """Writes w [d_in, d_out] and a gram [d_in, d_in] of correlated inputs, fewer than channels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, d_in), np.float32)
    x += 0.5 * np.roll(x, 1, axis=1) + 0.5 * rng.standard_normal((TOKENS, 1), np.float32)
    x *= np.exp(0.5 * rng.standard_normal(d_in)).astype(np.float32)
    np.save(folder / "gram.npy", x.T @ x / TOKENS)
    np.save(folder / "w.npy", 0.02 * rng.standard_normal((d_in, d_out), np.float32))


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


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Runs both sides on one shape."""
    d_in, d_out = key["d_in"], key["d_out"]
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(d_in, d_out, Path(folder))
        load_before = os.getloadavg()[0]
        sides = {side: run_side(side, folder, arguments.peer) for side in ("lqec", "torch")}
        compared = compare_results(Path(folder))
    megabyte = 4 / 2**20
    allowed = 3 * d_in * (d_out + d_in) * megabyte
    return {"three_dense_and_three_grams_mb": allowed, "load_before": load_before,
            **sides, **compared}  # fmt: skip


def run_side(side: str, folder: str, peer: Path) -> dict:
    """Runs one side in a process of its own; its last line is its figures."""
    script = Path(__file__).with_name("sides.py")
    command = [sys.executable, str(script), side, folder, str(peer)]
    threads = {"OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
    )
    return json.loads(done.stdout.splitlines()[-1])


def find_rows(results: dict, arguments: argparse.Namespace) -> list[dict]:
    return results.setdefault("shapes", [])


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a row a shape and side."""
    made = results | open_row(results["shapes"][-1])
    line = (
        f"GPTQ, {BITS} bits, groups of {GROUP}, damping {DAMP}, no clip search; "
        f"{made['machine']}, {THREADS} threads, jax {made['versions']['jax']}, torch "
        f"{made['versions']['torch']}, {made['date']}. Memory is the peak above the idle "
        "process, its program compiled and both inputs counted; the limit is three dense weights "
        "and three grams. Compiling happens once a shape and is not in the other columns."
    )
    return [line, "", *table(COLUMNS, (side for row in results["shapes"] for side in sides(row)))]


def sides(row: dict) -> Iterator[dict]:
    """Yields a shape's two sides."""
    compiling = f"{row['lqec']['compiling']['cpu_seconds']:.1f}"
    for side, name, seconds in (("lqec", "lqec_jax", compiling), ("torch", "torch", "-")):
        error = row["output_error"][name]
        yield {**row, **row[side], "side": name, "compile_seconds": seconds, "error": error}


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, needs=("peer",), place=find_rows,
    packages=("jax", "torch", "numpy"),
    options={
        "--peer": {"type": Path, "help": "a clone of IST-DASLab/gptq"},
        "--shapes": {"nargs": "+", "default": ["4096x4096", "4096x11008", "11008x4096"]},
    },
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
