"""LREC: all adapters trained together on what the teacher predicts.

L = w_k · Σ_t KL(p_t || q_t) + w_c · mean CE, with p the teacher's next-token probabilities and q
the student's, and only the adapters trained: the error correction of INT2.1 (Chai et al.,
arXiv:2306.08162; reference stochasticai/xTuring@ef23c72 examples/int2-1). Its other half, training
beside packed weights (EMEF), is how every method here trains.

The reference caches the teacher's logits: 1.2 TB for its 10000 windows of 2048 tokens and 32000
words. Here they are computed anew from the teacher's last hidden states, which the model has on
disk anyway; the head is shared, so they are the same.

Differs from the reference: the base stays packed; windows are shuffled anew every epoch; step 0 may
win; no dropout on adapters (0.05 there); its 1e-7 on every logit, which changes no probability, is
left out, and so is its `nan_to_num` of the loss, which hides what this library stops at.
`preset='paper'` restores its hyper-parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.arguments import check_choice, check_int, check_number
from lqec_jax.core.types import ModelProblem, ModelSolution, Params, Step
from lqec_jax.core.walking import cut_rows
from lqec_jax.errors import InputError
from lqec_jax.train import losses
from lqec_jax.train.adapters import (
    check_settings,
    preview_adapters,
    select_adapters,
    train_adapters,
    window_batches,
)
from lqec_jax.train.fit import Objective

REFERENCE = "stochasticai/xTuring@ef23c72 examples/int2-1"

# The authors' job for 2 bits: 10 epochs of 10000 windows, 7 an update, a look every epoch. Their
# job for 4 bits has lr 1e-5 and token_weight 10; their program's own defaults, which neither job
# keeps, are lr 3e-4, token_weight 200, batch 4 and adapters on every linear.
PAPER = {"rank": 32, "alpha": 128.0, "lr": 3e-5, "updates": 14280, "batch": 7,
         "weight_decay": 1e-5, "coupled": True, "decay": "constant", "patience": 0,
         "eval_every": 1428, "token_weight": 120.0, "leave_out": ("mlp/down",)}  # fmt: skip
# Ours: the schedule of `rilq` and its rule for a learning rate of None, which held here too: at
# width 128 half and twice as much were worse, at 64 twice as much was better, as it was there
# (configs/studies/lrec_defaults).
OURS = {"rank": None, "alpha": 16.0, "lr": None, "updates": 400, "batch": 8,
        "weight_decay": 0.0, "coupled": False, "decay": "cosine", "patience": 5,
        "eval_every": 25, "token_weight": None, "leave_out": ()}  # fmt: skip
PRESETS = {"ours": OURS, "paper": PAPER}
NEW_RANK = 32
# A weight of None is this times the tokens of a window: the authors' 120 over their 2048, beside
# the KL of one token the same at any length. Without the term and with 1 a token perplexity was
# worse, with 1 the KL too (configs/studies/lrec_defaults).
TOKEN_SHARE = 0.06


def lrec(
    *,
    rank: int | float | None = None,
    alpha: float | None = None,
    lr: float | None = None,
    updates: int | None = None,
    batch: int | None = None,
    accumulate: int | None = None,
    weight_decay: float | None = None,
    coupled: bool | None = None,
    decay: str | None = None,
    patience: int | None = None,
    eval_every: int | None = None,
    kl_weight: float = 1.0,
    token_weight: float | None = None,
    reduction: str = "sum",
    logits: str = "recomputed",
    top_k: int = 64,
    leave_out: Sequence[str] | None = None,
    dtype: str = "float16",
    preset: str = "ours",
) -> Step:
    """Makes the step that trains every adapter on the teacher's predictions.

    A linear that already has a low-rank correction trains that one, whatever method made it; the
    others begin with a ~ N(0, 1/rank²) and b = 0, which changes nothing.

    Args:
      rank: of new adapters, an integer or a fraction of min(d_in, d_out); 32 unless said.
      alpha, lr, decay: see `rilq`; lr=None is 0.256 / width / (alpha/rank).
      updates, batch: at most so many updates of so many windows, in `accumulate` equal parts; None
        chooses them, see `train.update.count_parts`.
      weight_decay: of both factors; `coupled` adds it to the gradients, as Adam's L2 does, and does
        not decouple it.
      patience, eval_every: stop after so many looks, so many updates apart, without a new best on
        the validation windows; patience=0 never stops early.
      kl_weight, token_weight: of the two terms, KL being summed over a window's tokens and CE their
        mean. token_weight=None is 0.06 for every token of a window (`TOKEN_SHARE`).
      reduction: 'mean' divides the loss by the tokens of a window: the same direction.
      logits: how the teacher's predictions come. 'recomputed' from its hidden states, exact, one
        more product with the head. 'streamed' from disk, written once in float16: 2 bytes a token
        and vocabulary entry (10 GB for 320 windows of 512 tokens and 32000 entries), held for a
        whole batch. 'top_k': the `top_k` likeliest and the mass of the others, 8 · top_k + 4 bytes
        a token; its KL is a lower bound of the whole one.
      leave_out: linears without an adapter, by their path, such as 'mlp/down'.
      dtype: in which adapters are stored at the end, 'float16' or 'float32'.
      preset: 'paper' for the authors' job at 2 bits (`PAPER`; at 4 bits add lr=1e-5,
        token_weight=10), 'ours' for what was better on two small models (`OURS`). An argument given
        wins over the preset.
    """
    check_choice("lrec", "preset", preset, PRESETS)
    given = {"rank": rank, "alpha": alpha, "lr": lr, "updates": updates, "batch": batch,
             "weight_decay": weight_decay, "coupled": coupled, "decay": decay,
             "patience": patience, "eval_every": eval_every, "token_weight": token_weight,
             "leave_out": leave_out}  # fmt: skip
    chosen = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    settings = chosen | {"accumulate": accumulate, "kl_weight": kl_weight, "reduction": reduction,
                         "logits": logits, "top_k": top_k, "dtype": dtype}  # fmt: skip
    _check(settings)
    settings["leave_out"] = tuple(settings["leave_out"])
    share = f"{TOKEN_SHARE:g} T" if settings["token_weight"] is None else token_weight
    return Step(
        name="lrec",
        scope="model",
        run=lambda problem: train(problem, settings),
        arguments=settings,
        preview=preview_adapters("lrec", _for_training(settings)),
        leave_out=frozenset(settings["leave_out"]),
        scratch_bytes=lambda vocab: scratch_bytes(settings, vocab),
        objective_name=f"{kl_weight:g} KL(teacher || student), a sum over T tokens, "
        f"+ {share} next-token loss",
    )


def _check(settings: Mapping[str, Any]) -> None:
    check_settings("lrec", settings)
    check_number("lrec", "kl_weight", settings["kl_weight"], 0.0)
    if settings["token_weight"] is not None:
        check_number("lrec", "token_weight", settings["token_weight"], 0.0)
    check_choice("lrec", "coupled", settings["coupled"], (True, False))
    check_choice("lrec", "reduction", settings["reduction"], ("sum", "mean"))
    check_choice("lrec", "logits", settings["logits"], ("recomputed", "streamed", "top_k"))
    check_int("lrec", "top_k", settings["top_k"], 1)
    left = settings["leave_out"]
    if not isinstance(left, tuple | list) or not all(isinstance(path, str) for path in left):
        raise InputError(f"lrec: leave_out={left!r}; paths such as ('mlp/down',) were wanted")


def _for_training(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "new_rank": NEW_RANK}


def scratch_bytes(settings: Mapping[str, Any], vocab: int) -> int:
    """Returns what is kept on disk of a token's teacher."""
    if settings["logits"] == "streamed":
        return 2 * vocab
    return _top_dtype(settings["top_k"]).itemsize if settings["logits"] == "top_k" else 0


