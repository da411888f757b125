"""What a teacher predicts, written once: in memory or on disk, whole or the likeliest alone."""

import dataclasses

import jax
import numpy as np
import pytest

from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.errors import InputError
from lqec_jax.train.predictions import bytes_of, write_log_probs, write_top
from tests.compensation.toy import FNS, LENGTH, TEACHER, TOKENS, VOCAB, numpy_log_probs

COUNT = 6
STATES = np.asarray(jax.jit(FNS.hidden)(TEACHER, TOKENS[:COUNT])[0])
WANTED = numpy_log_probs(STATES)


def pose(scratch=None) -> ModelProblem:
    """Returns a student with a head of its own beside the teacher's."""
    work = Work(jax.random.key(0), scratch=scratch)
    student = {**TEACHER, "embed": 2 * TEACHER["embed"]}
    windows = Windows(TOKENS[:COUNT], 4)
    return ModelProblem(FNS, student, windows, work, STATES, {"embed": TEACHER["embed"]})


@pytest.mark.parametrize("on_disk", [False, True])
def test_whole_predictions_are_the_teacher_s_by_its_own_head(tmp_path, on_disk):
    scratch = tmp_path / "scratch.bin" if on_disk else None
    rows = np.array([5, 0, 2])
    found = write_log_probs(pose(scratch))(rows).log_probs
    assert found.dtype == np.float16 and found.shape == (3, LENGTH, VOCAB)
    np.testing.assert_allclose(found, WANTED[rows], rtol=2e-3, atol=1e-6)
    if on_disk:
        assert scratch.stat().st_size == COUNT * LENGTH * bytes_of("streamed", 4, VOCAB)


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_likeliest_come_with_the_mass_of_the_others(tmp_path, on_disk):
    scratch, k = tmp_path / "scratch.bin" if on_disk else None, 4
    rows = np.array([1, 3])
    top = write_top("a_method", pose(scratch), k)(rows)
    order = np.argsort(-WANTED[rows], axis=-1)
    np.testing.assert_array_equal(top.ids, order[..., :k])
    likely = np.take_along_axis(WANTED[rows], order, axis=-1)
    np.testing.assert_allclose(top.log_probs, likely[..., :k], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(top.rest), np.exp(likely[..., k:]).sum(-1), rtol=1e-5)
    if on_disk:
        assert scratch.stat().st_size == COUNT * LENGTH * bytes_of("top_k", k, VOCAB)


def test_without_a_head_of_its_own_a_student_shares_the_teacher_s():
    problem = dataclasses.replace(pose(), outer=None, params=TEACHER)
    rows = np.arange(COUNT)
    np.testing.assert_allclose(write_log_probs(problem)(rows).log_probs, WANTED, 2e-3, 1e-6)


def test_what_is_kept_of_a_token_is_known_before():
    assert bytes_of("recomputed", 64, 32000) == 0
    assert bytes_of("streamed", 64, 32000) == 64000
    assert bytes_of("top_k", 64, 32000) == 8 * 64 + 4


def test_more_tokens_than_there_are_is_refused():
    said = f"a_method: top_k=64 is more than the vocabulary of {VOCAB}; ask for fewer"
    with pytest.raises(InputError, match=said):
        write_top("a_method", pose(), 64)
