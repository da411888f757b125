"""The arguments under which the common laws look at every linear method."""

from typing import NamedTuple

D_IN, D_OUT, GROUP = 64, 32, 16


class Variants(NamedTuple):
    """Arguments of a method: rungs go from coarse to fine, the others stand alone."""

    rungs: tuple[str, ...]
    others: tuple[str, ...] = ()


VARIANTS = {
    "rtn": Variants(
        tuple(f"bits={bits}, group_size={GROUP}" for bits in (2, 3, 4)),
        (
            "bits=2, group_size=None, symmetric=True",
            f"bits=3, group_size={GROUP}, symmetric=True, clip_search=True",
            f"bits=2, group_size={GROUP}, clip_search='output', scale_dtype='float32'",
        ),
    ),
    "hqq": Variants(
        tuple(f"bits={bits}, group_size={GROUP}" for bits in (2, 3, 4)),
        (
            f"bits=2, group_size={GROUP}, round_zero=True",
            "bits=3, group_size=None, p=1, scale_dtype='float32'",
        ),
    ),
    "slim_quant": Variants(
        ("bits=2", "bits=3", "bits=4"),
        ("bits=3, search='integral'", "bits=4, boost=0.05"),
    ),
    "quantize_input": Variants(
        tuple(f"format='int', bits={bits}" for bits in (2, 4, 8)), ("format='fp8'",)
    ),
    "hadamard": Variants(("block=16", "block=32", "block=None"), ("output=True",)),
    "nf": Variants(
        tuple(f"bits={bits}, group_size={GROUP}" for bits in (2, 3, 4)),
        ("bits=3, group_size=None, scale_dtype='float32'", "bits=4, group_size=16, double=True"),
    ),
    "higgs": Variants(("bits=2", "bits=3", "bits=4"), ("bits=2, p=1, block=16",)),
    "e8p": Variants(("bits=2", "bits=3", "bits=4"), ("bits=2, passes=0",)),
    "squeezellm": Variants(
        tuple(f"bits={bits}, outliers=0" for bits in (2, 3, 4)),
        ("bits=2, weights='rms', outliers=0.01", "bits=3, weights='ones', outliers=0.01"),
    ),
    "bcq": Variants(
        tuple(f"bits={bits}, group_size={GROUP}" for bits in (2, 3, 4)),
        ("bits=1, group_size=None, scale_dtype='float32'", "bits=2, group_size=16, shift=True"),
    ),
    "ternary": Variants(
        ("group_size=None", "group_size=32", "group_size=16"), ("group_size=32, shift=False",)
    ),
    "onebit": Variants(
        ("group_size=None", "group_size=32", "group_size=16"), ("scale_dtype='float32'",)
    ),
    "gptq": Variants(
        tuple(f"bits={bits}, group_size={GROUP}" for bits in (2, 3, 4)),
        ("bits=3, group_size=None, symmetric=True, act_order=True, clip_search=False",),
    ),
    "awq": Variants(
        tuple(f"bits={bits}, group_size={GROUP}, n_grid=5" for bits in (2, 3, 4)),
        ("bits=3, group_size=None, symmetric=True, clip_search=False",),
    ),
    "magnitude": Variants(tuple(f"sparsity={s}" for s in (0.75, 0.5, 0.25)), ("sparsity='2:4'",)),
    "wanda": Variants(tuple(f"sparsity={s}" for s in (0.75, 0.5, 0.25)), ("sparsity='2:4'",)),
    "sparsegpt": Variants(
        tuple(f"sparsity={s}" for s in (0.75, 0.5, 0.25)),
        (f"sparsity='2:4', bits=4, group_size={GROUP}",),
    ),
    "svd": Variants(("rank=2", "rank=4", "rank=8"), ("rank=0.25, dtype='float32'",)),
    "lqer": Variants(("rank=2", "rank=4", "rank=8")),
    "naive_lora": Variants(("rank=2", "rank=4", "rank=8")),
    "loftq": Variants(
        tuple(f"quantizer=rtn(bits=2, group_size={GROUP}), rank={rank}" for rank in (2, 4, 8)),
        (f"quantizer=nf(bits=2, group_size={GROUP}), rank=4, iters=2, first='factors'",),
    ),
    "l2qer": Variants(("rank=2", "rank=4", "rank=8")),
    "slim_lora": Variants(("rank=2", "rank=4", "rank=8"), ("rank=0.25, saliency='absmean'",)),
    "qera_approx": Variants(("rank=2", "rank=4", "rank=8")),
    "qera": Variants(("rank=2", "rank=4", "rank=8"), ("rank=0.25, dtype='float32'",)),
    "eora": Variants(("rank=2", "rank=4", "rank=8"), ("rank=4, passes=4",)),
    "caldera": Variants(
        ("rank=2", "rank=4", "rank=8"),
        (f"quantizer=gptq(bits=2, group_size={GROUP}), rank=8, factor_bits=4, iters=2, inner=2",),
    ),
    "aser": Variants(
        ("rank=2", "rank=4", "rank=8"),
        (
            "rank=8, cumulative=0.1",
            f"rank=4, quantizer=rtn(bits=2, group_size={GROUP}), outliers=2",
        ),
    ),
    "lq_lora": Variants(
        ("rank=2", "rank=4", "rank=8"),
        (f"rank=8, quantizer=rtn(bits=2, group_size={GROUP}), iters=2",),
    ),
    "quantize_adapter": Variants(("bits=2", "bits=4", "bits=8"), ("bits=4, group_size=None",)),
}
# A method that begins where another one ended.
BEGINS_AFTER = {"quantize_adapter": "svd(rank=8)"}
