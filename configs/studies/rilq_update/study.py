"""Times the library's RILQ update beside PyTorch's, in one run.

    python configs/studies/rilq_update/study.py --model DIR --tokens windows.npy --out results.json

Every way takes its turn in a process of its own, several rounds of them; a figure is the median of
the rounds' medians. PyTorch runs four ways, with peft's layers and without, one window at a time
and all at once; ours runs as `lqec compress` does, and with `--mesh data=N`, a core a device.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, open_row, table

HERE = Path(__file__).parent
FIGURES = ("cpu_seconds", "wall_seconds", "first_loss", "last_loss", "peak_rss_mb")
COLUMNS = (
    ("threads", "{threads}"),
    ("way", "{way}"),
    ("CPU s", "{cpu_seconds:.3f}"),
    ("ratio", "{cpu_ratio:.2f}"),
    ("wall s", "{wall_seconds:.3f}"),
    ("ratio", "{wall_ratio:.2f}"),
    ("last loss", "{last_loss:.5f}"),
    ("peak MB", "{peak_rss_mb:.0f}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    shape = "x".join(map(str, np.load(arguments.tokens, mmap_mode="r").shape[1:]))
    what = f"{Path(arguments.model).name}, 8 windows of {shape} tokens, float32"
    return [{"what": what, "threads": threads} for threads in arguments.threads or ["1", "2"]]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Runs every way in several rounds on so many threads."""
    common = ["--model", arguments.model, "--tokens", arguments.tokens]
    common += ["--updates", arguments.updates, "--threads", key["threads"]]
    rounds = [run_round(common, key["threads"]) for _ in range(arguments.rounds)]
    return {"rounds": arguments.rounds, "ways": summarize(rounds)}


def run_side(script: str, options: list[str]) -> dict:
    """Runs one side; returns what it printed."""
    command = [sys.executable, str(HERE / script), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def run_round(common: list[str], threads: str) -> dict[str, dict]:
    """Returns every way's figures of one round, by name."""
    ours = {"lqec_jax": run_side("lqec_side.py", common)}
    if threads != "1":
        spread = run_side("lqec_side.py", [*common, "--devices", threads])
        ours[f"lqec_jax, data={threads}"] = spread
    peer = run_side("torch_peer.py", common)
    ways = {f"torch, {way}": peer | figures for way, figures in peer["ways"].items()}
    return {name: {k: side[k] for k in FIGURES} for name, side in {**ours, **ways}.items()}


def summarize(rounds: list[dict[str, dict]]) -> dict[str, dict]:
    """Returns the median of every figure over rounds."""
    return {
        way: {k: statistics.median(one[way][k] for one in rounds) for k in FIGURES}
        for way in rounds[0]
    }


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a row a way and thread count; ratios are to the same threads' fastest PyTorch way."""
    # The first file had its rows by thread count.
    rows = [{"threads": n, "ways": ways} for n, ways in results.get("threads", {}).items()]
    rows += results.get("rows", [])
    made = results | open_row(rows[-1])
    line = (
        f"RILQ update of {made['what']}, {made['machine']}, "
        f"jax {made['versions']['jax']}, torch {made['versions']['torch']}, "
        f"{made['date']}. Medians of {made['rounds']} rounds; ratios are to the "
        "best PyTorch way of as many threads. Peak "
        "memory is the process's, PyTorch's four ways in one."
    )
    return [line, "", *table(COLUMNS, (way for row in rows for way in list_ways(row)))]


def list_ways(row: dict) -> Iterator[dict]:
    """Yields a row's ways, beside the fastest of PyTorch's."""
    peers = [figures for way, figures in row["ways"].items() if way.startswith("torch")]
    cpu, wall = (min(peer[name] for peer in peers) for name in ("cpu_seconds", "wall_seconds"))
    for way, figures in row["ways"].items():
        yield {"threads": row["threads"], "way": way, **figures,
               "cpu_ratio": figures["cpu_seconds"] / cpu,
               "wall_ratio": figures["wall_seconds"] / wall}  # fmt: skip


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, needs=("model", "tokens"),
    packages=("jax", "torch", "transformers", "peft"),
    options={
        "--model": {},
        "--tokens": {},
        "--updates": {"default": "20"},
        "--threads": {"action": "append", "help": "counts to measure; 1 and 2 unless given"},
        "--rounds": {"type": int, "default": 3},
    },
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
