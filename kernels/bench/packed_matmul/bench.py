"""Times products with packed weights beside their floors and their peers; writes JSON and a table.

    python kernels/bench/packed_matmul/bench.py --out results.json        on a GPU, some minutes
    python kernels/bench/packed_matmul/bench.py --table results.json      results.md beside it
    python kernels/bench/packed_matmul/bench.py --small --out small.json  tiny, on a CPU: it works

A figure is the seconds of one product. Products are made inside one compiled loop, each with the
next of so many weights that they fill the level-2 cache four times; each x depends on the product
before, so that nothing is moved out of the loop and no two products are made one. The floor is the
larger of two times: the bytes that must be read and written at the measured rate of a copy, and the
flops at the measured rate of a large bfloat16 product. Every peer that can be imported runs in the
same process; torch's are captured as a CUDA graph.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from plan import GROUP, IN_SCAN, NOTHING, OURS, PEERS, PLANS, Plan, Problem, list_sides, write_table

from lqec_kernels import Dense, LowRank, Planes, packed_matmul

PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "gemlite", "bitsandbytes", "ejkernel")


# Timing


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def time_in_loop(multiply: Callable, x: jax.Array, weights: list, plan: Plan) -> float:
    """Returns the seconds of one product; a round multiplies by every weight once."""
    loop = make_loop(multiply, plan)
    taken = median_seconds(lambda: loop(x, weights), plan.repeats)
    return taken / (plan.rounds * len(weights))


def make_loop(multiply: Callable, plan: Plan) -> Callable:
    @jax.jit
    def loop(x, weights):
        def one_round(_, x):
            for w in weights:
                x = x + (1e-30 * make_whole(multiply(x, w))).astype(x.dtype)
            return x

        return lax.fori_loop(0, plan.rounds, one_round, x)

    return loop


def make_whole(y: jax.Array) -> jax.Array:
    """Returns one number of a product, all of which is made: XLA would make just that number."""
    return lax.optimization_barrier(y)[0, 0].astype(jnp.float32)


def time_in_scan(multiply: Callable, x: jax.Array, weights: list, plan: Plan) -> float:
    """As `time_in_loop`, but each weight is a layer of a stack, as in a model that generates."""
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)
    loop = make_scan(multiply, plan, len(weights))
    taken = median_seconds(lambda: loop(x, stack), plan.repeats)
    return taken / (plan.rounds * len(weights))


def make_scan(multiply: Callable, plan: Plan, layers: int) -> Callable:
    @jax.jit
    def loop(x, stack):
        def step(x, layer):
            y = multiply(x, stack, layer=layer)
            return x + (1e-30 * make_whole(y)).astype(x.dtype), None

        def one_round(_, x):
            return lax.scan(step, x, jnp.arange(layers))[0]

        return lax.fori_loop(0, plan.rounds, one_round, x)

    return loop


def measure_ceilings(plan: Plan) -> dict[str, float]:
    """Returns the rates of a copy and of a bfloat16 product, and the seconds of an empty launch."""
    side, launches = plan.side, 64
    array = jnp.ones((side, side), jnp.float32)
    negate = jax.jit(lambda a: -a)
    copy = median_seconds(lambda: negate(array), plan.repeats)
    left = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    square = jax.jit(lambda a: a @ a)
    matmul = median_seconds(lambda: square(left), plan.repeats)

    @jax.jit
    def launch(x):
        for _ in range(launches):
            x = lax.optimization_barrier(x + 1)
        return x

    empty = median_seconds(lambda: launch(jnp.zeros(8)), plan.repeats)
    return {
        "copy_bytes_per_second": 2 * array.nbytes / copy,
        "matmul_flops_per_second": 2 * side**3 / matmul,
        "launch_seconds": empty / launches,
    }


# Sides


def count_copies(plan: Plan, size: int) -> int:
    """Returns how many weights of a size in bytes fill the cache, two at least."""
    return max(2, -(-plan.cache // size))


def draw_planes(problem: Problem, count: int) -> list[Planes]:
    random = np.random.RandomState(0)
    codes = random.randint(0, 2**problem.bits, (problem.d_in, problem.d_out), np.uint8)
    shape = (problem.d_in // GROUP, problem.d_out)
    scales = (0.5 + random.rand(*shape)).astype(np.float16) / np.float16(problem.d_in**0.5)
    offsets = (random.rand(*shape) * 2**problem.bits).astype(np.float16)
    one = Planes.from_codes(codes, scales, offsets, bits=problem.bits, group_size=GROUP)
    # Copies with other numbers: equal ones might be made once.
    return [jax.tree.map(lambda a, i=i: jnp.roll(a, i, axis=-1), one) for i in range(count)]


def draw_x(problem: Problem, dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (problem.m, problem.d_in), dtype)


def time_ours(problem: Problem, plan: Plan, implementation: str, timer: Callable) -> float:
    dtype = jnp.float32 if implementation == "xla" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(2))
    a = jax.random.normal(keys[0], (problem.d_in, problem.rank), dtype) / problem.d_in**0.5
    b = jax.random.normal(keys[1], (problem.rank, problem.d_out), dtype)
    weights = draw_planes(problem, count_copies(plan, problem.moved))
    # Each weight has an adapter of its own.
    adapters = [LowRank(a + i, b) for i in range(len(weights))] if problem.rank else []

    multiply = partial(multiply_packed, implementation=implementation)
    given = [(w, *adapters[i : i + 1]) for i, w in enumerate(weights)]
    return timer(multiply, draw_x(problem, dtype), given, plan)


def multiply_packed(x: jax.Array, given: tuple, *, implementation: str, layer=None) -> jax.Array:
    base, *corrections = given
    return packed_matmul(
        x, base, corrections=corrections, layer=layer, implementation=implementation
    )


def time_dense(problem: Problem, plan: Plan) -> float:
    shape = (problem.d_in, problem.d_out)
    count = count_copies(plan, 2 * problem.d_in * problem.d_out)
    keys = jax.random.split(jax.random.key(3), count)
    weights = [Dense(jax.random.normal(key, shape, jnp.bfloat16)) for key in keys]
    return time_in_loop(lambda x, w: x @ w.w, draw_x(problem, jnp.bfloat16), weights, plan)


def time_dequantizing(problem: Problem, plan: Plan) -> float:
    weights = draw_planes(problem, count_copies(plan, problem.moved))
    x = draw_x(problem, jnp.bfloat16)
    return time_in_loop(lambda x, w: x @ w.dense(x.dtype), x, weights, plan)


def time_ejkernel(problem: Problem, plan: Plan) -> float:
    from ejkernel.modules.operations.quantized_matmul import quantized_matmul
    from ejkernel.quantization import prepack_quantized_weights

    options = {"group_size": GROUP, "bits": problem.bits, "mode": "affine", "axis": "col"}
    w = jax.random.normal(jax.random.key(4), (problem.d_out, problem.d_in), jnp.bfloat16)
    one = prepack_quantized_weights(w, **options)
    count = count_copies(plan, problem.moved)
    weights = [jax.tree.map(lambda a, i=i: jnp.roll(a, i, axis=-1), one) for i in range(count)]

    def multiply(x, w):
        return quantized_matmul(x, *w, **options)

    return time_in_loop(multiply, draw_x(problem, jnp.bfloat16), weights, plan)


def time_in_torch(calls: list[Callable[[], Any]], plan: Plan) -> float:
    """Returns the seconds of one call, all of them replayed as one graph."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for _ in range(plan.repeats + 1):
        start = time.perf_counter()
        for _ in range(plan.rounds):
            graph.replay()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]) / (plan.rounds * len(calls))


