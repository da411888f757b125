"""Low-rank adapters as what is trained: how they begin, how they move, how they are kept.

Every method that trains the adapters of a whole model is a loss and settings; the rest is here.
Adapters and moments are float32 whatever the compute dtype; the base stays packed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core.arguments import check_choice, check_int, check_number, check_rank, resolve_rank
from lqec_jax.core.closed_form import balance
from lqec_jax.core.tree import get_at, is_compressed, set_at
from lqec_jax.core.types import ModelFns, ModelProblem, ModelSolution, Params
from lqec_jax.errors import InputError
from lqec_jax.train.fit import Objective, Schedule, fit
from lqec_jax.train.sharding import DATA
from lqec_jax.train.update import count_parts
from lqec_kernels.formats import CompressedLinear, LowRank

# A learning rate of None is this over the model's width, see `make_optimizer`.
LR_TIMES_WIDTH = 0.256
DEFAULT_RANK = 64


def check_settings(method: str, settings: Mapping[str, Any]) -> None:
    """Checks what every training of adapters is told.

    Raises:
      InputError: the first setting that cannot be.
    """
    if settings["rank"] is not None:
        check_rank(method, settings["rank"])
    for name in ("updates", "batch", "eval_every"):
        check_int(method, name, settings[name], 1)
    check_int(method, "patience", settings["patience"], 0)
    for name in ("alpha", "weight_decay"):
        check_number(method, name, settings[name], 0.0)
    if settings["lr"] is not None:
        check_number(method, "lr", settings["lr"], 0.0)
    check_choice(method, "decay", settings["decay"], ("cosine", "constant"))
    check_choice(method, "dtype", settings["dtype"], ("float16", "float32"))
    check_parts(method, settings["batch"], settings["accumulate"])


def check_parts(method: str, batch: int, accumulate: int | None) -> None:
    """Checks that a batch can be walked in so many equal parts; None is for `count_parts`."""
    if accumulate is None:
        return
    check_int(method, "accumulate", accumulate, 1)
    if batch % accumulate:
        raise InputError(
            f"{method}: batch={batch} does not divide into accumulate={accumulate} equal parts; "
            "choose a divisor"
        )


def train_adapters(
    method: str, problem: ModelProblem, settings: Mapping[str, Any], objective: Objective
) -> ModelSolution:
    """Trains every adapter of a model and keeps the best seen on the validation windows.

    Args:
      settings: rank, alpha, lr, updates, batch, accumulate, weight_decay, decay, patience,
        eval_every, dtype; see `compensation.rilq`.
      objective: what is lowered, a function of the whole student.
    Raises:
      InputError: a rank that a weight does not allow, or that differs from the adapters there.
    Cost: a forward and a backward pass an update; weights stay packed.
    """
    init_key, order_key = jax.random.split(problem.key)

    def start(leaf: CompressedLinear, number: int) -> CompressedLinear:
        return add_adapter(method, leaf, settings["rank"], jax.random.fold_in(init_key, number))

    fitted = fit(
        problem.fns,
        map_linears(problem.fns, problem.params, start),
        objective,
        make_optimizer(settings, width=problem.teacher.shape[-1]),
        make_schedule(problem, settings),
        order_key,
        mesh=problem.mesh,
        session=problem.session,
    )
    dtype = jnp.dtype(settings["dtype"])

    def keep(leaf: CompressedLinear, number: int) -> CompressedLinear:
        # Given adapters that no update improved stay as they are, to the bit.
        return leaf if find_adapters(leaf) else store_adapters(start(leaf, number), dtype)

    def store(leaf: CompressedLinear, _) -> CompressedLinear:
        return store_adapters(leaf, dtype)

    if fitted.best_update == 0:
        params = map_linears(problem.fns, problem.params, keep)
    else:
        params = map_linears(problem.fns, fitted.params, store)
    return ModelSolution(params, fitted.history, fitted.best_update, fitted.notes)


def preview_adapters(method: str, settings: Mapping[str, Any]) -> Callable:
    """Returns what a training makes of one weight, for `Step.preview`."""

    def preview(leaf: CompressedLinear) -> CompressedLinear:
        leaf = add_adapter(method, leaf, settings["rank"], jax.random.key(0))
        return store_adapters(leaf, jnp.dtype(settings["dtype"]))

    return preview


def window_batches(problem: ModelProblem) -> Callable[[np.ndarray], dict]:
    """Returns window numbers -> {'tokens' [b, t], 'teacher' [b, t, d], pre-norm}."""
    windows = np.concatenate([problem.train, problem.val])

    def batch(numbers: np.ndarray) -> dict:
        return {"tokens": windows[numbers], "teacher": np.asarray(problem.teacher[numbers])}

    return batch


def make_schedule(problem: ModelProblem, settings: Mapping[str, Any]) -> Schedule:
    """Returns the loop's schedule; `accumulate` of None is chosen for the machine."""
    accumulate = settings["accumulate"]
    if accumulate is None:
        sharers = problem.mesh.shape[DATA] if problem.mesh else 1
        accumulate = count_parts(settings["batch"], problem.train.shape[1], sharers)
    return Schedule(
        updates=settings["updates"],
        batch=settings["batch"],
        accumulate=accumulate,
        eval_every=settings["eval_every"],
        patience=settings["patience"] or None,
    )


