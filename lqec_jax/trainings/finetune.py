"""Fine-tuning of a compressed model on the calibration text: SLiM's last stage, for any recipe.

    min over θ of E -log p(x[t+1] | x[..t]; θ),   θ: the adapters, or what else `train` names

Mozaffari et al. 2025, "SLiM: One-shot Quantization and Sparsity with Low-rank Approximation",
arXiv:2410.09615 §3.4 and §4. The base stays packed: its codes and the places of its zeros cannot
move. Quantized adapters are trained straight through their rounding, as SLiM's and
`train.tuning.round_through`, and stored rounded again.

Reference: Paramathic/slim. Its paper trains adapters alone (`train='adapters'`); its code freezes
the compressed linears alone, so that embeddings, norms and the head move as well
('adapters+rest'). One pass over 30 thousand windows of 1024 tokens, 64 an update, is 469 updates
(the paper's 300 thousand tokens would be 5): `preset='slim'`. Differs: factors are trained as they
are stored, where the reference stores √rank of them; the best look at the validation windows is
kept, the start included; a loss that is no longer finite stops with the best kept.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lqec_jax.core.arguments import check_choice
from lqec_jax.core.types import ModelProblem, ModelSolution, Step
from lqec_jax.train.tuning import Tuning, begin, check_settings, make_selection, tune
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear

REFERENCE = "Paramathic/slim@09a5676 main.py"

# The authors': Adafactor, 1e-4 falling in a line, 5 updates of warm-up, no look and no early stop.
SLIM = {"optimizer": "adafactor", "lr": 1e-4, "decay": "linear", "warmup": 5, "updates": 469,
        "batch": 64, "weight_decay": 0.0, "patience": 0, "eval_every": 67}  # fmt: skip
# Ours: RILQ's rule for the learning rate, 0.256 over the width, and its schedule, with a warm-up
# because second moments are empty at first.
OURS = {"optimizer": "adamw", "lr": None, "decay": "cosine", "warmup": 0.05, "updates": 200,
        "batch": 8, "weight_decay": 0.0, "patience": 5, "eval_every": 25}  # fmt: skip
PRESETS = {"ours": OURS, "slim": SLIM}


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
) -> Step:
    """Makes the step that trains a compressed model on its next token.

    Adapters that are there are trained from where they are; `rank` begins new ones, with b = 0.

    Args:
      rank: of new adapters, an integer or a fraction of min(d_in, d_out). Without it there must be
        some.
      train: 'adapters', as SLiM's paper; 'adapters+norms'; 'adapters+rest', with embedding, biases
        and head too, as SLiM's code; 'scales', those of the base alone, which keeps a model without
        adapters one. The report says what was trained.
      optimizer: 'adamw', 'adam' or 'adafactor'; see `train.tuning.make_optimizer`.
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
    check_choice("finetune", "preset", preset, PRESETS)
    given = {
        "optimizer": optimizer,
        "lr": lr,
        "decay": decay,
        "warmup": warmup,
        "updates": updates,
        "batch": batch,
        "weight_decay": weight_decay,
        "patience": patience,
        "eval_every": eval_every,
    }
    chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    fixed = {"rank": rank, "train": train, "accumulate": accumulate, "dtype": dtype}
    settings = fixed | chosen
    check_settings("finetune", settings)

    def preview(leaf: CompressedLinear) -> CompressedLinear:
        return begin("finetune", leaf, settings, jax.random.key(0))

    return Step(
        name="finetune",
        scope="model",
        run=lambda problem: train_on_text(problem, settings),
        arguments=settings,
        preview=preview,
        trained=lambda leaf: count_trained(preview(leaf), train),
        objective_name="next-token loss",
    )


def train_on_text(problem: ModelProblem, settings: Mapping[str, Any]) -> ModelSolution:
    """Trains a student on the calibration windows, every next token counting the same."""
    tokens = np.concatenate([problem.train, problem.val])
    length = tokens.shape[1] - 1
    weights = np.full((len(tokens), length), 1 / length, np.float32)
    width = problem.teacher.shape[-1]
    tuning = Tuning(problem.fns, problem.params, tokens, weights, len(problem.train), width,
                    problem.key, problem.mesh, problem.session)  # fmt: skip
    return tune("finetune", tuning, settings)


def count_trained(leaf: CompressedLinear, train: str) -> int:
    """Returns how many numbers of one weight are trained; reads shapes only."""
    select = make_selection(train)
    leaves = jax.tree_util.tree_leaves_with_path(leaf)
    own = sum(array.size for path, array in leaves if select(path, array))
    rounded = [c for c in leaf.corrections if isinstance(c, QuantizedLowRank)]
    return own + sum(c.rank * (c.d_in + c.d_out) for c in rounded) * ("adapters" in train)
