"""Fine-tuning: a packed model trained on text, in what of it may move.

    min over θ of E_x  Σ_t weight[x, t] · -log p(x[t+1] | x[..t]; θ),   θ: adapters, scales, ..

The base stays packed, its codes and its zeros as they are. A quantized adapter is trained through
its rounding: the forward pass reads round(a), the gradient is a's own (straight through), and what
is stored in the end is what the forward pass read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core.arguments import check_choice, check_int, check_number, check_rank
from lqec_jax.core.tree import SELECTIONS, partition
from lqec_jax.core.types import ModelFns, ModelSolution, Params
from lqec_jax.errors import InputError
from lqec_jax.train.adapters import (
    LR_TIMES_WIDTH,
    add_adapter,
    check_parts,
    find_adapters,
    make_schedule,
    map_linears,
    store_adapters,
)
from lqec_jax.train.fit import Objective, fit
from lqec_jax.train.losses import next_token_nll
from lqec_kernels.adapters import QuantizedLowRank, round_columns
from lqec_kernels.formats import CompressedLinear, LowRank

CHOICES = ("adapters", "scales", "adapters+norms", "adapters+rest")
OPTIMIZERS = ("adamw", "adam", "adafactor")
DECAYS = ("cosine", "linear", "constant")
# Of a scale, an update; what `trainings.e2e_qp` measured.
SCALE_LR = 0.002


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and on what.

    Attributes:
      params: a model whose linears are CompressedLinear.
      tokens: int32 [n, t], training rows first.
      weights: float32 [n, t - 1], what predicting tokens 1 .. t-1 counts, 0 for what is not
        learned; a row's loss is their weighted sum, the model's the mean over rows.
      train: how many rows are trained on, the others are looked at.
      width: of hidden states.
      mesh, session: as in `core.types.ModelProblem`.
    """

    fns: ModelFns
    params: Params
    tokens: np.ndarray
    weights: np.ndarray
    train: int
    width: int
    key: jax.Array
    mesh: Any = None
    session: Any = None


class Rounding(NamedTuple):
    """How an adapter's factors are stored: bits, and groups of a and of b."""

    bits: int
    a_group: int
    b_group: int


def check_settings(method: str, settings: Mapping[str, Any]) -> None:
    """Checks what fine-tuning is told.

    Raises:
      InputError: the first setting that cannot be.
    """
    check_choice(method, "train", settings["train"], CHOICES)
    check_choice(method, "optimizer", settings["optimizer"], OPTIMIZERS)
    check_choice(method, "decay", settings["decay"], DECAYS)
    check_choice(method, "dtype", settings["dtype"], ("float16", "float32"))
    for name in ("updates", "batch", "eval_every"):
        check_int(method, name, settings[name], 1)
    check_int(method, "patience", settings["patience"], 0)
    check_number(method, "weight_decay", settings["weight_decay"], 0.0)
    if settings["lr"] is not None:
        check_number(method, "lr", settings["lr"], 0.0)
    if settings["rank"] is not None:
        check_rank(method, settings["rank"])
    if isinstance(settings["warmup"], float):
        check_number(method, "warmup", settings["warmup"], 0.0, 1.0)
    else:
        check_int(method, "warmup", settings["warmup"], 0)
    if settings["optimizer"] == "adam" and settings["weight_decay"]:
        raise InputError(
            f"{method}: weight_decay={settings['weight_decay']} and optimizer='adam', which has "
            "none; take 'adamw'"
        )
    check_parts(method, settings["batch"], settings["accumulate"])


def tune(method: str, problem: Tuning, settings: Mapping[str, Any]) -> ModelSolution:
    """Trains what `settings['train']` names and keeps the best seen on the rows to look at.

    Args:
      settings: rank, train, optimizer, lr, decay, warmup, updates, batch, accumulate, weight_decay,
        patience, eval_every, dtype; see `trainings.finetune`.
    Returns:
      The model, stored as it came; notes say what was trained.
    Raises:
      InputError: nothing of what is named is there; Adafactor on a mesh.
    Cost: a forward and a backward pass an update; the base stays packed.
    """
    if settings["optimizer"] == "adafactor" and problem.mesh is not None:
        raise InputError(f"{method}: optimizer='adafactor' runs on one device; leave the mesh out")
    init_key, order_key = jax.random.split(problem.key)

    def start(leaf: CompressedLinear, number: int) -> CompressedLinear:
        return begin(method, leaf, settings, jax.random.fold_in(init_key, number))

    begun = map_linears(problem.fns, problem.params, start)
    opened, roundings = open_adapters(problem.fns, begun)
    select = make_selection(settings["train"])
    count = sum(array.size for array in jax.tree.leaves(partition(opened, select)[0]))
    if not count:
        raise InputError(f"{method}: the model has no {settings['train']} to train; name others")
    fitted = fit(
        problem.fns,
        opened,
        _make_objective(problem, roundings, select),
        make_optimizer(settings, problem.width),
        make_schedule(settings, problem.tokens.shape[1], problem.mesh),
        order_key,
        mesh=problem.mesh,
        session=problem.session,
    )
    params = begun
    if fitted.best_update:
        params = _store(problem.fns, begun, fitted.params, roundings)
    notes = (_describe(settings["train"], count, roundings), *fitted.notes)
    return ModelSolution(params, fitted.history, fitted.best_update, notes)