def make_optimizer(settings: Mapping[str, Any], width: int) -> optax.GradientTransformation:
    """Returns Adam on (A, B), said in terms of a = A and b = (alpha/rank) B.

    The published form is y += (alpha/rank) (x A) B. The gradient of B is alpha/rank times that of
    b, and b moves alpha/rank times as far as B. Decoupled weight decay shrinks both alike and needs
    no factor. A learning rate of None is `LR_TIMES_WIDTH` / width / (alpha/rank), by which b moves
    as far at every rank.
    """
    alpha, lr = settings["alpha"], settings["lr"]
    into_b = _scale(lambda leaf: _with_factors(leaf, leaf.a, leaf.b * (alpha / leaf.rank)))
    moved = into_b
    if lr is None:  # b moves by the same at every rank, a by more where B counts for less
        lr = LR_TIMES_WIDTH / width
        moved = _scale(lambda leaf: _with_factors(leaf, leaf.a * (leaf.rank / alpha), leaf.b))
    if settings["decay"] == "cosine":
        lr = optax.cosine_decay_schedule(lr, settings["updates"])
    return optax.chain(
        into_b,
        optax.scale_by_adam(),
        moved,
        optax.add_decayed_weights(settings["weight_decay"]),
        optax.scale_by_learning_rate(lr),
    )


def _scale(change: Callable[[LowRank], LowRank]) -> optax.GradientTransformation:
    """Applies `change` to every trained adapter's gradient or update."""

    def rescale(updates: Params, _) -> Params:
        is_trained = lambda node: isinstance(node, LowRank) and node.a is not None  # noqa: E731
        return jax.tree.map(
            lambda node: change(node) if is_trained(node) else node, updates, is_leaf=is_trained
        )

    return optax.stateless(rescale)


def map_linears(fns: ModelFns, params: Params, change: Callable) -> Params:
    """Returns the model with `change(leaf, number)` in place of each stacked compressed weight."""
    segments, number = [], 0
    for segment in params["blocks"]:
        for path in fns.linears:
            leaf = get_at(segment, f"{path}/kernel")
            if is_compressed(leaf):
                segment = set_at(segment, f"{path}/kernel", change(leaf, number))
            number += 1
        segments.append(segment)
    return {**params, "blocks": tuple(segments)}


def add_adapter(
    method: str, leaf: CompressedLinear, rank: int | float | None, key: jax.Array
) -> CompressedLinear:
    """Adds a ~ N(0, 1/rank²), b = 0 [.., d_in, r], [.., r, d_out], unless an adapter is there.

    Raises:
      InputError: `rank` is not that of the adapters there, or larger than the weight allows.
    """
    if present := find_adapters(leaf):
        ranks = [c.rank for c in present]
        if rank is not None and [resolve_rank(method, rank, leaf.d_in, leaf.d_out)] != ranks:
            raise InputError(
                f"{method}: rank={rank} was asked for, but there are adapters of rank "
                f"{', '.join(map(str, ranks))}; leave rank out to train those"
            )
        return leaf
    r = resolve_rank(method, DEFAULT_RANK if rank is None else rank, leaf.d_in, leaf.d_out)
    a = jax.random.normal(key, (*leaf.stack_shape, leaf.d_in, r)) / r
    adapter = LowRank(a, jnp.zeros((*leaf.stack_shape, r, leaf.d_out)))
    return dataclasses.replace(leaf, corrections=(*leaf.corrections, adapter))


def find_adapters(leaf: CompressedLinear) -> list[LowRank]:
    """Returns a weight's low-rank corrections."""
    return [c for c in leaf.corrections if isinstance(c, LowRank)]


def store_adapters(leaf: CompressedLinear, dtype: Any) -> CompressedLinear:
    """Returns a weight with its adapters balanced and in the dtype they are stored in."""

    def store(correction: Any) -> Any:
        if not isinstance(correction, LowRank):
            return correction
        a, b = balance(correction.a.astype(jnp.float32), correction.b.astype(jnp.float32))
        return _with_factors(correction, a.astype(dtype), b.astype(dtype))

    return dataclasses.replace(leaf, corrections=tuple(store(c) for c in leaf.corrections))


def _with_factors(adapter: LowRank, a: jax.Array, b: jax.Array) -> LowRank:
    return dataclasses.replace(adapter, a=a, b=b)
