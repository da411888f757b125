"""What packed weights cost on a CPU: single products, a model's decode step, a training update.

    python configs/studies/cpu_decode/study.py --part products
    python configs/studies/cpu_decode/study.py --part model
    python configs/studies/cpu_decode/study.py --table

Weights are random, float32 is dense, x is float32; groups of 32 with floating zeros. Times are
medians of interleaved repetitions, over the dense product's in the same run. `packed` is what the
library does, tiles that fit a core's cache; the others are other ways, each one compiled program:

- `dequantize, then multiply`: the whole weight made dense in the program, then one product.
- `large tiles`: the library's loop with tiles of four million weights, as on an accelerator.
- `fused sum`: no dense copy; codes times inputs added up as they are unpacked.
- `float codes`: as that, codes put in a float's mantissa instead of converted (exact to 8 bits).

Unpacking takes a shift, a mask, a conversion, a subtraction and a multiplication a weight, five
operations where the dense product has one; a float's mantissa saves the conversion.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lqec_jax as lqec
from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.stepping import step_fns
from lqec_jax.train.losses import Discrepancy, ModelLoss, NextToken
from lqec_jax.train.parts import Adapters
from lqec_jax.train.rates import make_optimizer
from lqec_jax.train.steps import Program
from lqec_jax.train.update import count_parts, init_state, make_update
from lqec_kernels import Affine, CompressedLinear, Dense, packed_matmul, reference, unpack

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, open_row, quote, table

GROUP = 32
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
SMALL = ((128, 352), (256, 256), (512, 512), (1024, 1024))
PRODUCTS = [(shape, bits, tokens) for shape in SHAPES for bits in (2, 3, 4) for tokens in (1, 16)]
PRODUCTS += [((4096, 4096), 2, 512)] + [(shape, 2, 1) for shape in SMALL]
REPETITIONS, UPDATES = 9, 3
# The model: 100 million weights in its linears; smaller ones are of other widths.
WIDTH, LAYERS, HEADS, VOCAB, LENGTH, RANK = 1024, 8, 16, 8192, 256, 16
WIDTHS = (128, 256, 512)


# ---- single products


def draw_weight(d_in: int, d_out: int, bits: int) -> Affine:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (d_in // 32 * bits, d_out), np.uint32)
    scales = (0.01 * rng.random((d_in // GROUP, d_out))).astype(np.float16)
    zeros = (2**bits * rng.random((d_in // GROUP, d_out))).astype(np.float16)
    return jax.tree.map(jnp.asarray, Affine(words, scales, zeros, bits, GROUP, d_in))


def with_large_tiles(x: jax.Array, base: Affine) -> jax.Array:
    usual = reference._forward_elements
    reference._forward_elements = lambda d_in: reference.TILE_ELEMENTS
    try:
        return reference.tiled_matmul(x, base)
    finally:
        reference._forward_elements = usual


def with_fused_sum(x: jax.Array, base: Affine) -> jax.Array:
    codes = unpack(base.codes, base.bits, base.d_in).astype(jnp.float32)
    return _sum_groups(x, base, codes, 1.0, 0.0)


def with_float_codes(x: jax.Array, base: Affine) -> jax.Array:
    """Takes a code c as the float 1 + c / 2**bits, whose mantissa begins with it."""
    codes = unpack(base.codes, base.bits, base.d_in).astype(jnp.uint32) << (23 - base.bits)
    floats = lax.bitcast_convert_type(codes | jnp.uint32(0x3F800000), jnp.float32)
    return _sum_groups(x, base, floats, 2.0**base.bits, 2.0**base.bits)


def _sum_groups(x: jax.Array, base: Affine, codes: jax.Array, factor: float, shift: float):
    """Returns Σ_g s_g (factor · Σ x c - (shift + z_g) Σ x), c = codes as they are given."""
    *lead, d_in = x.shape
    x = x.reshape(*lead, -1, GROUP, 1)  # [..., groups, GROUP, 1]
    codes = codes.reshape(-1, GROUP, base.d_out)
    sums = factor * jnp.sum(x * codes, axis=-2)  # [..., groups, d_out]
    sums = sums - (shift + base.zeros.astype(jnp.float32)) * jnp.sum(x, axis=-2)
    return jnp.sum(sums * base.scales.astype(jnp.float32), axis=-2)


WAYS: dict[str, Callable] = {
    "packed": packed_matmul,
    "dequantize, then multiply": lambda x, base: x @ base.dense(),
    "large tiles": with_large_tiles,
    "fused sum": with_fused_sum,
    "float codes": with_float_codes,
}


def measure_product(shape: list[int], bits: int, tokens: int) -> dict:
    base = draw_weight(*shape, bits)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((tokens, shape[0]), np.float32))
    programs = {"dense": (jax.jit(lambda x, w: x @ w), (x, base.dense()))}
    # At many tokens the sums repeat the unpacking for each; they are products of few.
    ways = WAYS if tokens <= 16 else dict(list(WAYS.items())[:3])
    programs |= {name: (jax.jit(way), (x, base)) for name, way in ways.items()}
    wanted = np.asarray(programs["dense"][0](*programs["dense"][1]))
    for name, (program, arguments) in programs.items():
        error = np.abs(np.asarray(program(*arguments)) - wanted).max() / np.abs(wanted).max()
        assert error < 1e-4, (name, error)
    seconds = time_in_turn(
        {name: lambda f=f, a=a: f(*a) for name, (f, a) in programs.items()}, REPETITIONS
    )
    return {"seconds": seconds}


def time_in_turn(calls: dict[str, Callable], repetitions: int) -> dict[str, float]:
    """Returns the median seconds of each; noise of the machine falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            if repetition:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in seconds.items()}