def train(problem: ModelProblem, settings: Mapping[str, Any]) -> ModelSolution:
    """Runs LREC on a whole model; see `train.adapters.train_adapters`.

    Raises:
      InputError: `top_k` is more than the vocabulary.
    """
    objective = make_objective(problem, settings)
    return train_adapters("lrec", problem, _for_training(settings), objective)


def make_objective(problem: ModelProblem, settings: Mapping[str, Any]) -> Objective:
    """Returns LREC's loss over the calibration windows; writes the teacher's predictions first."""
    fns, token_weight = problem.fns, settings["token_weight"]
    if settings["logits"] == "recomputed" and problem.outer is not None:
        raise InputError(
            "lrec: logits='recomputed' reads both models by one head, and an earlier step has "
            "trained the student's; use 'streamed' or 'top_k'"
        )
    if token_weight is None:
        token_weight = TOKEN_SHARE * problem.train.shape[1]

    def loss(params: Params, batch: dict) -> tuple[jax.Array, dict]:
        teacher = batch["teacher"]
        if settings["logits"] == "recomputed":
            teacher = fns.norm(params, teacher)
        return losses.lrec_terms(
            fns, teacher, params, batch["tokens"], kl_weight=settings["kl_weight"],
            token_weight=token_weight, reduction=settings["reduction"],
        )  # fmt: skip

    batch = _choose_batches(problem, settings)
    select = select_adapters(settings["leave_out"])
    return Objective(loss, batch, len(problem.train), len(problem.val), select)


