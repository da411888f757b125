"""INT2.1's accounting (arXiv:2306.08162): what a 2-bit model and its adapters weigh, in its layout,
and what fine-tuning beside packed weights holds.

GPTQ in groups of 128 with a float16 scale and a packed zero each, rank-32 adapters and everything
else in float16. The paper's name says its first claim: 2 bits times 1.05. Its second is 5.6 times
less memory for fine-tuning.
"""

import math
from typing import Any

from lqec_jax.core.sites import linear_path
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.parameters import linear_sites
from lqec_jax.planning.memory import tile_bytes, update_parts

BITS, GROUP, RANK = 2, 128, 32
# The paper's adapters leave this one out where "no down projection" is said.
LEFT_OUT = "mlp/down"
# The released fine-tuning: rank 8 on two linears, one window of 512 tokens at a time.
TUNED, TUNED_RANK, TUNED_TOKENS = ("attn/q", "attn/v"), 8, 512
# What the paper says of LLaMA-7B: the model's overhead, and the memory of fine-tuning.
PAPER = {"overhead": 1.05, "saving": 5.6, "packed_bytes": 4_930_000_000}


def account(config: ModelConfig) -> dict[str, Any]:
    """Returns bytes of base, adapters on all linears and on all but the down projections.

    `overhead` is (base + adapters) / base; `training` is of `account_training`; `paper` holds the
    authors' figures for LLaMA-7B, which were not measured here.
    """
    family = families.family(config.family)
    block = family.block_shapes(config)
    linears = {site.path: site.shape for site in linear_sites(config)}
    kept = sum(math.prod(s) for p, s in block.items() if linear_path(p) not in linears)
    outer = sum(math.prod(stored.shape) for stored in family.outer_tensors(config).values())
    packed = sum(_packed_bytes(*shape) for shape in linears.values())
    base = config.layers * (packed + 2 * kept) + 2 * outer
    all_linears = config.layers * _adapter_bytes(linears)
    some = config.layers * _adapter_bytes({p: s for p, s in linears.items() if p != LEFT_OUT})
    return {
        "bits": BITS,
        "group_size": GROUP,
        "rank": RANK,
        "base_bytes": base,
        "adapter_bytes": all_linears,
        "adapter_bytes_without_down": some,
        "overhead": (base + all_linears) / base,
        "overhead_without_down": (base + some) / base,
        "training": account_training(config, base),
        "paper": dict(PAPER),
    }


def account_training(config: ModelConfig, base: int) -> dict[str, Any]:
    """Returns what fine-tuning adapters holds on a device, over packed and over dense weights.

    The same update in all three cases: the released settings (`TUNED`), adapters, moments and
    gradients in float32, activations in 16 bits, blocks recomputed, logits in chunks of the
    vocabulary; see `memory.update_parts`. So the ratio is of the weights alone, as the paper means
    it. Not counted: the device's runtime, and what an allocator wastes. The paper's 5.6 and 4.93 GB
    make 27.6 GB before, which is what weights of 32 bits come to here.

    Args:
      base: bytes of the packed model.
    Returns:
      Bytes by part (`parts`), in all (`packed_bytes`, and with weights of 16 and of 32 bits
      `dense16_bytes`, `dense32_bytes`), and how many times less the packed one is (`saving`,
      `saving_from_32`).
    """
    family = families.family(config.family)
    block = family.block_shapes(config)
    linears = {site.path: site for site in linear_sites(config)}
    outer = sum(math.prod(stored.shape) for stored in family.outer_tensors(config).values())
    numbers = config.layers * sum(math.prod(shape) for shape in block.values()) + outer
    widths = sum(linears[path].d_in + linears[path].d_out for path in TUNED)
    trained = 4 * config.layers * TUNED_RANK * widths
    parts = update_parts(config, trained, TUNED_TOKENS, 2, recomputed=True)
    beside = sum(parts.values())
    packed = base + beside + tile_bytes(max(math.prod(site.shape) for site in linears.values()))
    dense16, dense32 = 2 * numbers + beside, 4 * numbers + beside
    return {
        "rank": TUNED_RANK,
        "linears": list(TUNED),
        "tokens": TUNED_TOKENS,
        "parts": parts,
        "packed_bytes": packed,
        "dense16_bytes": dense16,
        "dense32_bytes": dense32,
        "saving": dense16 / packed,
        "saving_from_32": dense32 / packed,
    }


def _packed_bytes(d_in: int, d_out: int) -> int:
    groups = -(-d_in // GROUP) * d_out
    return d_in * d_out * BITS // 8 + groups * 2 + groups * BITS // 8


def _adapter_bytes(linears: dict[str, tuple[int, int]]) -> int:
    return sum(2 * RANK * (d_in + d_out) for d_in, d_out in linears.values())
