"""Tokens a second of a Llama of 7 billion parameters' shapes, 2 bits and rank-64 adapters.

    python configs/studies/generate_7b/study.py --sequences 1 16
    python configs/studies/generate_7b/study.py --table

Numbers are random and the weights never dense, not even while they are made; what is timed is the
library's own decode step after `repack`, and reading a prompt. Each run adds its rows to
results.json; the second form writes results.md.

2 bits in groups of 64 with integer zeros, rank 64, a cache of 256 tokens; median of `steps` decode
steps, every step waited for. MB are what the parameters take, and the process at its peak.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.evaluate.report import peak_rss_mb
from lqec_jax.models.stepping import step_fns
from lqec_kernels import ready

sys.path.insert(0, str(Path(__file__).parents[1]))
from llama_7b import make_params, read_config  # noqa: E402

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
PROMPT, CACHE = 64, 256


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


def measure(sequences: int, config, params, dtype, steps: int) -> dict:
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
    return {"sequences": sequences, "step_seconds": step, "tokens_per_second": sequences / step,
            "prompt_tokens_per_second": sequences * PROMPT / reading}  # fmt: skip


def write_table() -> None:
    """Writes results.md from results.json."""
    lines = [
        " ".join(__doc__.split("\n\n")[3].split()),
        "",
        "| device | jax | date | dtype | sequences | s a step | tokens a second | prompt tokens a "
        "second | parameters, MB | process, MB |",
        "|---|" + "---|" * 9,
    ]
    rows = json.loads(RESULTS.read_text())
    lines += [
        f"| {row['device']} | {row['jax']} | {row['date']} | {row['dtype']} | {row['sequences']} "
        f"| {row['step_seconds']:.4f} | {row['tokens_per_second']:.2f} "
        f"| {row['prompt_tokens_per_second']:.1f} | {row['parameters_mb']:.0f} "
        f"| {row['peak_rss_mb']:.0f} |"
        for row in rows
    ]
    if all(row["device"] == "cpu" for row in rows):
        lines.append("| GPU" + " | not run" * 9 + " |")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", help="float32 on a CPU, bfloat16 elsewhere unless given")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return write_table()
    config = read_config(arguments.layers)
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(arguments.dtype or ("float32" if on_cpu else "bfloat16"))
    params = ready(draw_params(config, dtype), dtype=dtype)
    facts = {"device": jax.devices()[0].device_kind, "jax": jax.__version__,
             "date": str(date.today()), "dtype": dtype.name, "layers": arguments.layers,
             "parameters_mb": sum(a.nbytes for a in jax.tree.leaves(params)) / 1e6}  # fmt: skip
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for sequences in arguments.sequences:
        row = facts | measure(sequences, config, params, dtype, arguments.steps)
        rows.append(row | {"peak_rss_mb": peak_rss_mb()})
        print(json.dumps(rows[-1]), flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
