"""Times the library's RILQ update beside PyTorch's, in one run, and writes JSON and a table.

    python configs/studies/rilq_update/study.py --model DIR --tokens windows.npy --out results.json

Every way takes its turn in a process of its own, several rounds of them; a figure is the median of
the rounds' medians. PyTorch runs four ways, with peft's layers and without, one window at a time
and all at once; ours runs as `lqec compress` does, and with `--mesh data=N`, a core a device.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FIGURES = ("cpu_seconds", "wall_seconds", "first_loss", "last_loss", "peak_rss_mb")


def measure(script: str, options: list[str]) -> dict:
    """Runs one side; returns what it printed."""
    command = [sys.executable, str(HERE / script), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def run_round(common: list[str], threads: str) -> dict[str, dict]:
    """Returns every way's figures of one round, by name."""
    ours = {"lqec_jax": measure("lqec_side.py", common)}
    if threads != "1":
        spread = measure("lqec_side.py", [*common, "--devices", threads])
        ours[f"lqec_jax, data={threads}"] = spread
    peer = measure("torch_peer.py", common)
    ways = {f"torch, {way}": peer | figures for way, figures in peer["ways"].items()}
    return {name: {k: side[k] for k in FIGURES} for name, side in {**ours, **ways}.items()}


def summarize(rounds: list[dict[str, dict]]) -> dict[str, dict]:
    """Returns the median of every figure over rounds."""
    return {
        way: {k: statistics.median(one[way][k] for one in rounds) for k in FIGURES}
        for way in rounds[0]
    }


def write_table(results: dict, path: Path) -> None:
    """Writes a row a way and thread count; ratios are to the same threads' fastest PyTorch way."""
    lines = [
        f"RILQ update of {results['what']}, {results['machine']}, "
        f"jax {results['versions']['jax']}, torch {results['versions']['torch']}, "
        f"{results['date']}. Medians of {results['rounds']} rounds; ratios are to the "
        "best PyTorch way of as many threads. Peak "
        "memory is the process's, PyTorch's four ways in one.",
        "",
        "| threads | way | CPU s | ratio | wall s | ratio | last loss | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for threads, ways in results["threads"].items():
        peers = [figures for way, figures in ways.items() if way.startswith("torch")]
        cpu, wall = (min(p[k] for p in peers) for k in ("cpu_seconds", "wall_seconds"))
        for way, row in ways.items():
            lines.append(
                f"| {threads} | {way} | {row['cpu_seconds']:.3f} | {row['cpu_seconds'] / cpu:.2f} "
                f"| {row['wall_seconds']:.3f} | {row['wall_seconds'] / wall:.2f} "
                f"| {row['last_loss']:.5f} | {row['peak_rss_mb']:.0f} |"
            )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True)
    parser.add_argument("--updates", default="20")
    parser.add_argument(
        "--threads", action="append", help="counts to measure; 1 and 2 unless given"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shape = "x".join(map(str, np.load(arguments.tokens, mmap_mode="r").shape[1:]))
    results = {
        "what": f"{Path(arguments.model).name}, 8 windows of {shape} tokens, float32",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "versions": {name: version(name) for name in ("jax", "torch", "transformers", "peft")},
        "date": date.today().isoformat(),
        "rounds": arguments.rounds,
        "threads": {},
    }
    for threads in arguments.threads or ["1", "2"]:
        common = ["--model", arguments.model, "--tokens", arguments.tokens]
        common += ["--updates", arguments.updates, "--threads", threads]
        rounds = [run_round(common, threads) for _ in range(arguments.rounds)]
        results["threads"][threads] = summarize(rounds)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results, arguments.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
