"""ApiQ: a block's clipped grids and its adapters, trained together on what the block answers.

    ŵ = Q(w; γ, β) + (alpha/r) A B,   L = E (F(h) - F̂(ĥ))² + E (F(ĥ) - F̂(ĥ))²

(Liao et al. 2024, arXiv:2402.05147). Q is OmniQuant's clipped grid, see `core.clipping`; h and ĥ
are the teacher's and the student's stream, F and F̂ their blocks, see `train.answers`. That is
`scope='block'`, ApiQ-bw, which the released code trains; the second term is its `aug_loss`.
`scope='linear'` is the paper's ApiQ-lw: weight after weight in the order of the data,

    L = E (x w - x̂ ŵ)² [ + E (x̂ w - x̂ ŵ)² ],

which depends on moments of the inputs alone, see `train.moments`; adapters begin at their closed
form there.

Differs from BaohaoLiao/ApiQ@782adbd: scales are rounded to their stored dtype and codes computed
from them while training, where the released code casts the block to half precision at the end and
lets codes flip; alpha/r is inside b; the learning rates decay; the best of the epochs is kept, the
start included; a group of one sign keeps zero inside its range. Its symmetric grid, which its
scripts use, is s = absmax/(2^(b-1) - 1) with zero 2^(b-1) - 1: at 2 bits it begins with three
levels, {-1, 0, 1} · absmax, the fourth being out of reach until σ(γ) is below 2/3, and twice the
error of the asymmetric grid. Ours is s = 2·absmax/(2^b - 1), whose four levels are all in use.
"""

from lqec_jax.core.arguments import check_choice
from lqec_jax.core.factories import makes_step
from lqec_jax.core.group_grid import make_grid
from lqec_jax.core.types import Schedule, TrainingStep
from lqec_jax.train.answers import Answer
from lqec_jax.train.moments import Moments
from lqec_jax.train.parts import Adapters, Clips
from lqec_jax.train.rates import Rates, check_schedule
from lqec_jax.train.steps import make_training, same_key

REFERENCE = "BaohaoLiao/ApiQ@782adbd apiq/calibrate.py"

# The authors' settings, for 128 windows of 2048 tokens and rank 64.
PAPER = dict(
    alpha=16.0,
    epochs=20,
    batch=1,
    clip_lr=5e-3,
    lr=5e-4,
    weight_decay=0.1,
    decay="constant",
)
# Ours, measured on two small models at 2 bits and rank 16: 640 updates of two windows a block go
# further than the authors' 2560 of one. A learning rate of None is thrice RILQ's, 0.768 over the
# model's width.
OURS = dict(
    alpha=16.0,
    epochs=5,
    batch=2,
    clip_lr=0.05,
    lr=None,
    weight_decay=0.1,
    decay="cosine",
)
LR_TIMES_WIDTH = 0.768
PRESETS = {"ours": OURS, "paper": PAPER}


@makes_step(
    presets=PRESETS,
    order="bits group_size rank scope symmetric alpha epochs batch clip_lr lr weight_decay decay "
    "updates aug scale_dtype dtype",
)
def apiq(
    *,
    bits: int = 2,
    group_size: int | None = 64,
    rank: int | float | None = None,
    scope: str = "block",
    symmetric: bool = False,
    alpha: float | None = None,
    epochs: int | None = None,
    batch: int | None = None,
    clip_lr: float | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    decay: str | None = None,
    updates: int = 200,
    aug: bool | None = None,
    scale_dtype: str = "float16",
    dtype: str = "float16",
    preset: str = "ours",
) -> TrainingStep:
    """Makes the step that replaces a block's bases by clipped grids with adapters beside them.

    A linear that has a low-rank correction trains that one, whatever method made it; the others
    begin with a ~ N(0, 1/rank²) and b = 0, which changes nothing, or by scope='linear' with the
    adapter that leaves least beside the first grid. Transforms and zeros of a base stay.

    Args:
      bits, group_size, symmetric, scale_dtype: of the grid, as for `rtn`.
      rank: of new adapters, an integer or a fraction of min(d_in, d_out); 64 unless said.
      scope: 'block' trains all of a block on what it answers, 'linear' one weight after another.
      alpha: the published form is y += (alpha/rank) (x A) B; see `rilq`.
      epochs, batch: over the training windows, and windows an update; of scope='block'.
      clip_lr: of Adam, on logits, which have the same size in every model.
      lr: of Adam, on adapters; None is 0.768 / width / (alpha/rank), by which b moves as far at
        every rank. `decay` brings both rates to zero by 'cosine' or leaves them 'constant'.
      weight_decay: decoupled, of adapters and of logits, which it draws to where the range is
        halved.
      updates: of each weight over all windows at once; of scope='linear'.
      aug: adds the distance to the teacher's block, or weight, on the student's stream. None is the
        authors' choice: their scripts have it for blocks, the paper has none for weights.
      dtype: in which adapters are stored at the end, 'float16' or 'float32'.
      preset: 'paper' for the authors' hyper-parameters (`PAPER`), 'ours' for those that reach as
        far in fewer updates (`OURS`). An argument given wins over the preset.
    Cost: by blocks, epochs · n passes forward and backward through a block, whose weights are read
      a tile at a time: beside the dense weight it is given, no float32 copy of one is held.
    """
    grid = make_grid("apiq", bits=bits, group_size=group_size, symmetric=symmetric,
                     scale_dtype=scale_dtype)  # fmt: skip
    check_choice("apiq", "scope", scope, ("block", "linear"))
    aug = scope == "block" if aug is None else aug
    check_choice("apiq", "aug", aug, (True, False))
    clips = Clips(grid=grid, rates=Rates(clip_lr, decay, weight_decay=weight_decay))
    clips.rates.check("apiq", "clip_lr")
    factors = Adapters(
        rank=rank,
        alpha=alpha,
        times_width=LR_TIMES_WIDTH,
        dtype=dtype,
        rates=Rates(lr, decay, weight_decay=weight_decay),
    )
    factors.check("apiq")
    passes = Schedule(epochs=epochs, batch=batch, accumulate=None, patience=0)
    counted = Schedule(updates=updates, batch=None, eval_every=None, patience=0)
    check_schedule("apiq", counted if scope == "block" else passes)  # the other is checked below
    return make_training(
        "apiq",
        [clips, factors],
        Answer(aug) if scope == "block" else Moments(aug),
        scope="block",
        schedule=passes if scope == "block" else counted,
        keys=same_key,
        arguments={"aug": aug},
        objective_name="what the block, or the linear, answers in both streams",
    )
