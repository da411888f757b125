"""Wanda: scores are weights beside their inputs, compared within an output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.sparsifiers.wanda import wanda
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense
from lqec_kernels.sparse import Masked

D_IN, D_OUT = 40, 9
RNG = np.random.default_rng(0)
W = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)
RMS = np.exp(RNG.standard_normal(D_IN)).astype(np.float32)


def run(step, rms=RMS, w=W, transform=None) -> CompressedLinear:
    problem = LinearProblem(jnp.asarray(w), LinearStats(rms=jnp.asarray(rms)), jax.random.key(0))
    return step.run(problem, CompressedLinear(Dense(problem.w), (), transform))


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.77])
def test_every_output_loses_as_many_and_the_least_of_them(fraction):
    base = run(wanda(sparsity=fraction)).base
    kept, score = np.asarray(base.kept()), np.abs(W) * RMS[:, None]
    assert isinstance(base, Masked) and base.pattern == ""
    assert ((~kept).sum(0) == int(fraction * D_IN)).all()
    assert (np.where(kept, 0, score).max(0) < np.where(kept, score, np.inf).min(0)).all()
    np.testing.assert_array_equal(base.dense(), np.where(kept, W, 0))


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_are_exact(pattern, n, m):
    base = run(wanda(sparsity=pattern)).base
    score = (np.abs(W) * RMS[:, None]).reshape(-1, m, D_OUT)
    kept = np.asarray(base.kept()).reshape(score.shape)
    assert (kept.sum(1) == n).all() and base.pattern == pattern
    assert (np.where(kept, 0, score).max(1) < np.where(kept, score, np.inf).min(1)).all()


def test_equal_inputs_leave_the_weights_to_decide():
    kept = np.asarray(run(wanda(sparsity=0.5), np.full(D_IN, 3.0, np.float32)).base.kept())
    order = np.argsort(np.abs(W), axis=0)
    for column in range(D_OUT):
        assert not kept[order[: D_IN // 2, column], column].any()


def test_a_loud_input_keeps_its_weights():
    loud = np.where(np.arange(D_IN) % 4 == 1, 1e3, 1.0).astype(np.float32)
    kept = np.asarray(run(wanda(sparsity="2:4"), loud).base.kept())
    assert kept[1::4].all()


def test_a_scale_before_the_weight_counts():
    scale = jnp.asarray(np.exp(RNG.standard_normal(D_IN)), jnp.float32)
    came = run(wanda(sparsity="2:4"), transform=ChannelScale(scale)).base.kept()
    np.testing.assert_array_equal(came, run(wanda(sparsity="2:4"), RMS * scale).base.kept())


def test_what_it_reports_is_the_lost_energy():
    step = wanda(sparsity=0.5)
    problem = LinearProblem(jnp.asarray(W), LinearStats(rms=jnp.asarray(RMS)), jax.random.key(0))
    leaf = run(step)
    lost = np.where(np.asarray(leaf.base.kept()), 0, (W * RMS[:, None]) ** 2).sum()
    assert step.objective(problem, leaf) == pytest.approx(
        lost / ((W * RMS[:, None]) ** 2).sum(), rel=1e-5
    )
    assert step.needs == {"rms"}


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="wanda: sparsity=1; a fraction between 0 and 1"):
        wanda(sparsity=1)
    with pytest.raises(InputError, match="wanda: d_in=40 is not divisible by 16"):
        run(wanda(sparsity="2:16"))
