"""The PyTorch side of the RILQ update benchmark: transformers Llama, dense frozen weights, LoRA.

One update is what the released RILQ loop does: 8 windows, float32, loss
0.5 mean((h_student - h_teacher)^2) + 0.5 next-token cross entropy (h after the final norm),
gradients for the adapters only, Adam. The weights are round-to-nearest 2-bit copies held dense, the
teacher's states are cached, nothing is logged or evaluated in between, so that only the update is
timed.

Four ways are timed in one process, round robin, and the fastest in CPU seconds is the bar to beat:
adapters as peft modules or as the plainest module that works, times 8 micro-batches of one window
(the authors' loop) or one batch of 8. Nothing else may run beside it: threads that wait for one
another and lose a core to a neighbour took 16 times as long.

A is drawn with numpy (`draw_a`), B is zero, so that another implementation can start from the same
point: the first loss is that of the quantized model and the last one is comparable to float32
rounding.

    python configs/studies/rilq_update/torch_peer.py --model DIR --tokens windows.npy --threads 2
"""

import argparse
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WINDOWS_PER_UPDATE = 8
ALPHA = 16


class Lora(nn.Module):
    """y = x W^T + gamma (x A^T) B^T with W frozen."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.a = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.gamma = ALPHA / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        correction = F.linear(F.linear(x, self.a), self.b)
        return F.linear(x, self.weight) + correction * self.gamma


@dataclass
class Way:
    """One student with its optimizer, and the times of its updates."""

    model: nn.Module
    windows_per_step: int
    optimizer: torch.optim.Optimizer
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Asymmetric min/max grid per row and group, zero in range, float16 scales, integer zeros."""
    top = 2**bits - 1
    w = weight.reshape(weight.shape[0], -1, group)  # [d_out, groups, group]
    low = w.amin(-1, keepdim=True).clamp(max=0)
    high = w.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, top)
    codes = ((w / scale).round() + zero).clamp(0, top)
    return (scale * (codes - zero)).reshape(weight.shape)


def draw_a(shapes: list[tuple[int, int]], seed: int) -> list[np.ndarray]:
    """peft's 'gaussian' start, std 1/rank, from one stream: layer by layer, PROJECTIONS order."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal(s) / s[0]).astype(np.float32) for s in shapes]  # each [rank, d_in]


def load_llama(folder: Path) -> nn.Module:
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def quantized(model: nn.Module, bits: int, group: int) -> nn.Module:
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            module.weight.data = round_to_nearest(module.weight.data, bits, group)
    return model


def with_peft(model: nn.Module, rank: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), init_lora_weights="gaussian"
    )
    return peft.get_peft_model(model, config).base_model.model


def with_plain_modules(model: nn.Module, rank: int) -> nn.Module:
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in [n for n, _ in parent.named_children() if n in PROJECTIONS]:
                setattr(parent, name, Lora(getattr(parent, name), rank))
    return model


def set_start(model: nn.Module, seed: int) -> None:
    """Writes the shared start into whichever adapter modules `model` has."""
    adapters = []
    for layer in model.model.layers:
        for name in PROJECTIONS:
            module = getattr(layer.self_attn, name, None) or getattr(layer.mlp, name)
            adapters.append(module.a if hasattr(module, "a") else module.lora_A["default"].weight)
    for a, start in zip(adapters, draw_a([tuple(a.shape) for a in adapters], seed), strict=True):
        a.data = torch.from_numpy(start)


def prepare(args: argparse.Namespace, wrap, windows_per_step: int) -> Way:
    model = wrap(quantized(load_llama(args.model), args.bits, args.group_size), args.rank)
    set_start(model, args.seed)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return Way(model, windows_per_step, torch.optim.Adam(trainable, lr=args.lr))


def step_loss(model: nn.Module, tokens: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    hidden = model.model(input_ids=tokens, use_cache=False)[0]  # [b, t, d]
    logits = model.lm_head(hidden)[:, :-1]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return 0.5 * F.mse_loss(hidden, teacher) + 0.5 * cross_entropy


def update(way: Way, tokens: torch.Tensor, teacher: torch.Tensor) -> float:
    total = 0.0
    steps = len(tokens) // way.windows_per_step
    for some, target in zip(tokens.chunk(steps), teacher.chunk(steps), strict=True):
        loss = step_loss(way.model, some, target) / steps
        loss.backward()
        total += loss.detach()
    way.optimizer.step()
    way.optimizer.zero_grad()
    return float(total)


def timed_update(way: Way, tokens: torch.Tensor, teacher: torch.Tensor) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = update(way, tokens, teacher)
    way.cpu.append(time.process_time() - cpu)
    way.wall.append(time.perf_counter() - wall)
    way.losses.append(loss)


@torch.no_grad()
def teacher_states(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    teacher = load_llama(folder).model
    return torch.cat([teacher(input_ids=t, use_cache=False)[0] for t in tokens.split(8)])


WAYS = {
    "peft, 8 x 1": (with_peft, 1),
    "peft, 1 x 8": (with_peft, 8),
    "plain, 8 x 1": (with_plain_modules, 1),
    "plain, 1 x 8": (with_plain_modules, 8),
}


def measure(args: argparse.Namespace) -> dict[str, Way]:
    windows = np.load(args.tokens)[: args.updates * WINDOWS_PER_UPDATE]
    tokens = torch.from_numpy(windows.astype(np.int64))  # [windows, t]
    teacher = teacher_states(args.model, tokens)
    ways = {name: prepare(args, *WAYS[name]) for name in args.way}
    batches = len(tokens) // WINDOWS_PER_UPDATE
    for i in range(args.updates):
        at = slice(i % batches * WINDOWS_PER_UPDATE, (i % batches + 1) * WINDOWS_PER_UPDATE)
        for way in ways.values():
            timed_update(way, tokens[at], teacher[at])
    return ways


def report(args: argparse.Namespace, ways: dict[str, Way]) -> dict:
    rows = {
        name: {
            "wall_seconds": statistics.median(way.wall[args.warmup :]),
            "cpu_seconds": statistics.median(way.cpu[args.warmup :]),
            "first_loss": way.losses[0],
            "last_loss": way.losses[-1],
        }
        for name, way in ways.items()
    }
    fastest = min(rows, key=lambda name: rows[name]["cpu_seconds"])
    return {
        **rows[fastest],
        "fastest": fastest,
        "ways": rows,
        "threads": torch.get_num_threads(),
        "updates": args.updates,
        "warmup": args.warmup,
        "rank": args.rank,
        "lr": args.lr,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face Llama folder")
    parser.add_argument("--tokens", type=Path, required=True, help="int .npy [windows, t]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=4, help="updates left out of the medians")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--way", nargs="+", choices=WAYS, default=list(WAYS), help="one alone for its peak_rss_mb"
    )
    args = parser.parse_args(argv)
    if args.updates <= args.warmup:
        parser.error(f"--updates {args.updates} leaves nothing after --warmup {args.warmup}")
    return args


if __name__ == "__main__":
    arguments = parse(sys.argv[1:])
    torch.set_num_threads(arguments.threads)
    print(json.dumps(report(arguments, measure(arguments)), indent=1))