def _choose_batches(problem: ModelProblem, settings: Mapping[str, Any]) -> Callable:
    """Returns window numbers -> {'tokens', 'teacher'}, the teacher as `losses.lrec` takes it."""
    hidden = window_batches(problem)
    if settings["logits"] == "recomputed":
        return hidden
    write = _write_log_probs if settings["logits"] == "streamed" else _write_top
    read = write(problem, settings["top_k"])
    windows = np.concatenate([problem.train, problem.val])
    return lambda numbers: {"tokens": windows[numbers], "teacher": read(numbers)}


def _write_log_probs(problem: ModelProblem, _) -> Callable:
    """Writes every token's log-probabilities; returns window numbers -> LogProbs.

    Log-probabilities and not logits: float16 keeps those near zero best, the likely ones.
    """
    fns = problem.fns
    vocab = fns.vocab_size or _head_width(problem)
    kept = _keep(problem, np.dtype(np.float16), (vocab,))
    least = float(np.finfo(np.float16).min)

    def find(params: Params, pre_norm: jax.Array) -> jax.Array:
        found = losses.find_log_probs(fns, params, fns.norm(params, pre_norm)).log_probs
        return jnp.maximum(found, least).astype(jnp.float16)

    # One window at a time: its logits are the whole vocabulary's.
    for rows, found in _answer(problem, find, [slice(n, n + 1) for n in range(len(kept))]):
        kept[rows] = found
    return lambda numbers: losses.LogProbs(np.asarray(kept[numbers]))


def _write_top(problem: ModelProblem, k: int) -> Callable:
    """Writes every token's likeliest followers; returns window numbers -> TopK."""
    fns = problem.fns
    vocab = fns.vocab_size or _head_width(problem)
    if k > vocab:
        raise InputError(f"lrec: top_k={k} is more than the vocabulary of {vocab}; ask for fewer")
    kept = _keep(problem, _top_dtype(k), ())

    def find(params: Params, pre_norm: jax.Array) -> losses.TopK:
        return losses.find_top(fns, params, fns.norm(params, pre_norm), k)

    for rows, found in _answer(problem, find, cut_rows(*kept.shape)):
        for name, array in found._asdict().items():
            kept[name][rows] = array

    def read(numbers: np.ndarray) -> losses.TopK:
        rows = kept[numbers]
        return losses.TopK(*(np.ascontiguousarray(rows[name]) for name in losses.TopK._fields))

    return read


def _top_dtype(k: int) -> np.dtype:
    """Returns what is kept of one token; the fields are those of `losses.TopK`."""
    return np.dtype([("ids", "<i4", (k,)), ("log_probs", "<f4", (k,)), ("rest", "<f4")])


def _keep(problem: ModelProblem, dtype: np.dtype, each: tuple[int, ...]) -> np.ndarray:
    """Makes an array [n, t, *each], on disk where there is a place."""
    shape = (*problem.teacher.shape[:2], *each)
    if problem.scratch is None:
        return np.empty(shape, dtype)
    return np.memmap(problem.scratch, dtype, "w+", shape=shape)


def _answer(problem: ModelProblem, find: Callable, cut: list[slice]):
    """Yields runs of windows and what `find` says of the teacher's hidden states there."""
    outer = problem.outer or {
        name: value for name, value in problem.params.items() if name != "blocks"
    }
    compiled = jax.jit(find)
    for rows in cut:
        yield rows, jax.device_get(compiled(outer, np.asarray(problem.teacher[rows])))


def _head_width(problem: ModelProblem) -> int:
    shape = jax.ShapeDtypeStruct((1, problem.teacher.shape[-1]), jnp.float32)
    return jax.eval_shape(problem.fns.head, problem.params, shape).shape[-1]
