"""Measures LREC's hyper-parameters on small models, RILQ beside it: one row a step.

    python configs/studies/lrec_defaults/study.py --shared ../shared --model babyllama \
        --base "rtn(bits=2, group_size=32)" --step "lrec(rank=16, updates=100)"

Every row: 256 training and 64 validation windows of 256 tokens of tinystories_calib; perplexity and
KL from the teacher, in nats a token, on the first 128 windows of tinystories_dev, which no step
reads. The step alone is timed, compilation included, on a machine that did other work too; s an
update is that over the updates.
"""

import argparse
import sys
import time
from functools import cache
from pathlib import Path

import jax
import numpy as np

import lqec_jax as lqec
from lqec_jax.calibration.data import load_tokens
from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.evaluate.perplexity import divergence, perplexity
from lqec_jax.models.decoder import model_fns
from lqec_jax.recipe import parse_recipe

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, table

KEY = jax.random.fold_in(jax.random.key(0), 2**20 + 1)  # the driver's for seed 0
SEQLEN, WINDOWS, TRAIN, SCORED, AT_ONCE = 256, 320, 256, 128, 16
COLUMNS = (
    ("model", "{model}"),
    ("base", "{base}"),
    ("step", "{step}"),
    ("dev ppl", "{ppl:.3f}"),
    ("KL", "{kl:.3f}"),
    ("validation loss", "{validation_loss:.2f}"),
    ("CPU s an update", "{cpu_seconds_an_update:.2f}"),
)


def cut(stream: np.ndarray, windows: int) -> np.ndarray:
    return np.asarray(stream[: windows * SEQLEN], np.int32).reshape(windows, SEQLEN)  # [n, t]


class Bench:
    """One base of one model: its problem, and what is scored on."""

    def __init__(self, shared: Path, model: str, base: str):
        self.dense = lqec.load(shared / "models" / model)
        self.fns = model_fns(self.dense.config, remat=False)
        streams = (
            load_tokens(shared / "data" / f"tinystories_{name}.jsonl", self.dense.tokenizer,
                        "documents")
            for name in ("calib", "dev")
        )  # fmt: skip
        calib, self.dev = (cut(s, n) for s, n in zip(streams, (WINDOWS, SCORED), strict=True))
        hidden = jax.jit(lambda params, tokens: self.fns.hidden(params, tokens)[0])
        parts = (calib[n : n + AT_ONCE] for n in range(0, WINDOWS, AT_ONCE))
        teacher = np.concatenate([np.asarray(hidden(self.dense.params, part)) for part in parts])
        small = lqec.compress(
            shared / "models" / model, base, calib=calib.ravel(), seqlen=SEQLEN, windows=WINDOWS
        )
        text, work = Windows(calib, TRAIN), Work(KEY)
        self.problem = ModelProblem(self.fns, small.params, text, work, teacher)

    def score(self, params) -> dict:
        both = (self.fns, self.dense.params), (self.fns, params)
        return {
            "ppl": perplexity(self.fns, params, self.dev).ppl,
            "kl": divergence(*both, self.dev).kl,
        }

    def run(self, text: str) -> dict:
        (step,) = parse_recipe(text).steps
        started = time.process_time()
        solution = step.run(self.problem)
        seconds = time.process_time() - started
        return {
            **self.score(solution.params),
            "best_update": solution.best_update,
            "validation_loss": min(point.val_loss for point in solution.history),
            "cpu_seconds_an_update": seconds / solution.history[-1].update,
        }


load_bench = cache(Bench)  # rows of one base share it


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    facts = {"model": arguments.model, "base": arguments.base}
    return [facts | {"step": step} for step in ["none", *arguments.step]]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    bench = load_bench(arguments.shared, key["model"], key["base"])
    return bench.score(bench.problem.params) if key["step"] == "none" else bench.run(key["step"])


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    lines = [
        "2 bits in groups of 32, rank 16, 100 updates, a look every 50. Seconds count",
        "compilation and looks, on a machine that did other work too.",
        "",
    ]
    return lines + table(COLUMNS, results["rows"])


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, needs=("shared", "model", "base"),
    options={
        "--model": {"help": "a folder of SHARED/models"},
        "--base": {"help": "a recipe without the step"},
        "--step": {"action": "append", "default": []},
    },
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