def begin(
    method: str, leaf: CompressedLinear, settings: Mapping[str, Any], key: jax.Array
) -> CompressedLinear:
    """Returns a weight as its training begins, with an adapter where one is to be trained.

    Raises:
      InputError: there is none and no rank is given; a rank is given and another one is there.
    """
    if "adapters" not in settings["train"]:
        return leaf
    rounded = [c for c in leaf.corrections if isinstance(c, QuantizedLowRank)]
    if rounded and settings["rank"] is None:
        return leaf
    if rounded:
        raise InputError(
            f"{method}: rank={settings['rank']} was asked for, but there are quantized adapters of "
            f"rank {', '.join(str(c.rank) for c in rounded)}; leave rank out to train those"
        )
    if settings["rank"] is None and not find_adapters(leaf):
        raise InputError(
            f"{method}: the model has no adapters; give rank=16 for new ones, put a step before it "
            "that adds some, such as slim_lora(rank=0.1), or train='scales'"
        )
    had = bool(find_adapters(leaf))
    leaf = add_adapter(method, leaf, settings["rank"], key)
    return leaf if had else store_adapters(leaf, jnp.dtype(settings["dtype"]))


def make_selection(train: str) -> Callable:
    """Returns what `core.tree.partition` takes for one of `CHOICES`."""
    parts = train.split("+")

    def select(path: tuple, leaf: jax.Array) -> bool:
        if any(isinstance(key, jax.tree_util.GetAttrKey) for key in path):
            own = ("adapters" in parts and SELECTIONS["adapters"](path, leaf)) or (
                "scales" in parts and _is_scale(path)
            )
            return own and jnp.issubdtype(leaf.dtype, jnp.floating)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return False
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return "rest" in parts or ("norms" in parts and _is_norm(names))

    return select


def _is_norm(names: list[str]) -> bool:
    return len(names) > 1 and names[-2].endswith("norm")


def _is_scale(path: tuple) -> bool:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return bool(names) and names[0] == "base" and "scales" in names


def open_adapters(fns: ModelFns, params: Params) -> tuple[Params, dict[int, tuple]]:
    """Puts float factors in place of quantized ones.

    Returns:
      The model, and for the numbers that `map_linears` counts, what the weight's corrections were:
      a Rounding, or None for one that was not quantized.
    """
    roundings: dict[int, tuple] = {}

    def open_one(leaf: CompressedLinear, number: int) -> CompressedLinear:
        found = tuple(_rounding(c) for c in leaf.corrections)
        if any(found):
            roundings[number] = found
        corrections = tuple(
            c.factors() if r else c for c, r in zip(leaf.corrections, found, strict=True)
        )
        return dataclasses.replace(leaf, corrections=corrections)

    return map_linears(fns, params, open_one), roundings


def _rounding(correction: Any) -> Rounding | None:
    if not isinstance(correction, QuantizedLowRank):
        return None
    a, b = correction.a, correction.b
    return Rounding(a.bits, a.group_size, b.group_size)


def round_through(fns: ModelFns, params: Params, roundings: Mapping[int, tuple]) -> Params:
    """Returns the model with every adapter that is stored rounded as it will read.

    The gradient with respect to a rounded factor is the factor's own.
    """

    def through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
        # The exact factor less itself is zero, so what is read is the rounded one to the bit.
        return jax.lax.stop_gradient(rounded) + (exact - jax.lax.stop_gradient(exact))

    def round_one(correction: Any, rounding: Rounding | None) -> Any:
        if rounding is None:
            return correction
        read = round_adapter(correction, rounding).factors()
        return LowRank(through(correction.a, read.a), through(correction.b, read.b))

    def change(leaf: CompressedLinear, number: int) -> CompressedLinear:
        if number not in roundings:
            return leaf
        pairs = zip(leaf.corrections, roundings[number], strict=True)
        return dataclasses.replace(leaf, corrections=tuple(round_one(*pair) for pair in pairs))

    return map_linears(fns, params, change) if roundings else params