# ---- a model


def make_model(folder: Path, width: int = WIDTH):
    """Returns a Llama of random weights, dense and at 2 bits with adapters."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    inner = width * 11 // 4
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
               "mlp.down_proj": (width, inner)}  # fmt: skip
    tensors = {f"{name}.weight": draw(VOCAB, width) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = np.ones(width, np.float32)
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        tensors |= {f"{place}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        for norm in ("input", "post_attention"):
            tensors[f"{place}.{norm}_layernorm.weight"] = np.ones(width, np.float32)
    config = {"model_type": "llama", "hidden_size": width, "intermediate_size": inner,
              "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB,
              "num_key_value_heads": HEADS, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, "hidden_act": "silu",
              "tie_word_embeddings": False}  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    tokens = rng.integers(0, VOCAB, 2 * LENGTH, np.int32)
    recipe = f"rtn(bits=2, group_size={GROUP}) | svd(rank={RANK})"
    return lqec.compress(folder, recipe, tokens, seqlen=LENGTH, windows=2)


def make_dense(params):
    """Returns the same model with every packed weight's dense copy, adapters kept."""

    def copy(leaf):
        if not isinstance(leaf, CompressedLinear):
            return leaf
        return CompressedLinear(Dense(leaf.base.dense()), leaf.corrections)

    return jax.tree.map(copy, params, is_leaf=lambda leaf: isinstance(leaf, CompressedLinear))


DECODE = ("decode, 1 sequence", lambda *model: make_decode(1)(*model), REPETITIONS)
EVERY = (
    DECODE,
    ("decode, 16 sequences", lambda *model: make_decode(16)(*model), REPETITIONS),
    ("RILQ update, 2 windows of 256", lambda *model: make_training(*model), UPDATES),
)


def measure_models() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_model(make_model(Path(folder) / "whole"), EVERY)
        for width in WIDTHS:
            (row,) = measure_model(make_model(Path(folder) / str(width), width), (DECODE,))
            rows.append(row | {"name": f"{row['name']}, width {width}"})
    return rows


def measure_model(model, what: tuple) -> list[dict]:
    """Returns seconds and bytes of steps, packed and dense."""
    models = {"packed": model.params, "dense": make_dense(model.params)}
    rows = []
    for name, make, repetitions in what:
        programs = {kind: make(model, params) for kind, params in models.items()}
        seconds = time_in_turn({kind: call for kind, (call, _) in programs.items()}, repetitions)
        megabytes = {kind: size for kind, (_, size) in programs.items()}
        rows.append({"name": name, "seconds": seconds, "megabytes": megabytes})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def make_decode(sequences: int) -> Callable:
    def make(model, params) -> tuple[Callable, float]:
        fns = step_fns(model.config, jnp.float32)
        prompt = jnp.zeros((sequences, 64), jnp.int32)
        _, caches = jax.jit(fns.prefill, static_argnums=3)(params, prompt, 64, 128)
        arguments = (params, prompt[:, 0], 64, caches)
        program = jax.jit(fns.decode).lower(*arguments).compile()
        return lambda: program(*arguments), count_megabytes(program)

    return make


