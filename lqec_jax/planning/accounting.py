"""INT2.1's accounting (arXiv:2306.08162): what a 2-bit model and its adapters weigh, in its layout.

GPTQ in groups of 128 with a float16 scale and a packed zero each, rank-32 adapters and everything
else in float16. The paper's name says its claim: 2 bits times 1.05.
"""

import math
from typing import Any

from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig

BITS, GROUP, RANK = 2, 128, 32
# The paper's adapters leave this one out where "no down projection" is said.
LEFT_OUT = "mlp/down"


def account(config: ModelConfig) -> dict[str, Any]:
    """Returns bytes of base, adapters on all linears and on all but the down projections.

    `overhead` is (base + adapters) / base. Its released training is held to take 4.93 to 5.96 GB
    for 7 billion parameters, which is the authors' figure and was not measured here.
    """
    family = families.family(config.family)
    block = family.block_shapes(config)
    linears = {p.removesuffix("/kernel"): s for p, s in block.items() if p.endswith("/kernel")}
    kept = sum(math.prod(s) for p, s in block.items() if not p.endswith("/kernel"))
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
    }


def _packed_bytes(d_in: int, d_out: int) -> int:
    groups = -(-d_in // GROUP) * d_out
    return d_in * d_out * BITS // 8 + groups * 2 + groups * BITS // 8


def _adapter_bytes(linears: dict[str, tuple[int, int]]) -> int:
    return sum(2 * RANK * (d_in + d_out) for d_in, d_out in linears.values())
