"""Fine-tuning of a compressed model on the calibration text: SLiM's last stage, for any recipe.

    min over θ of E -log p(x[t+1] | x[..t]; θ),   θ: the adapters, or what else `train` names

Mozaffari et al. 2025, "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation",
arXiv:2410.09615 §3.4 and §4. The base stays packed: its codes and the places of its zeros cannot
move. Quantized adapters are trained straight through their rounding, as SLiM's and
`train.parts.StoredAdapters`, and stored rounded again.

Reference: Paramathic/slim. Its paper trains adapters alone (`train='adapters'`); its code freezes
the compressed linears alone, so that embeddings, norms and the head move as well
('adapters+rest'). One pass over 30 thousand windows of 1024 tokens, 64 an update, is 469 updates
(the paper's 300 thousand tokens would be 5): `preset='slim'`. Differs: factors are trained as they
are stored, where the reference stores √rank of them; the best look at the validation windows is
kept, the start included; a loss that is no longer finite stops with the best kept.
"""

from lqec_jax.core.arguments import check_choice, check_rank
from lqec_jax.core.factories import makes_step
from lqec_jax.core.types import Params, Schedule, TrainingStep
from lqec_jax.train.losses import ModelLoss, NextToken
from lqec_jax.train.parts import Norms, Rest, Scales, StoredAdapters, Zeros
from lqec_jax.train.parts.stored import holds_rounded
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training

REFERENCE = "Paramathic/slim@09a5676 main.py"

# The authors': Adafactor, 1e-4 falling in a line, 5 updates of warm-up, no look and no early stop.
SLIM = dict(
    optimizer="adafactor",
    lr=1e-4,
    decay="linear",
    warmup=5,
    updates=469,
    batch=64,
    weight_decay=0.0,
    patience=0,
    eval_every=67,
)
# Ours: RILQ's rule for the learning rate, 0.256 over the width, and its schedule, with a warm-up
# because second moments are empty at first.
OURS = dict(
    optimizer="adamw",
    lr=None,
    decay="cosine",
    warmup=0.05,
    updates=200,
    batch=8,
    weight_decay=0.0,
    patience=5,
    eval_every=25,
)
PRESETS = {"ours": OURS, "slim": SLIM}
# What may be trained, in words.
CHOICES = {
    "adapters": "the adapters alone",
    "scales": "the scales of the base alone",
    "scales+zeros": "the scales and zeros of the base",
    "adapters+norms": "adapters and norms",
    "adapters+rest": "adapters, norms, biases, embedding and head",
}


@makes_step(
    presets=PRESETS,
    order="rank train accumulate dtype optimizer lr decay warmup updates batch weight_decay "
    "patience eval_every",
)
def finetune(
    *,
    rank: int | float | None = None,
    train: str = "adapters",
    optimizer: str | None = None,
    lr: float | None = None,
    decay: str | None = None,
    warmup: int | float | None = None,
    updates: int | None = None,
    batch: int | None = None,
    accumulate: int | None = None,
    weight_decay: float | None = None,
    patience: int | None = None,
    eval_every: int | None = None,
    dtype: str = "float16",
    preset: str = "ours",
) -> TrainingStep:
    """Makes the step that trains a compressed model on its next token.

    Adapters that are there are trained from where they are; `rank` begins new ones, with b = 0.

    Args:
      rank: of new adapters, an integer or a fraction of min(d_in, d_out). Without it there must be
        some.
      train: 'adapters', as SLiM's paper; 'adapters+norms'; 'adapters+rest', with embedding, biases
        and head too, as SLiM's code; 'scales', those of the base alone, which keeps a model without
        adapters one; 'scales+zeros', with the zero points of uniform grids too, in float16. The
        report says what was trained.
      optimizer: 'adamw', 'adam' or 'adafactor'; see `train.rates.Rates`.
      lr: the highest; None is 0.256 over the model's width, and for scales 0.002 of their value.
      decay, warmup: 'cosine', 'linear' or 'constant', after so many updates, or that fraction of
        them, on a rising line.
      updates, batch: at most so many updates of so many windows, in `accumulate` equal parts; None
        chooses them, see `train.update.count_parts`.
      weight_decay: decoupled; adam has none.
      patience, eval_every: stop after so many looks, so many updates apart, without a new best on
        the validation windows; patience=0 never stops early.
      dtype: in which new adapters are stored, 'float16' or 'float32'; others stay in theirs.
      preset: 'slim' for the authors' hyper-parameters (`SLIM`), 'ours' for `OURS`; an argument
        given wins over the preset.
    """
    check_choice("finetune", "train", train, CHOICES)
    check_choice("finetune", "dtype", dtype, ("float16", "float32"))
    if rank is not None:
        check_rank("finetune", rank)
    rates = Rates(lr, decay, warmup=warmup, weight_decay=weight_decay,
                  optimizer=optimizer)  # fmt: skip
    rates.check("finetune")
    known = {
        "adapters": StoredAdapters(rank=rank, dtype=dtype, rates=rates),
        "scales": Scales(rates=rates),
        "zeros": Zeros(rates=rates),
        "norms": Norms(rates=rates),
        "rest": Rest(rates=rates),
    }
    return make_training(
        "finetune",
        [known[name] for name in train.split("+")],
        ModelLoss((NextToken(weighed=True),)),
        scope="model",
        schedule=Schedule(updates, batch, accumulate, eval_every, patience),
        objective_name="next-token loss",
        describe=_describe,
    )


def _describe(parts: tuple, begun: Params, count: int) -> tuple[str, ...]:
    """Returns what is said of what was trained."""
    names = {
        StoredAdapters: "adapters",
        Scales: "scales",
        Zeros: "zeros",
        Norms: "norms",
        Rest: "rest",
    }
    said = CHOICES["+".join(names[type(part)] for part in parts)]
    rounded = "; adapters are quantized, and were trained through their rounding"
    return (f"trained: {said}, {count} numbers{rounded if holds_rounded(begun) else ''}",)
