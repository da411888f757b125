"""What trainings of a block lower: two distances as one, and what is asked of the windows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.closed_form import reduce_rank
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import Schedule, Work
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.train.answers import Answer, LinearAnswer
from lqec_jax.train.fit import NoSession
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training
from lqec_jax.trainings.rilq import rilq
from lqec_kernels.formats import CompressedLinear, LowRank
from tests.train.tiny import Shrink, make_block_problem

KEY = jax.random.key(0)
ADAM = Rates(0.02, decay="constant")


def train(problem, *, aug=True, part=None, **schedule):
    """Trains the weight times a number."""
    schedule = Schedule(**({"epochs": 2, "batch": 2, "accumulate": None, "patience": 0} | schedule))
    part = part or Shrink(rates=ADAM)
    step = make_training("shrink", [part], Answer(aug), scope="block", schedule=schedule)
    return step.run(problem)


@pytest.mark.parametrize("aug", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_loss_is_both_distances_over_what_the_block_adds(tmp_path, aug, on_disk):
    scratch = tmp_path / "scratch.bin" if on_disk else None
    problem = make_block_problem(work=Work(KEY, scratch=scratch))
    solution = train(problem, aug=aug)
    block = jax.jit(problem.fns.block)
    own, other = (np.asarray(block(problem.dense, h)[0])
                  for h in (problem.teacher, problem.student))  # fmt: skip
    half = {"mix": {"kernel": 0.5 * problem.dense["mix"]["kernel"]}}
    came = np.asarray(block(half, problem.student)[0])
    val = slice(problem.train, None)
    error = np.mean((own - came)[val] ** 2) + aug * np.mean((other - came)[val] ** 2)
    added = np.mean((own - problem.teacher)[: problem.train] ** 2)
    assert solution.history[0].val_loss == pytest.approx(error / added, rel=1e-4)
    assert [point.update for point in solution.history] == [0, 2, 4]
    assert solution.history[-1].val_loss < solution.history[0].val_loss
    assert (scratch is None) or scratch.stat().st_size == problem.student.nbytes


def test_both_terms_are_equal_where_the_streams_are():
    """Then the auxiliary loss doubles the first."""
    problem = make_block_problem()
    problem = dataclasses.replace(problem, student=problem.teacher)
    one, two = (train(problem, aug=aug).history[0].val_loss for aug in (False, True))
    assert two == pytest.approx(2 * one, rel=1e-5)


def test_a_teacher_that_is_met_costs_nothing():
    problem = make_block_problem()
    problem = dataclasses.replace(problem, student=problem.teacher)
    solution = train(problem, part=Shrink(first=1.0, rates=ADAM), epochs=1)
    assert solution.history[0].val_loss < 1e-10
    assert solution.best_update == 0


class Told(NoSession):
    """Keeps what it is told."""

    def __init__(self):
        self.progress_made = []

    def progress(self, done: int, total: int, message: str) -> None:
        self.progress_made.append((done, total))


def test_progress_is_told_and_a_large_batch_is_all_windows():
    told = Told()
    problem = make_block_problem(work=Work(KEY, session=told))
    solution = train(problem, epochs=3, batch=100)
    assert told.progress_made == [(1, 3), (2, 3), (3, 3)]
    assert [point.update for point in solution.history] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 6])
def test_windows_of_both_kinds_are_wanted(count):
    problem = make_block_problem(train=count)
    with pytest.raises(InputError, match=f"{count} of 6 windows are for training"):
        train(problem)


def test_bases_keep_what_lies_around_them():
    """A base whose every number is trained: nothing is lost on the way in or out."""
    problem = make_block_problem(windows=34)
    part = Shrink(each=True, rates=ADAM)
    assert part.count(problem.block["mix"]["kernel"]) == 32 * 32
    solution = train(problem, part=part, epochs=10, batch=4, aug=False)
    assert solution.history[-1].val_loss < 0.3 * solution.history[0].val_loss
    best = solution.params["mix"]["kernel"].dense()
    came = np.asarray(jax.jit(problem.fns.block)({"mix": {"kernel": best}}, problem.student)[0])
    own = np.asarray(jax.jit(problem.fns.block)(problem.dense, problem.teacher)[0])
    error = np.mean((own - came)[problem.train :] ** 2)
    added = np.mean((own - problem.teacher)[: problem.train] ** 2)
    assert min(p.val_loss for p in solution.history) == pytest.approx(error / added, rel=1e-3)


# Adapters, on one block's answer or on each of its linears'

RANK = 4
TRAINING = {"rank": RANK, "updates": 300, "batch": 4, "lr": 0.02, "eval_every": 50, "patience": 0,
            "dtype": "float32"}  # fmt: skip


def pose(corrections=()):
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


def answers(problem, block, scope, windows):
    """Returns the relative error of what is compared, over some windows."""
    run = jax.jit(problem.fns.block)
    w, leaf = (b["mix"]["kernel"] for b in (problem.dense, block))
    student, teacher = problem.student[windows], problem.teacher[windows]
    if scope == "linear":
        error = student @ np.asarray(w - leaf.dense())
        return np.mean(error**2) / np.mean((student @ np.asarray(w)) ** 2)
    wanted, came = run(problem.dense, teacher)[0], run(block, student)[0]
    of_training = problem.teacher[: problem.train]
    added = np.mean((run(problem.dense, of_training)[0] - of_training) ** 2)
    return np.mean((wanted - came) ** 2) / added


def test_training_begins_at_the_bare_block_and_lowers_its_own_error(problem, trained, scope):
    windows = slice(problem.train)
    before, after = (answers(problem, b, scope, windows) for b in (problem.block, trained.params))
    assert after < 0.7 * before
    assert trained.best_update > 0
    assert trained.history[0].val_loss > trained.history[-1].val_loss
    base = trained.params["mix"]["kernel"].base
    np.testing.assert_array_equal(base.codes, problem.block["mix"]["kernel"].base.codes)


def test_the_loss_is_its_formula(problem, trained, scope):
    first = float(answers(problem, problem.block, scope, slice(problem.train, None)))
    assert trained.history[0].val_loss == pytest.approx(first, rel=1e-4)


def test_the_linear_scope_comes_to_its_closed_form_and_not_below(problem):
    solution = rilq(scope="linear", **TRAINING).run(problem)
    x = problem.student[: problem.train].reshape(-1, problem.student.shape[-1])
    leaf = problem.block["mix"]["kernel"]
    error = problem.dense["mix"]["kernel"] - leaf.dense()
    a, b = reduce_rank(error, jnp.asarray(x.T @ x), RANK)
    least = np.sum((x @ np.asarray(error - a @ b)) ** 2)
    came = np.sum(
        (x @ np.asarray(error - solution.params["mix"]["kernel"].corrections[0].dense())) ** 2
    )
    assert least * (1 - 1e-4) <= came <= 1.1 * least


def test_adapters_that_no_update_improves_stay_to_the_bit(scope):
    w = np.random.default_rng(0).standard_normal((32, RANK)).astype(np.float32)
    given = LowRank(jnp.asarray(w, jnp.float16), jnp.zeros((RANK, 32), jnp.float16))
    problem = pose(corrections=(given,))
    settings = TRAINING | {"rank": None, "lr": 1e4, "updates": 4, "eval_every": 2}
    solution = rilq(scope=scope, **settings).run(problem)
    assert solution.best_update == 0 and "no update lowered" in solution.notes[0]
    kept = solution.params["mix"]["kernel"].corrections[0]
    np.testing.assert_array_equal(kept.a, given.a)
    assert kept.a.dtype == jnp.float16


def test_same_key_same_bytes(problem, trained, scope):
    again = rilq(scope=scope, **TRAINING).run(problem)
    np.testing.assert_array_equal(
        again.params["mix"]["kernel"].corrections[0].a,
        trained.params["mix"]["kernel"].corrections[0].a,
    )


def test_a_rank_too_large_is_refused(problem):
    with pytest.raises(InputError, match="rilq: rank=64 is larger than min"):
        rilq(scope="linear", **TRAINING | {"rank": 64}).run(problem)


def test_a_linear_that_is_not_compressed_has_no_part_in_the_loss(problem):
    dense = {"mix": {"kernel": problem.dense["mix"]["kernel"]}}
    loss, _ = LinearAnswer()(problem.fns, {"blocks": (dense,), "dense": dense},
                             {"h": problem.student})  # fmt: skip
    assert float(loss) == 0.0
