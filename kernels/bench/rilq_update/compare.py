"""Times the library's RILQ update beside PyTorch's, in one run, and writes JSON and a table.

    python kernels/bench/rilq_update/compare.py --model DIR --tokens windows.npy --out results.json

The two sides take turns, one process each, so that neither has the machine to itself. CPU
seconds are the figure to compare on a shared machine; wall seconds are beside them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WAYS = ("lqec_jax, 4 x 2", "lqec_jax, 8 x 1", "torch")


def measure(way: str, common: list[str]) -> dict:
    """Runs one side; returns what it printed."""
    script = "torch_peer.py" if way == "torch" else "lqec_side.py"
    parts = [] if way == "torch" else ["--accumulate", way.split()[1]]
    command = [sys.executable, str(HERE / script), *common, *parts]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def write_table(results: dict, path: Path) -> None:
    """Writes a row a way and thread count, PyTorch's four ways each on their own."""
    lines = [
        "| threads | way | CPU s / update | wall s / update | first loss | last loss |",
        "|---|---|---|---|---|---|",
    ]
    for threads, sides in results["threads"].items():
        for way, row in sides.items():
            for name, figures in row.get("ways", {way: row}).items():
                label = f"torch, {name}" if "ways" in row else name
                lines.append(
                    f"| {threads} | {label} | {figures['cpu_seconds']:.3f} "
                    f"| {figures['wall_seconds']:.3f} | {figures['first_loss']:.5f} "
                    f"| {figures['last_loss']:.5f} |"
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
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = {"machine": f"{platform.machine()}, {os.cpu_count()} processors", "threads": {}}
    for threads in arguments.threads or ["1", "2"]:
        common = ["--model", arguments.model, "--tokens", arguments.tokens]
        common += ["--updates", arguments.updates, "--threads", threads]
        results["threads"][threads] = {way: measure(way, common) for way in WAYS}
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        write_table(results, arguments.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
