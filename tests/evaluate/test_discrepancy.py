"""Distances of hidden states against plain numpy."""

import jax
import numpy as np
import pytest

from lqec_jax.core import walking
from lqec_jax.evaluate.discrepancy import discrepancy
from tests.train.tiny import VOCAB, draw_plain, plain_fns

FNS = plain_fns()
TEACHER, STUDENT = draw_plain((3, 3), 32), draw_plain((3, 2), 32)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (5, 8)).astype(np.int32)


def walk(params):
    """Returns the states after every block and the normed ones at the end, float64."""
    h, states = params["embed"][TOKENS].astype(np.float64), []
    for segment in params["blocks"]:
        leaf = jax.tree.map(lambda x: x[0], segment["mix"]["kernel"])
        h = h + np.tanh(h @ np.asarray(leaf.dense(), np.float64))
        states.append(h)
    return states, h / np.sqrt(1 + np.mean(h**2, -1, keepdims=True))


@pytest.mark.parametrize("at_once", [4096, 16])
def test_it_is_its_formula_however_windows_walk(monkeypatch, at_once):
    monkeypatch.setattr(walking, "STREAM_TOKENS", at_once)
    found = discrepancy((FNS, TEACHER), (FNS, STUDENT), TOKENS)
    (wanted, last), (came, normed) = walk(TEACHER), walk(STUDENT)
    assert found.post_norm == pytest.approx(np.mean((normed - last) ** 2), rel=1e-4)
    by_block = [np.sum((s - t) ** 2) / np.sum(t**2) for s, t in zip(came, wanted, strict=True)]
    assert found.by_block == pytest.approx(by_block, rel=1e-4)
    assert found.tokens == TOKENS.size


def test_a_model_is_no_distance_from_itself():
    found = discrepancy((FNS, TEACHER), (FNS, TEACHER), TOKENS)
    assert found.post_norm == 0.0 and found.by_block == (0.0, 0.0)
