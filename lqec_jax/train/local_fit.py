"""Adapters of one block, trained on what the block answers or on what each of its linears does.

    block    E (F(h) - F̂(ĥ))² / E (F(h) - h)²                    as `block_fit` has it, without aug
    linear   Σ_m E ||x_m (w_m - ŵ_m - a_m b_m)||² / E ||x_m w_m||²   x_m what linear m reads in F(ĥ)

The narrower scopes of the discrepancy that RILQ (arXiv:2412.01129) compares its own with. With x_m
the same for both weights, the linear one has `qera`'s closed form as its lowest point.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core.linear import linear
from lqec_jax.core.tree import get_at, is_compressed, set_at
from lqec_jax.core.types import BlockProblem, BlockSolution, ModelFns, Params
from lqec_jax.train.adapters import (
    add_adapter,
    find_adapters,
    make_optimizer,
    make_schedule,
    store_adapters,
)
from lqec_jax.train.block_fit import make_objective, run_fit
from lqec_jax.train.fit import Objective


def train_block_adapters(
    method: str, problem: BlockProblem, settings: Mapping[str, Any], scope: str
) -> BlockSolution:
    """Trains the adapters of one block's linears and keeps the best seen on validation windows.

    Args:
      settings: as for `adapters.train_adapters`.
      scope: 'block' or 'linear'.
    Raises:
      InputError: as `adapters.add_adapter`; there are no windows to train on or to look at.
    Cost: an update is a forward and a backward pass through one block; the base stays packed.
    """
    init_key, _ = jax.random.split(problem.key)
    block, dtype = problem.block, jnp.dtype(settings["dtype"])
    for number, name in enumerate(_names(problem.fns)):
        if is_compressed(leaf := get_at(block, name)):
            key = jax.random.fold_in(init_key, number)
            added = add_adapter(method, leaf, settings["rank"], key, pool=settings["pool"])
            block = set_at(block, name, added)
    params = {"train": block, "frozen": {}}
    if scope == "block":
        objective = make_objective(problem, _take_block, aug=False)
        objective = replace(objective, select="adapters")
    else:
        params["frozen"] = {"dense": problem.dense}
        objective = _linear_objective(problem)
    fitted = run_fit(
        problem, params, objective,
        _keep_optimizer(tuple(sorted(settings.items())), problem.student.shape[-1]),
        make_schedule(settings, problem.student.shape[1]),
    )  # fmt: skip
    trained = fitted.params["train"] if fitted.best_update else block
    for name in _names(problem.fns):
        leaf = get_at(trained, name)
        given = get_at(problem.block, name)
        if is_compressed(leaf):
            # Given adapters that no update improved stay as they are, to the bit.
            unchanged = fitted.best_update == 0 and find_adapters(given)
            trained = set_at(trained, name, given if unchanged else store_adapters(leaf, dtype))
    return BlockSolution(trained, fitted.history, fitted.best_update, fitted.notes)


def _names(fns: ModelFns) -> list[str]:
    return [f"{path}/kernel" for path in fns.linears]


def _take_block(params: Params) -> Params:
    return params["train"]


def _linear_objective(problem: BlockProblem) -> Objective:
    def batch(numbers: np.ndarray) -> dict:
        return {"h": np.asarray(problem.student[numbers])}

    val = len(problem.student) - problem.train
    return Objective(_linear_loss(problem.fns), batch, problem.train, val)


@lru_cache(maxsize=16)
def _linear_loss(fns: ModelFns) -> Callable:
    """Returns the sum of every linear's relative error; one function for all blocks."""

    def loss(params: Params, batch: dict) -> tuple[jax.Array, dict]:
        dense = params["frozen"]["dense"]
        inputs = fns.block(dense, batch["h"])[1]
        total = jnp.zeros((), jnp.float32)
        for path in fns.linears:
            leaf = get_at(params["train"], f"{path}/kernel")
            if not is_compressed(leaf):
                continue
            x = inputs[path]
            wanted = linear(x, get_at(dense, f"{path}/kernel")).astype(jnp.float32)
            error = jnp.mean(jnp.square(linear(x, leaf).astype(jnp.float32) - wanted))
            tiny = jnp.finfo(jnp.float32).tiny
            total += error / jnp.maximum(jnp.mean(jnp.square(wanted)), tiny)
        return total, {}

    return loss


@lru_cache(maxsize=16)
def _keep_optimizer(settings: tuple, width: int) -> optax.GradientTransformation:
    """Returns one optimizer object for all blocks: programs are kept by it."""
    return make_optimizer(dict(settings), width)
