"""Low-rank adapters as what is trained: how they begin, how they move, how they are kept.

Every method that trains the adapters of a whole model is a loss and settings; the rest is here.
Adapters and moments are float32 whatever the compute dtype; the base stays packed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core.arguments import check_choice, check_int, check_number, check_rank, resolve_rank
from lqec_jax.core.bases import find_grid
from lqec_jax.core.closed_form import balance
from lqec_jax.core.tree import SELECTIONS, get_at, is_compressed, set_at
from lqec_jax.core.types import ModelFns, ModelProblem, ModelSolution, Params
from lqec_jax.errors import InputError
from lqec_jax.train.fit import Objective, Schedule, fit
from lqec_jax.train.sharding import DATA
from lqec_jax.train.update import count_parts
from lqec_kernels.adapters import QuantizedLowRank
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
    check_choice(method, "pool", _pools(settings), (True, False))
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
        eval_every, dtype, and where the method has them, pool, leave_out (paths of linears that
        stay as they are), coupled (see `make_optimizer`) and new_rank (of new adapters where rank
        is None); see `trainings.rilq`.
      objective: what is lowered, a function of the whole student.
    Raises:
      InputError: a rank that a weight does not allow, or that differs from the adapters there.
    Cost: a forward and a backward pass an update; weights stay packed.
    """
    init_key, order_key = jax.random.split(problem.key)
    linears, leave_out = problem.fns.linears, settings.get("leave_out", ())

    def change(params: Params, each: Callable) -> Params:
        def unless_left_out(leaf: CompressedLinear, number: int) -> CompressedLinear:
            left_out = linears[number % len(linears)] in leave_out
            return leaf if left_out else each(leaf, number)

        return map_linears(problem.fns, params, unless_left_out)

    def start(leaf: CompressedLinear, number: int) -> CompressedLinear:
        return _begin(method, leaf, settings, jax.random.fold_in(init_key, number))

    fitted = fit(
        problem.fns,
        change(problem.params, start),
        objective,
        make_optimizer(settings, width=problem.teacher.shape[-1]),
        make_schedule(settings, problem.train.shape[1], problem.mesh),
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
        params = change(problem.params, keep)
    else:
        params = change(fitted.params, store)
    return ModelSolution(params, fitted.history, fitted.best_update, fitted.notes)


def preview_adapters(method: str, settings: Mapping[str, Any]) -> Callable:
    """Returns what a training makes of one weight, for `Step.preview`."""

    def preview(leaf: CompressedLinear) -> CompressedLinear:
        leaf = _begin(method, leaf, settings, jax.random.key(0))
        return store_adapters(leaf, jnp.dtype(settings["dtype"]))

    return preview


def count_trained(preview: Callable) -> Callable:
    """Returns how many numbers a training has to move in one weight, for `Step.trained`.

    Later steps may have done away with the adapters; then those that `preview` adds count.
    """

    def count(leaf: CompressedLinear) -> int:
        adapters = find_adapters(leaf) or find_adapters(jax.eval_shape(preview, leaf))
        return sum(array.size for array in jax.tree.leaves(adapters))

    return count


def window_batches(problem: ModelProblem) -> Callable[[np.ndarray], dict]:
    """Returns window numbers -> {'tokens' [b, t], 'teacher' [b, t, d], pre-norm}."""
    windows = np.concatenate([problem.train, problem.val])

    def batch(numbers: np.ndarray) -> dict:
        return {"tokens": windows[numbers], "teacher": np.asarray(problem.teacher[numbers])}

    return batch


def make_schedule(settings: Mapping[str, Any], length: int, mesh: Any = None) -> Schedule:
    """Returns the loop's schedule; `accumulate` of None is chosen for windows of that length."""
    accumulate = settings["accumulate"]
    if accumulate is None:
        sharers = mesh.shape[DATA] if mesh else 1
        accumulate = count_parts(settings["batch"], length, sharers)
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
    no factor; a coupled one, `coupled` in the settings, adds weight_decay · (A, B) to the gradients
    of A and B instead. A learning rate of None is `LR_TIMES_WIDTH` / width / (alpha/rank), by which
    b moves as far at every rank; `lr_times_width` in the settings stands for the constant.

    A pooled adapter is trained as y += (alpha/rank) (Σ x A) B, with sums where it takes means: its
    a is `pool` A, so that its matrix moves as far at every weight as one that is not pooled.
    """
    alpha, lr = settings["alpha"], settings["lr"]
    into_b = _scale(
        lambda leaf: _with_factors(leaf, leaf.a * leaf.pool, leaf.b * (alpha / leaf.rank))
    )
    moved = into_b
    if lr is None:  # b moves by the same at every rank, a by more where B counts for less
        lr = settings.get("lr_times_width", LR_TIMES_WIDTH) / width
        moved = _scale(
            lambda leaf: _with_factors(leaf, leaf.a * (leaf.pool * leaf.rank / alpha), leaf.b)
        )
    if settings["decay"] == "cosine":
        lr = optax.cosine_decay_schedule(lr, settings["updates"])
    decay, coupled = settings["weight_decay"], settings.get("coupled", False)
    return optax.chain(
        into_b,
        _add_published(decay if coupled else 0.0, alpha),
        optax.scale_by_adam(),
        moved,
        optax.add_decayed_weights(0.0 if coupled else decay),
        optax.scale_by_learning_rate(lr),
    )


def _add_published(rate: float, alpha: float) -> optax.GradientTransformation:
    """Adds rate · (A, B) to gradients, the published factors of every trained adapter."""
    if not rate:
        return optax.identity()

    def add(updates: Params, params: Params) -> Params:
        def add_one(update: Any, value: Any) -> Any:
            if not _is_trained(update):
                return update
            a, b = value.a / value.pool, value.b * (value.rank / alpha)
            return _with_factors(update, update.a + rate * a, update.b + rate * b)

        return jax.tree.map(add_one, updates, params, is_leaf=_is_trained)

    return optax.stateless(add)


def _scale(change: Callable[[LowRank], LowRank]) -> optax.GradientTransformation:
    """Applies `change` to every trained adapter's gradient or update."""

    def rescale(updates: Params, _) -> Params:
        return jax.tree.map(
            lambda node: change(node) if _is_trained(node) else node, updates, is_leaf=_is_trained
        )

    return optax.stateless(rescale)


def _is_trained(node: Any) -> bool:
    return isinstance(node, LowRank) and node.a is not None


def select_adapters(leave_out: Iterable[str] = ()) -> Callable:
    """Returns what `core.tree.partition` takes: all adapters but those at some linears' paths."""
    ends = tuple(f"/{path}/kernel" for path in leave_out)

    def select(path: tuple, leaf: jax.Array) -> bool:
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return SELECTIONS["adapters"](path, leaf) and not f"/{'/'.join(keys)}".endswith(ends)

    return select


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
    method: str,
    leaf: CompressedLinear,
    rank: int | float | None,
    key: jax.Array,
    *,
    pool: bool = False,
    new_rank: int = DEFAULT_RANK,
) -> CompressedLinear:
    """Adds a ~ N(0, 1/rank²), b = 0 [.., d_in, r], [.., r, d_out], unless an adapter is there.

    Args:
      pool: the adapter reads means over the groups of the base's grid. Its rank is at most their
        number, more would add nothing. a is `group_size` times that of one that reads sums: normal,
        or with a rank for every group 1/√rank times the identity, which is as large and no worse in
        any direction (a small Llama after 150 updates: perplexity 3.33; with a normal one 3.45).
      new_rank: for a rank of None.
    Raises:
      InputError: `rank` or `pool` is not that of the adapters there, those there are rounded and
        no rank is given for new ones, `rank` is larger than the weight allows, or the base has no
        grid to pool over.
    """
    size = find_grid(method, leaf).group_size if pool else 1
    if present := find_adapters(leaf):
        _check_present(method, leaf, present, rank, size)
        return leaf
    if rank is None and any(isinstance(c, QuantizedLowRank) for c in leaf.corrections):
        raise InputError(
            f"{method}: the adapters here are rounded, which only finetune trains; put "
            f"quantize_adapter after {method}, or give rank={new_rank} for new ones beside them"
        )
    r = _find_rank(method, leaf, new_rank if rank is None else rank, size)
    shape = (*leaf.stack_shape, leaf.d_in // size, r)
    if size > 1 and r == leaf.d_in // size:
        a = jnp.broadcast_to(jnp.eye(r) * (size / r**0.5), shape)
    else:
        a = jax.random.normal(key, shape) * (size / r)
    adapter = LowRank(a, jnp.zeros((*leaf.stack_shape, r, leaf.d_out)), size)
    return dataclasses.replace(leaf, corrections=(*leaf.corrections, adapter))


def _begin(
    method: str, leaf: CompressedLinear, settings: Mapping[str, Any], key: jax.Array
) -> CompressedLinear:
    """Returns a weight as its training begins."""
    new_rank = settings.get("new_rank", DEFAULT_RANK)
    pool = _pools(settings)
    return add_adapter(method, leaf, settings["rank"], key, pool=pool, new_rank=new_rank)


def _pools(settings: Mapping[str, Any]) -> bool:
    """Says whether new adapters are pooled; not every method has the choice."""
    return settings.get("pool", False)


def _find_rank(method: str, leaf: CompressedLinear, rank: int | float, pool: int) -> int:
    return min(resolve_rank(method, rank, leaf.d_in, leaf.d_out), leaf.d_in // pool)


def _check_present(
    method: str, leaf: CompressedLinear, present: list[LowRank], rank: int | float | None, pool: int
) -> None:
    """Refuses to be told of adapters that are there what they are not."""
    pools, ranks = [c.pool for c in present], [c.rank for c in present]
    if pool > 1 and set(pools) != {pool}:
        raise InputError(
            f"{method}: pool=True was asked for, but there are adapters that pool "
            f"{', '.join(map(str, pools))} inputs, not the groups of {pool}; leave pool out to "
            "train those"
        )
    if rank is not None and [_find_rank(method, leaf, rank, pools[0])] != ranks:
        raise InputError(
            f"{method}: rank={rank} was asked for, but there are adapters of rank "
            f"{', '.join(map(str, ranks))}; leave rank out to train those"
        )


def count_adapter(leaf: CompressedLinear, rank: int | float | None) -> int:
    """Returns how many numbers a new adapter has that is not pooled; reads shapes only."""
    largest = min(leaf.d_in, leaf.d_out)
    rank = DEFAULT_RANK if rank is None else rank
    if not isinstance(rank, float):
        rank = min(rank, largest)
    return resolve_rank("", rank, leaf.d_in, leaf.d_out) * (leaf.d_in + leaf.d_out)


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
