"""EfficientQAT's E2E-QP: the scales of a rounded model trained together on its text.

    min over s of  E -log p(x[t+1] | x[..t];  ŵ = s (u - z)),   u and z as they are

the stage that follows Block-AP (Chen et al. 2024, arXiv:2407.11062, §3.3). A scale is trained as a
fraction of its value, so that one learning rate means the same for every weight: the authors' 2e-5
at 2 bits and width 4096 is about 7e-4 of a scale. Written from the equations. Differs besides: the
base stays packed; scales are float32 while training and stored as they came; the best look at the
validation windows is kept, the start included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lqec_jax.core.arguments import check_int, check_number
from lqec_jax.core.types import ModelProblem, ModelSolution, Params, Step
from lqec_jax.errors import InputError
from lqec_jax.train.adapters import check_parts, make_schedule
from lqec_jax.train.fit import Objective, fit
from lqec_jax.train.losses import next_token_nll
from lqec_kernels.formats import CompressedLinear

REFERENCE = "our choice"


def is_scale(path: tuple, leaf: jax.Array) -> bool:
    """Selects the floating scales of bases."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return bool(names) and names[0] == "base" and "scales" in names and floating


def train_scales(problem: ModelProblem, settings: dict[str, Any]) -> ModelSolution:
    """Trains every base's scales on the next token.

    Cost: a forward and a backward pass an update; weights stay packed.
    """
    fns, windows = problem.fns, np.concatenate([problem.train, problem.val])

    def loss(params: Params, tokens: jax.Array) -> tuple[jax.Array, dict]:
        post_norm = fns.hidden(params, tokens)[1]
        return jnp.mean(next_token_nll(fns, params, post_norm, tokens)), {}

    objective = Objective(
        loss, lambda n: windows[n], len(problem.train), len(problem.val), is_scale
    )
    fitted = fit(
        fns,
        problem.params,
        objective,
        make_optimizer(settings),
        make_schedule({**settings, "patience": 0}, windows.shape[1], problem.mesh),
        problem.key,
        mesh=problem.mesh,
        session=problem.session,
    )
    params = problem.params
    if fitted.best_update:
        params = jax.tree.map(_store, problem.params, fitted.params)
    return ModelSolution(params, fitted.history, fitted.best_update, fitted.notes)


def make_optimizer(settings: dict[str, Any]) -> optax.GradientTransformation:
    """Returns Adam whose updates are fractions of what they change."""

    def times_value(updates: Params, params: Params) -> Params:
        return jax.tree.map(lambda u, p: u * jnp.abs(p), updates, params)

    lr = optax.cosine_decay_schedule(settings["lr"], settings["updates"])
    return optax.chain(
        optax.scale_by_adam(), optax.stateless(times_value), optax.scale_by_learning_rate(lr)
    )


def _store(before: jax.Array, after: jax.Array) -> jax.Array:
    if before.dtype == after.dtype:
        return after
    limits = jnp.finfo(before.dtype)
    return jnp.clip(after, limits.tiny, limits.max).astype(before.dtype)


def _count_scales(leaf: CompressedLinear) -> int:
    leaves = jax.tree_util.tree_leaves_with_path(leaf)
    return sum(array.size for path, array in leaves if is_scale(path, array))


def _check_scales(leaf: CompressedLinear) -> CompressedLinear:
    if not _count_scales(leaf):
        raise InputError(
            f"e2e_qp: a {type(leaf.base).__name__} base has no scales to train; put a quantizer "
            "that has them before it"
        )
    return leaf


def e2e_qp(
    *,
    updates: int = 128,
    batch: int = 4,
    accumulate: int | None = None,
    lr: float = 0.002,
    eval_every: int = 16,
) -> Step:
    """Makes the step that trains every base's scales on the next-token loss.

    Args:
      updates, batch: so many updates of so many windows, in `accumulate` equal parts; None chooses
        them, see `train.update.count_parts`. The authors pass once over 4096 windows, 32 an update.
      lr: of Adam, as a fraction of a scale; decays by a cosine to zero.
      eval_every: updates between two looks at the validation windows.
    """
    settings = {"updates": updates, "batch": batch, "accumulate": accumulate, "lr": lr,
                "eval_every": eval_every}  # fmt: skip
    for name in ("updates", "batch", "eval_every"):
        check_int("e2e_qp", name, settings[name], 1)
    check_number("e2e_qp", "lr", lr, 0.0)
    check_parts("e2e_qp", batch, accumulate)
    return Step(
        name="e2e_qp",
        scope="model",
        run=lambda problem: train_scales(problem, settings),
        arguments=settings,
        preview=_check_scales,
        trained=_count_scales,
        objective_name="next-token loss",
    )