def time_gemlite(problem: Problem, plan: Plan) -> float:
    import torch
    from gemlite.core import GemLiteLinear
    from gemlite.dtypes import DType

    x = torch.randn(problem.m, problem.d_in, dtype=torch.float16, device="cuda")
    codes = torch.randint(0, 2**problem.bits, (problem.d_out, problem.d_in), dtype=torch.uint8)
    scales = torch.rand(problem.d_out * problem.d_in // GROUP, 1, dtype=torch.float16)
    layers = []
    for _ in range(count_copies(plan, problem.moved)):
        layer = GemLiteLinear(problem.bits, GROUP, problem.d_in, problem.d_out, DType.FP16,
                              DType.FP16)  # fmt: skip
        layer.pack(codes.cuda(), scales.cuda(), scales.cuda(), None)
        layers.append(layer)
    return time_in_torch([lambda layer=layer: layer(x) for layer in layers], plan)


def time_bitsandbytes(problem: Problem, plan: Plan) -> float:
    import bitsandbytes
    import torch

    if problem.bits != 4:
        raise NotImplementedError("NF4 has 4 bits")
    x = torch.randn(problem.m, problem.d_in, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(problem.d_out, problem.d_in, dtype=torch.bfloat16, device="cuda")
    packed = [
        bitsandbytes.functional.quantize_4bit(w, blocksize=GROUP, quant_type="nf4")
        for _ in range(count_copies(plan, problem.moved))
    ]

    def call(codes, state):
        return lambda: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

    with torch.no_grad():
        return time_in_torch([call(*one) for one in packed], plan)


SIDES = dict(
    zip(
        PEERS,
        (time_dense, time_dequantizing, time_gemlite, time_bitsandbytes, time_ejkernel),
        strict=True,
    )
)


# Runs


def run_side(name: str, problem: Problem, plan: Plan, implementation: str) -> dict:
    """Returns one row: its seconds, or why there are none."""
    row = {**problem._asdict(), "side": name}
    try:
        if name == OURS:
            seconds = time_ours(problem, plan, implementation, time_in_loop)
        elif name == IN_SCAN:
            seconds = time_ours(problem, plan, implementation, time_in_scan)
        else:
            seconds = SIDES[name](problem, plan)
    # A peer may be missing, or fail on this device; the others still run.
    except Exception as error:
        return row | {"seconds": None, "reason": f"{type(error).__name__}: {error}"[:200]}
    return row | {"seconds": seconds, "reason": ""}


def run(name: str, implementation: str) -> dict:
    """Times all of a plan."""
    plan = PLANS[name]
    rows = []
    for problem in plan.problems():
        for side in list_sides(problem, plan):
            rows.append(run_side(side, problem, plan, implementation))
            print(json.dumps(rows[-1]), flush=True)
    return {
        "plan": name, "implementation": implementation, "group_size": GROUP,
        "date": date.today().isoformat(), "device": jax.devices()[0].device_kind,
        "versions": {package: find_version(package) for package in PACKAGES},
        "ceilings": measure_ceilings(plan), "rows": rows,
    }  # fmt: skip


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--small", action="store_true", help="tiny shapes, once, by XLA")
    parser.add_argument("--implementation", help="default: triton; xla with --small")
    parser.add_argument("--table", type=Path, metavar="JSON", help="write its table beside it")
    given = parser.parse_args(arguments)
    if given.table:
        results = json.loads(given.table.read_text()) if given.table.exists() else NOTHING
        given.table.with_suffix(".md").write_text(write_table(results))
        return
    default = "xla" if given.small else "triton"
    results = run("small" if given.small else "full", given.implementation or default)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
