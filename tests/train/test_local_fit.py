"""Adapters trained on one block's answer, or on each of its linears'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lqec_jax.train.local_fit import train_block_adapters

from lqec_jax.core.closed_form import reduce_rank
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.tree import get_at
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.trainings.rilq import rilq
from lqec_kernels.formats import CompressedLinear, LowRank
from tests.train.tiny import make_block_problem

RANK = 4
TRAINING = {"rank": RANK, "updates": 300, "batch": 4, "lr": 0.02, "eval_every": 50, "patience": 0,
            "dtype": "float32"}  # fmt: skip


def pose(scope="", corrections=()):
    problem = make_block_problem(windows=8)
    leaf = CompressedLinear(quantize(problem.dense["mix"]["kernel"], GroupGrid(2, 16)), corrections)
    return dataclasses.replace(problem, block={"mix": {"kernel": leaf}})


@pytest.fixture(scope="module")
def problem():
    return pose()


@pytest.fixture(scope="module", params=["linear", "block"])
def scope(request):
    return request.param


@pytest.fixture(scope="module")
def trained(problem, scope):
    return rilq(scope=scope, **TRAINING).run(problem)


def answers(problem, solution, scope):
    """Returns the relative error of what is compared, over the training windows."""
    block = jax.jit(problem.fns.block)
    w, leaf = (get_at(b, "mix/kernel") for b in (problem.dense, solution))
    student, teacher = (x[: problem.train] for x in (problem.student, problem.teacher))
    if scope == "linear":
        error = student @ np.asarray(w - leaf.dense())
        return np.mean(error**2) / np.mean((student @ np.asarray(w)) ** 2)
    wanted, came = block(problem.dense, teacher)[0], block(solution, student)[0]
    return np.mean((wanted - came) ** 2) / np.mean((wanted - teacher) ** 2)


def test_training_begins_at_the_bare_block_and_lowers_its_own_error(problem, trained, scope):
    before, after = (answers(problem, b, scope) for b in (problem.block, trained.block))
    assert after < 0.7 * before
    assert trained.best_update > 0
    assert trained.history[0].val_loss > trained.history[-1].val_loss
    base = trained.block["mix"]["kernel"].base
    np.testing.assert_array_equal(base.codes, problem.block["mix"]["kernel"].base.codes)


def test_the_linear_scope_comes_to_its_closed_form_and_not_below(problem):
    solution = rilq(scope="linear", **TRAINING).run(problem)
    x = problem.student[: problem.train].reshape(-1, problem.student.shape[-1])
    leaf = problem.block["mix"]["kernel"]
    error = problem.dense["mix"]["kernel"] - leaf.dense()
    a, b = reduce_rank(error, jnp.asarray(x.T @ x), RANK)
    least = np.sum((x @ np.asarray(error - a @ b)) ** 2)
    came = np.sum(
        (x @ np.asarray(error - solution.block["mix"]["kernel"].corrections[0].dense())) ** 2
    )
    assert least * (1 - 1e-4) <= came <= 1.1 * least


def test_adapters_that_no_update_improves_stay_to_the_bit(scope):
    w = np.random.default_rng(0).standard_normal((32, RANK)).astype(np.float32)
    given = LowRank(jnp.asarray(w, jnp.float16), jnp.zeros((RANK, 32), jnp.float16))
    problem = pose(corrections=(given,))
    settings = TRAINING | {"rank": None, "lr": 1e4, "updates": 4, "eval_every": 2}
    solution = rilq(scope=scope, **settings).run(problem)
    assert solution.best_update == 0 and "no update lowered" in solution.notes[0]
    kept = solution.block["mix"]["kernel"].corrections[0]
    np.testing.assert_array_equal(kept.a, given.a)
    assert kept.a.dtype == jnp.float16


def test_same_key_same_bytes(problem, trained, scope):
    again = rilq(scope=scope, **TRAINING).run(problem)
    np.testing.assert_array_equal(
        again.block["mix"]["kernel"].corrections[0].a,
        trained.block["mix"]["kernel"].corrections[0].a,
    )


def test_a_rank_too_large_is_refused(problem):
    settings = rilq(scope="linear", **TRAINING).arguments | {"rank": 64}
    with pytest.raises(InputError, match="rilq: rank=64 is larger than min"):
        train_block_adapters("rilq", problem, settings, "linear")
