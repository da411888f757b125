"""What trainings of a block lower: the distance of what it, or each of its linears, answers.

    block    L = [ E (F(h) - F̂(ĥ))² + aug · E (F(ĥ) - F̂(ĥ))² ] / E (F(h) - h)²
    linear   L = Σ_m E ||x_m (w_m - ŵ_m)||² / E ||x_m w_m||²

F is the teacher's block, F̂ the student's, h and ĥ what enters them in the two streams, x_m what
linear m reads in F(ĥ). The first term asks the block to make good what blocks before it lost, the
second asks it to do as the teacher's would from where it stands (OmniQuant's auxiliary loss,
arXiv:2308.13137). The divisor, what the teacher's block adds, makes losses of different blocks
comparable. Both terms together are one distance and a constant, because

    (a - y)² + (b - y)² = 2 ((a + b)/2 - y)² + (a - b)²/2,

so the teacher's block runs once over the windows and never while training. The linear one is what
RILQ (arXiv:2412.01129) compares its own with; x_m being the same for both weights, `qera`'s closed
form is its lowest point.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core import sites
from lqec_jax.core.disk import make_array
from lqec_jax.core.linear import linear
from lqec_jax.core.tree import is_compressed
from lqec_jax.core.types import BlockProblem, ModelFns, Params
from lqec_jax.core.walking import cut_rows


@dataclass(frozen=True)
class Answer:
    """The distance of what the block answers.

    Attributes:
      aug: whether the second term counts.
    """

    aug: bool = False

    def __call__(self, fns: ModelFns, params: Params, batch: dict) -> tuple[jax.Array, dict]:
        (block,) = params["blocks"]
        y = fns.block(block, batch["h"])[0]
        wide = jnp.promote_types(y.dtype, jnp.float32)
        missing = y.astype(wide) - batch["answer"].astype(wide)
        error = jnp.mean(jnp.square(missing), axis=(1, 2))
        terms = 2 if self.aug else 1
        return jnp.mean((terms * error + batch["spread"]) * batch["scale"]), {}

    def prepare(self, method: str, problem: BlockProblem) -> Callable[[np.ndarray], dict]:
        """Runs the teacher's block; returns window numbers -> a batch."""
        answers, spread, scale = _find_answers(problem, aug=self.aug)

        def batch(numbers: np.ndarray) -> dict:
            scales = np.full(len(numbers), scale, np.float32)
            return {"h": np.asarray(problem.student[numbers]),
                    "answer": np.asarray(answers[numbers]), "spread": spread[numbers],
                    "scale": scales}  # fmt: skip

        return batch

    def beside(self, problem: BlockProblem) -> Params:
        """Returns what the loss reads beside the student's block."""
        return {}


@dataclass(frozen=True)
class LinearAnswer:
    """The sum of every linear's relative error on what the teacher's block reads."""

    def __call__(self, fns: ModelFns, params: Params, batch: dict) -> tuple[jax.Array, dict]:
        (block,), dense = params["blocks"], params["dense"]
        inputs = fns.block(dense, batch["h"])[1]
        total = jnp.zeros((), jnp.float32)
        for site in fns.sites:
            leaf, x = sites.get(block, site), inputs[site.path]
            if not is_compressed(leaf):
                continue
            wanted = linear(x, sites.get(dense, site)).astype(jnp.float32)
            error = jnp.mean(jnp.square(linear(x, leaf).astype(jnp.float32) - wanted))
            tiny = jnp.finfo(jnp.float32).tiny
            total += error / jnp.maximum(jnp.mean(jnp.square(wanted)), tiny)
        return total, {}

    def prepare(self, method: str, problem: BlockProblem) -> Callable[[np.ndarray], dict]:
        """Returns window numbers -> a batch."""
        return lambda numbers: {"h": np.asarray(problem.student[numbers])}

    def beside(self, problem: BlockProblem) -> Params:
        """Returns what the loss reads beside the student's block."""
        return {"dense": problem.dense}


def _find_answers(problem: BlockProblem, *, aug: bool) -> tuple[Any, np.ndarray, float]:
    """Returns what the student should answer [n, t, d], what it cannot reach [n], and the scale."""
    shape, dtype = problem.student.shape, np.dtype(problem.student.dtype)
    if problem.work.scratch is None:
        answers = np.empty(shape, dtype)
    else:
        answers = make_array(problem.work.scratch, dtype, shape)
    spread, added = np.empty(shape[0], np.float32), np.empty(shape[0], np.float32)
    for rows in cut_rows(*shape[:2]):
        streams = np.asarray(problem.teacher[rows]), np.asarray(problem.student[rows])
        found = _answer(problem.fns, aug)(problem.dense, *streams)
        answers[rows], spread[rows], added[rows] = found
    scale = 1.0 / max(float(added[: problem.train].mean()), np.finfo(np.float32).tiny)
    return answers, spread, scale


@lru_cache(maxsize=16)
def _answer(fns: ModelFns, aug: bool) -> Callable:
    """Returns a compiled (dense block, h, ĥ) -> (answers [b, t, d], spread [b], F's part [b])."""

    def answer(dense: Params, teacher: jax.Array, student: jax.Array):
        answered = fns.block(dense, teacher)[0].astype(jnp.float32)
        added = jnp.mean(jnp.square(answered - teacher.astype(jnp.float32)), axis=(1, 2))
        if not aug:
            return answered.astype(teacher.dtype), jnp.zeros_like(added), added
        other = fns.block(dense, student)[0].astype(jnp.float32)
        spread = jnp.mean(jnp.square(answered - other), axis=(1, 2)) / 2
        return ((answered + other) / 2).astype(teacher.dtype), spread, added

    return jax.jit(answer)
