"""Tokens a second of a Llama of 7 billion parameters' shapes, 2 bits and rank-64 adapters.

    python configs/studies/generate_7b/study.py --sequences 1 16
    python configs/studies/generate_7b/study.py --table

Numbers are random and the weights never dense, not even while they are made; what is timed is the
library's own decode step after `repack`, and reading a prompt.

2 bits in groups of 64 with integer zeros, rank 64, a cache of 256 tokens; median of `steps` decode
steps, every step waited for. MB are what the parameters take, and the process at its peak.
"""

import argparse
import statistics
import sys
import time
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.evaluate.report import peak_rss_mb
from lqec_jax.models.stepping import step_fns
from lqec_kernels import repack

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, quote, table
from configs.studies.llama_7b import make_params, read_config

PROMPT, CACHE = 64, 256
COLUMNS = (
    ("device", "{device}"),
    ("jax", "{jax}"),
    ("date", "{date}"),
    ("dtype", "{dtype}"),
    ("sequences", "{sequences}"),
    ("s a step", "{step_seconds:.4f}"),
    ("tokens a second", "{tokens_per_second:.2f}"),
    ("prompt tokens a second", "{prompt_tokens_per_second:.1f}"),
    ("parameters, MB", "{parameters_mb:.0f}"),
    ("process, MB", "{peak_rss_mb:.0f}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    facts = {"device": jax.devices()[0].device_kind, "dtype": arguments.dtype or usual,
             "layers": arguments.layers}  # fmt: skip
    return [facts | {"sequences": sequences} for sequences in arguments.sequences]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Makes the model, once, and times it on so many sequences."""
    config, params = make_model(key["layers"], key["dtype"])
    megabytes = sum(a.nbytes for a in jax.tree.leaves(params)) / 1e6
    timed = time_steps(key["sequences"], config, params, jnp.dtype(key["dtype"]), arguments.steps)
    return {"parameters_mb": megabytes} | timed | {"peak_rss_mb": peak_rss_mb()}


@cache
def make_model(layers: int, dtype: str) -> tuple:
    """Returns configuration and parameters, packed as they are multiplied by."""
    config = read_config(layers)
    return config, repack(draw_params(config, jnp.dtype(dtype)), dtype=jnp.dtype(dtype))


def draw_params(config, dtype) -> dict:
    """Returns parameters in random numbers."""
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct):
        size = (config.layers, *shape.shape)
        if shape.dtype == jnp.uint32:
            return jnp.asarray(rng.integers(0, 2**32, size, np.uint32))
        return jnp.asarray(rng.standard_normal(size, np.float32) / 64, shape.dtype)

    def draw_outer(shape: tuple[int, ...]):
        return jnp.asarray(rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5, dtype)

    return make_params(config, dtype, lambda leaf: jax.tree.map(draw, leaf), draw_outer)


def time_steps(sequences: int, config, params, dtype, steps: int) -> dict:
    fns = step_fns(config, dtype)
    prefill = jax.jit(fns.prefill, static_argnums=3)
    decode = jax.jit(fns.decode, donate_argnums=3)
    prompt = jnp.asarray(np.random.default_rng(1).integers(0, 32000, (sequences, PROMPT)))
    seconds = []
    for _ in range(2):  # the first compiles
        started = time.perf_counter()
        logits, caches = jax.block_until_ready(prefill(params, prompt, PROMPT, CACHE))
        reading = time.perf_counter() - started
    for position in range(PROMPT, PROMPT + steps + 1):
        tokens = jnp.argmax(logits, axis=-1)
        started = time.perf_counter()
        logits, caches = jax.block_until_ready(decode(params, tokens, position, caches))
        seconds.append(time.perf_counter() - started)
    assert bool(jnp.isfinite(logits).all())
    step = statistics.median(seconds[1:])
    return {"step_seconds": step, "tokens_per_second": sequences / step,
            "prompt_tokens_per_second": sequences * PROMPT / reading}  # fmt: skip


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    rows = results["rows"]
    lines = [*quote(__doc__, 3), *table(COLUMNS, rows)]
    if all(row["device"] == "cpu" for row in rows):
        lines.append("| GPU" + " | not run" * 9 + " |")
    return lines


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page,
    options={
        "--sequences": {"type": int, "nargs": "+", "default": [1, 16]},
        "--layers": {"type": int, "default": 32},
        "--dtype": {"help": "float32 on a CPU, bfloat16 elsewhere unless given"},
        "--steps": {"type": int, "default": 8},
    },
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