def round_adapter(adapter: LowRank, rounding: Rounding) -> QuantizedLowRank:
    """Returns an adapter in the bits and groups that it is stored in."""
    return QuantizedLowRank(
        round_columns(adapter.a, rounding.bits, rounding.a_group),
        round_columns(adapter.b.mT, rounding.bits, rounding.b_group),
    )


def make_optimizer(settings: Mapping[str, Any], width: int) -> optax.GradientTransformation:
    """Returns the optimizer; scales move by fractions of themselves, all else by plain steps.

    Adafactor is without momentum, without relative steps and with updates clipped to an rms of 1,
    as in Hugging Face's trainer; its second moments are factored where the two longest sides of a
    stack of adapters are 128 or more.
    """
    lr = settings["lr"]
    if lr is None:
        lr = SCALE_LR if settings["train"] == "scales" else LR_TIMES_WIDTH / width
    if settings["optimizer"] == "adafactor":
        core = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    else:
        core = (optax.scale_by_adam(),)

    def scale_scales(updates: Params, params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, u, p: u * jnp.abs(p) if _is_scale(path) else u, updates, params
        )

    return optax.chain(
        *core,
        optax.stateless(scale_scales),
        optax.add_decayed_weights(settings["weight_decay"]),
        optax.scale_by_learning_rate(make_rate(lr, settings)),
    )


def make_rate(peak: float, settings: Mapping[str, Any]) -> optax.Schedule:
    """Returns the learning rate by update: up in a line to the peak, then down to zero, or not."""
    updates, warmup = settings["updates"], settings["warmup"]
    rising = round(warmup * updates) if isinstance(warmup, float) else min(warmup, updates)
    left = max(1, updates - rising)
    falling = {
        "cosine": optax.cosine_decay_schedule(peak, left),
        "linear": optax.linear_schedule(peak, 0.0, left),
        "constant": optax.constant_schedule(peak),
    }[settings["decay"]]
    if not rising:
        return falling
    climb = optax.linear_schedule(peak / (rising + 1), peak, rising)
    return optax.join_schedules([climb, falling], [rising])


def _make_objective(problem: Tuning, roundings: Mapping[int, tuple], select: Callable) -> Objective:
    fns = problem.fns

    def loss(params: Params, batch: dict) -> tuple[jax.Array, dict]:
        params = round_through(fns, params, roundings)
        post_norm = fns.hidden(params, batch["tokens"])[1]
        nll = next_token_nll(fns, params, post_norm, batch["tokens"])
        return jnp.mean(jnp.sum(nll * batch["weights"], axis=-1)), {}

    def batch(numbers: np.ndarray) -> dict:
        return {"tokens": problem.tokens[numbers], "weights": problem.weights[numbers]}

    held = len(problem.tokens) - problem.train
    return Objective(loss, batch, problem.train, held, select)


def _store(fns: ModelFns, before: Params, after: Params, roundings: Mapping) -> Params:
    """Returns what was trained in the forms and dtypes it is stored in."""

    def close(leaf: CompressedLinear, number: int) -> CompressedLinear:
        found = roundings.get(number, (None,) * len(leaf.corrections))
        pairs = zip(leaf.corrections, found, strict=True)
        corrections = tuple(round_adapter(c, r) if r else c for c, r in pairs)
        return store_adapters(dataclasses.replace(leaf, corrections=corrections), jnp.float32)

    closed = map_linears(fns, after, close)
    return jax.tree.map(_as_it_came, before, closed)


def _as_it_came(before: jax.Array, after: jax.Array) -> jax.Array:
    """Returns an array in the dtype that it had, within its range."""
    if before.dtype == after.dtype:
        return after
    limits = jnp.finfo(before.dtype)
    return jnp.clip(after, limits.min, limits.max).astype(before.dtype)


def _describe(train: str, count: int, roundings: Mapping) -> str:
    rounded = "; adapters are quantized, and were trained through their rounding"
    said = {
        "adapters": "the adapters alone",
        "scales": "the scales of the base alone",
        "adapters+norms": "adapters and norms",
        "adapters+rest": "adapters, norms, biases, embedding and head",
    }[train]
    return f"trained: {said}, {count} numbers{rounded if roundings else ''}"
