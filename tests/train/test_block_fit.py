"""The objective of block steps: two distances as one, and what is asked of the windows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lqec_jax.train.block_fit import Trainable, fit_bases, fit_block

from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_kernels.formats import CompressedLinear, Dense
from tests.train.tiny import make_block_problem


def shrink(params: Params) -> Params:
    """Builds the block with its weight times a trained number."""
    return {"mix": {"kernel": params["frozen"] * params["train"]}}


def descend(updates: int) -> optax.GradientTransformation:
    return ADAM


ADAM = optax.adam(0.02)


def train(problem, *, aug=True, **schedule):
    params = {"train": jnp.float32(0.5), "frozen": problem.dense["mix"]["kernel"]}
    schedule = {"epochs": 2, "batch": 2} | schedule
    return fit_block(problem, params, shrink, descend, aug=aug, **schedule)


@pytest.mark.parametrize("aug", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_the_loss_is_both_distances_over_what_the_block_adds(tmp_path, aug, on_disk):
    scratch = tmp_path / "scratch.bin" if on_disk else None
    problem = make_block_problem(scratch=scratch)
    fitted = train(problem, aug=aug)
    block = jax.jit(problem.fns.block)
    own, other = (np.asarray(block(problem.dense, h)[0])
                  for h in (problem.teacher, problem.student))  # fmt: skip
    half = {"mix": {"kernel": 0.5 * problem.dense["mix"]["kernel"]}}
    came = np.asarray(block(half, problem.student)[0])
    val = slice(problem.train, None)
    error = np.mean((own - came)[val] ** 2) + aug * np.mean((other - came)[val] ** 2)
    added = np.mean((own - problem.teacher)[: problem.train] ** 2)
    assert fitted.history[0].val_loss == pytest.approx(error / added, rel=1e-4)
    assert [point.update for point in fitted.history] == [0, 2, 4]
    assert fitted.history[-1].val_loss < fitted.history[0].val_loss
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
    params = {"train": jnp.float32(1.0), "frozen": problem.dense["mix"]["kernel"]}
    fitted = fit_block(problem, params, shrink, descend, epochs=1, batch=2, aug=True)
    assert fitted.history[0].val_loss < 1e-10
    assert fitted.best_update == 0


def test_progress_is_told_and_a_large_batch_is_all_windows():
    told = []
    problem = make_block_problem(progress=lambda *facts: told.append(facts))
    fitted = train(problem, epochs=3, batch=100)
    assert told == [(1, 3, "update"), (2, 3, "update"), (3, 3, "update")]
    assert [point.update for point in fitted.history] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 6])
def test_windows_of_both_kinds_are_wanted(count):
    problem = make_block_problem(train=count)
    with pytest.raises(InputError, match=f"{count} of 6 windows are for training"):
        train(problem)


def test_bases_keep_what_lies_around_them():
    """A base that is trained as it is: nothing is lost on the way in or out."""
    trainable = Trainable(
        start=lambda leaf: {"w": 0.5 * leaf.base.dense()},
        read=lambda leaf, trained: trained["w"],
        store=lambda leaf, trained: CompressedLinear(Dense(trained["w"])),
    )
    problem = make_block_problem(windows=34)
    assert trainable.count(problem.block["mix"]["kernel"]) == 32 * 32
    solution = fit_bases(problem, trainable, descend, epochs=10, batch=4, aug=False)
    assert solution.history[-1].val_loss < 0.3 * solution.history[0].val_loss
    best = solution.block["mix"]["kernel"].dense()
    came = np.asarray(jax.jit(problem.fns.block)({"mix": {"kernel": best}}, problem.student)[0])
    own = np.asarray(jax.jit(problem.fns.block)(problem.dense, problem.teacher)[0])
    error = np.mean((own - came)[problem.train :] ** 2)
    added = np.mean((own - problem.teacher)[: problem.train] ** 2)
    assert min(p.val_loss for p in solution.history) == pytest.approx(error / added, rel=1e-3)
