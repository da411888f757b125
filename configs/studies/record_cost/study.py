"""What the record of a run's streams costs: seconds to write and to check them, against without.

A stream's rows are summed as they are made, on a thread beside the computation; a resumed
run reads and sums every piece again, on as many threads as there are cores. The claim to be held:
checking takes less than 1.3 times as long as reading the same file alone.

"Write" fills a stream, flush included, and computes nothing, so nothing hides the summing: in a run
every row comes out of a block's forward pass. The machine did other work too. "Check" is against
reading the file by one thread; "cold" has its pages dropped from memory before, as they are when a
run is taken up again. Every figure is the least of three runs, with and without by turns.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from configs.studies.harness import Study, quote, table
from lqec_jax.core.disk import map_array
from lqec_jax.runs.record import THREADS, StreamWriter, check_file, read_parts

SHAPE_OF_A_PIECE = (8, 512, 4096)  # windows that walk together, of a model of 4,096 channels
RUNS = 3
COLUMNS = (
    ("what", "{what}"),
    ("GB", "{gb:.2f}"),
    ("without, s", "{without:.2f}"),
    ("with, s", "{recorded:.2f}"),
    ("ratio", lambda row: f"{row['recorded'] / row['without']:.2f}"),
    ("threads", "{threads}"),
    ("machine", "{machine}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    whats = ("write", "check, warm", "check, cold")
    return [{"what": what, "pieces": arguments.pieces} for what in whats]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Times one of them on a stream of bfloat16's size."""
    n, t, d = SHAPE_OF_A_PIECE
    piece = np.random.default_rng(0).integers(0, 2**16, SHAPE_OF_A_PIECE, np.uint16)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        path = Path(folder) / "student-0.bin"

        def write(*, hashed: bool) -> dict:
            writer = StreamWriter(
                map_array(path, np.uint16, (key["pieces"] * n, t, d)), hashed=hashed
            )
            for first in range(0, key["pieces"] * n, n):
                writer.put(slice(first, first + n), piece)
            return writer.finish()

        record = write(hashed=True)
        if key["what"] == "write":
            sides = (lambda: write(hashed=False), lambda: write(hashed=True))
        else:
            sides = (lambda: _read(path), lambda: check_file(path.parent, path.name, record))
        drop = path if key["what"].endswith("cold") else None
        times = [[_time(side, drop) for side in sides] for _ in range(RUNS)]
    without, recorded = (min(column) for column in zip(*times, strict=True))
    return {"gb": record["bytes"] / 1e9, "without": without, "recorded": recorded,
            "threads": THREADS}  # fmt: skip


def _read(path: Path) -> None:
    for _ in read_parts(path, 0, path.stat().st_size):
        pass


def _time(side: Callable[[], object], cold: Path | None) -> float:
    if cold is not None:
        with cold.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    side()
    return time.perf_counter() - started


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    return [*quote(__doc__, 1, 2), *table(COLUMNS, results["rows"])]


STUDY = Study(__doc__, __file__, list_rows, measure, write_page,
              {"--pieces": {"type": int, "default": 32, "help": "of 34 MB, that a stream has"}},
              needs=("work",))  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