def make_training(model, params) -> tuple[Callable, float]:
    """Returns an update of two windows."""
    fns = model_fns(model.config, jnp.float32)
    windows = np.random.default_rng(2).integers(0, VOCAB, (2, LENGTH), np.int32)
    teacher = np.zeros((2, LENGTH, WIDTH), np.float32)
    part, loss = Adapters(), ModelLoss((Discrepancy(0.5), NextToken(0.5)))
    optimizer = make_optimizer((part,), WIDTH, 100)
    program = Program(fns, (part,), loss)
    update = make_update(program, optimizer, accumulate=count_parts(2, LENGTH))
    problem = ModelProblem(fns, params, Windows(windows, 2), Work(jax.random.key(0)), teacher)
    batch = loss.prepare("rilq", problem)(np.arange(2))
    held = [init_state(params, optimizer)]
    size = count_megabytes(update.lower(held[0], batch).compile())

    def call():
        held[0], metrics = update(held[0], batch)
        return metrics

    return call, size


def count_megabytes(program) -> float:
    memory = program.memory_analysis()
    return (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6


# ---- rows and page


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    if arguments.part == "model":
        return [{}]  # all its rows at once
    return [{"shape": shape, "bits": bits, "tokens": tokens} for shape, bits, tokens in PRODUCTS]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict | list[dict]:
    return measure_models() if arguments.part == "model" else measure_product(**key)


def find_part(results: dict, arguments: argparse.Namespace) -> list[dict]:
    """Returns the rows of a part on as many threads as there are."""
    threads = len(os.sched_getaffinity(0))
    part = results.setdefault(f"{arguments.part}, threads: {threads}", {"threads": threads})
    return part.setdefault("rows", [])


PRODUCT = (
    ("weight", lambda row: " x ".join(map(str, row["shape"]))),
    ("bits", "{bits}"),
    ("tokens", "{tokens}"),
    ("dense, ms", lambda row: f"{1e3 * row['seconds']['dense']:.3g}"),
    *((name, f"{{ratios[{name}]:.2f}}") for name in WAYS),
)
MODEL = (
    ("", "{name}"),
    ("threads", "{threads}"),
    ("dense, ms", lambda row: f"{1e3 * row['seconds']['dense']:.1f}"),
    ("packed, ms", lambda row: f"{1e3 * row['seconds']['packed']:.1f}"),
    ("ratio", lambda row: f"{row['seconds']['packed'] / row['seconds']['dense']:.2f}"),
    ("dense, MB", "{megabytes[dense]:.0f}"),
    ("packed, MB", "{megabytes[packed]:.0f}"),
    ("ratio", lambda row: f"{row['megabytes']['packed'] / row['megabytes']['dense']:.2f}"),
)


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a table of products a thread count, and one of models."""
    lines, models = quote(__doc__, 2, 3), []
    for threads in (1, 2):
        products = results.get(f"products, threads: {threads}", {})
        if rows := products.get("rows"):
            made = products | open_row(rows[-1])
            lines += [f"CPU, threads: {threads}; jax {made['jax']}, {made['date']}.", "",
                      *table(PRODUCT, map(find_ratios, rows)), ""]  # fmt: skip
        rows = results.get(f"model, threads: {threads}", {}).get("rows", [])
        models += [row | {"threads": threads} for row in rows]
    lines += [f"A Llama of {LAYERS} blocks, of width {WIDTH} unless said, 2 bits and rank "
              f"{RANK}, beside the same with dense copies; MB are a program's arguments and room.",
              ""]  # fmt: skip
    return lines + table(MODEL, models)


def find_ratios(row: dict) -> dict:
    """Returns a row with seconds over the dense product's."""
    dense = row["seconds"]["dense"]
    return row | {"ratios": {name: seconds / dense for name, seconds in row["seconds"].items()}}


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, needs=("part",), place=find_part,
    options={"--part": {"choices": ("products", "model")}},
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
