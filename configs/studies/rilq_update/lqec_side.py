"""The lqec_jax side of the RILQ update benchmark: the library's own update, over packed weights.

Model, windows, quantizer, adapters' start, optimizer and loss are those of `torch_peer.py`, so
first and last losses must agree to float32 rounding; only then are the times comparable.

    python configs/studies/rilq_update/lqec_side.py --model DIR --tokens windows.npy --threads 2
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import lqec_jax as lqec
from lqec_jax.core import sites
from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.evaluate.report import peak_rss_mb
from lqec_jax.models.decoder import model_fns
from lqec_jax.train.losses import Discrepancy, ModelLoss, NextToken
from lqec_jax.train.parts import Adapters
from lqec_jax.train.rates import Rates, make_optimizer
from lqec_jax.train.sharding import make_mesh
from lqec_jax.train.steps import Program
from lqec_jax.train.update import count_parts, init_state, make_update
from lqec_kernels import CompressedLinear, LowRank

WINDOWS_PER_UPDATE = 8
ALPHA = 16.0


def draw_adapters(fns, params, rank: int, seed: int):
    """Returns the student with the peer's start: drawn layer by layer, in order of linears."""
    rng = np.random.default_rng(seed)
    layers = jax.tree.leaves(params["blocks"][0])[0].shape[0]
    shapes: list[int] = []
    sites.map_model(params, fns.sites, lambda leaf, n: shapes.append(leaf.d_in) or leaf)
    drawn = [[rng.standard_normal((rank, d)) / rank for d in shapes] for _ in range(layers)]

    def with_adapter(leaf: CompressedLinear, number: int) -> CompressedLinear:
        a = np.stack([drawn[layer][number].T for layer in range(layers)]).astype(np.float32)
        b = np.zeros((layers, rank, leaf.d_out), np.float32)
        return CompressedLinear(leaf.base, (LowRank(a, b),))

    return sites.map_model(params, fns.sites, with_adapter)


def measure(args: argparse.Namespace) -> dict:
    windows = np.load(args.tokens)[: args.updates * WINDOWS_PER_UPDATE].astype(np.int32)
    dense = lqec.load(args.model, dtype="float32")
    recipe = f"rtn(bits={args.bits}, group_size={args.group_size})"
    t = windows.shape[1]
    student = lqec.compress(dense, recipe, calib=windows[:2].reshape(-1), seqlen=t, windows=2)
    fns = model_fns(dense.config, dense.dtype, remat=args.remat)
    params = draw_adapters(fns, student.params, args.rank, args.seed)
    hidden = jax.jit(lambda params, tokens: fns.hidden(params, tokens)[0])
    teacher = np.concatenate([hidden(dense.params, windows[i : i + 8])
                              for i in range(0, len(windows), 8)])  # fmt: skip
    part = Adapters(alpha=ALPHA, rates=Rates(args.lr, "constant", weight_decay=0.0))
    loss = ModelLoss((Discrepancy(0.5), NextToken(0.5)))
    text, work = Windows(windows, len(windows)), Work(jax.random.key(0))
    read = loss.prepare("rilq", ModelProblem(fns, params, text, work, teacher))
    optimizer = make_optimizer((part,), 128, args.updates)
    mesh, placed = make_mesh(data=args.devices), None
    state = init_state(params, optimizer)
    if args.devices > 1:
        placed = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
        state = jax.device_put(state, placed)
    by_window = NamedSharding(mesh, PartitionSpec("data"))
    parts = args.accumulate or count_parts(WINDOWS_PER_UPDATE, t, args.devices)
    update = make_update(
        Program(fns, (part,), loss), optimizer, accumulate=parts, state_sharding=placed
    )
    wall, cpu, losses = [], [], []
    batches = len(windows) // WINDOWS_PER_UPDATE
    for i in range(args.updates):
        rows = i % batches * WINDOWS_PER_UPDATE + np.arange(WINDOWS_PER_UPDATE)
        started = time.perf_counter(), time.process_time()
        state, metrics = update(state, jax.device_put(read(rows), by_window))
        jax.block_until_ready(state)
        wall.append(time.perf_counter() - started[0])
        cpu.append(time.process_time() - started[1])
        losses.append(float(metrics["loss"]))
    return {
        "wall_seconds": statistics.median(wall[args.warmup :]),
        "cpu_seconds": statistics.median(cpu[args.warmup :]),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "compile_seconds": wall[0],
        "threads": len(os.sched_getaffinity(0)),
        "updates": args.updates,
        "warmup": args.warmup,
        "rank": args.rank,
        "accumulate": parts,
        "devices": args.devices,
        "remat": args.remat,
        "peak_rss_mb": peak_rss_mb(),
        "versions": {"jax": jax.__version__},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="int .npy [windows, t]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4, help="updates left out of the medians")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accumulate", type=int, help="parts of a batch; else as RILQ does")
    parser.add_argument("--devices", type=int, default=1, help="simulated; windows are split")
    parser.add_argument("--remat", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    # XLA takes as many threads as there are processors it may run on, counted when it starts.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    print(json.dumps(measure(arguments), indent=1))
