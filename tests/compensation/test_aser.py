"""ASER: qera with as many components as a rule asks for, and outliers kept out of the base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.compensation.aser import aser, count_components, find_outliers
from lqec_jax.compensation.whitened import qera
from lqec_jax.core.types import LinearProblem, LinearStats, Step, output_error, run_linear
from lqec_jax.errors import InputError
from lqec_jax.quantizers.gptq import gptq
from lqec_jax.quantizers.rtn import rtn
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense
from tests.compensation.leaves import assert_same_but_last_places

D_IN, D_OUT = 48, 32


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
ROUNDED = np.round(W)
X = (draw(600, D_IN, seed=1) @ (np.eye(D_IN) + draw(D_IN, D_IN, seed=2) / 4)) * np.exp(
    draw(D_IN, seed=3)
)
GRAM = X.T @ X / len(X)
LEAF = CompressedLinear(Dense(jnp.asarray(ROUNDED)))
# Channels whose weights are large, and whose inputs are.
PLANTED = [3, 20, 31]
LOUD = W * np.where(np.isin(np.arange(D_IN), PLANTED), 12, 1)[:, None].astype(np.float32)
LOUD_X = X * np.where(np.isin(np.arange(D_IN), PLANTED), [5.0], 1.0)


def pose(step: Step, w=W, x=X) -> LinearProblem:
    known = {"absmean": np.mean(np.abs(x), 0), "gram": x.T @ x / len(x)}
    stats = {name: jnp.asarray(known[name], jnp.float32) for name in step.needs}
    return LinearProblem(jnp.asarray(w), LinearStats(**stats), jax.random.key(0))


def solve(step: Step, leaf: CompressedLinear = LEAF, w=W, x=X) -> tuple:
    return jax.jit(lambda problem, leaf: run_linear(step, problem, leaf))(pose(step, w, x), leaf)


def dense(w) -> CompressedLinear:
    return CompressedLinear(Dense(jnp.asarray(w)))


def energy(error) -> float:
    error = np.asarray(error, np.float64)
    return float(np.sum(error * (GRAM @ error)))


def test_the_rule_counts_components_until_their_share_is_reached():
    spectrum = jnp.asarray([4.0, 3.0, 2.0, 1.0])
    for share, wanted in ((1e-6, 1), (0.4, 1), (0.41, 2), (0.7, 2), (0.71, 3), (0.95, 4), (1.0, 4)):
        assert int(count_components(spectrum, share)) == wanted, share
    assert int(count_components(jnp.zeros(4), 0.9)) == 1


def test_aser_is_qera_with_the_rank_of_the_rule():
    spectrum = np.linalg.svd(np.linalg.cholesky(GRAM).T @ (W - ROUNDED), compute_uv=False)
    wanted = int(np.searchsorted(np.cumsum(spectrum), 0.5 * np.sum(spectrum))) + 1
    assert 1 < wanted < 16
    step = aser(rank=16, cumulative=0.5, dtype="float32")
    leaf, facts = solve(step)
    (correction,) = leaf.corrections
    assert correction.rank == 16 and not np.asarray(correction.a)[:, wanted:].any()
    assert np.abs(correction.b).sum(1).all()
    assert step.notes(jax.device_get(facts)) == (f"rank: {wanted} of 16 components by the rule",)
    left = np.sum(spectrum[wanted:] ** 2)
    assert energy(W - leaf.dense()) == pytest.approx(left, rel=1e-5)
    whole, facts = solve(aser(rank=wanted - 1, cumulative=0.5, dtype="float32"))
    assert step.notes(jax.device_get(facts)) == ()
    same, _ = solve(qera(rank=wanted - 1, dtype="float32"))
    np.testing.assert_allclose(whole.dense(), same.dense(), atol=1e-5)


# Outliers


@pytest.mark.parametrize("quantizer", [rtn(bits=2, group_size=16), gptq(bits=2, group_size=16)])
def test_without_outliers_it_is_the_quantizer_and_then_aser(quantizer):
    whole = aser(rank=6, cumulative=0.3, quantizer=quantizer, outliers=0)
    assert whole.needs == {"gram"}
    one, facts = solve(whole, dense(W))
    base, base_facts = solve(quantizer, dense(W))
    other, other_facts = solve(aser(rank=6, cumulative=0.3), base)
    assert_same_but_last_places(one, other)
    said = whole.notes(jax.device_get(facts))
    own = aser(rank=6, cumulative=0.3).notes(jax.device_get(other_facts))
    quantizers = () if quantizer.notes is None else quantizer.notes(jax.device_get(base_facts))
    assert own and said == (*own, *quantizers)


def test_the_outliers_are_those_of_large_inputs_and_weights():
    absmean = np.mean(np.abs(LOUD_X), 0).astype(np.float32)
    outlier, smooth = find_outliers(jnp.asarray(LOUD), jnp.asarray(absmean), 3)
    size = absmean * np.mean(np.abs(LOUD), 1)
    assert set(np.flatnonzero(outlier)) == set(np.argsort(size)[-3:]) == set(PLANTED)
    chosen = absmean[PLANTED]
    np.testing.assert_allclose(smooth[np.array(PLANTED)], chosen / chosen.min(), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(smooth)[~np.asarray(outlier)], 1.0)
    none = find_outliers(jnp.asarray(LOUD), jnp.zeros(D_IN), 3)[1]
    np.testing.assert_array_equal(none, 1.0)


def test_smoothing_is_an_identity_of_inputs_and_weights():
    """With a base of 8 bits and a whole rank: what is smoothed away is made up for."""
    step = aser(rank=D_OUT, cumulative=1.0, quantizer=rtn(bits=8, group_size=16), outliers=3,
                dtype="float32")  # fmt: skip
    leaf, _ = solve(step, dense(LOUD), LOUD, LOUD_X)
    assert isinstance(leaf.input_transform, ChannelScale)
    _, smooth = find_outliers(
        jnp.asarray(LOUD), jnp.asarray(np.mean(np.abs(LOUD_X), 0), jnp.float32), 3
    )
    np.testing.assert_allclose(1 / leaf.input_transform.scale, smooth, rtol=1e-3)
    assert smooth.max() > 1.2
    np.testing.assert_array_equal(leaf.base.dense()[jnp.asarray(PLANTED)], 0.0)
    through = np.asarray(leaf.input_transform.apply(jnp.asarray(LOUD_X, jnp.float32)))
    (correction,) = leaf.corrections
    came = through @ np.asarray(leaf.base.dense()) + LOUD_X @ np.asarray(correction.dense())
    np.testing.assert_allclose(came, LOUD_X @ LOUD, atol=1e-3 * np.abs(LOUD_X @ LOUD).max())


def test_planted_outliers_are_better_kept_out_of_the_base():
    error = {}
    for outliers in (0, 3, None):
        step = aser(rank=6, cumulative=1.0, outliers=outliers,
                    quantizer=rtn(bits=2, group_size=16))  # fmt: skip
        leaf, _ = solve(step, dense(LOUD), LOUD, LOUD_X)
        problem = pose(qera(), LOUD, LOUD_X)
        error[outliers] = float(output_error(problem, leaf))
    assert error[3] < 0.7 * error[0]
    assert error[None] == error[3], "None is half of a small rank"


def test_arguments_are_refused():
    for arguments in ({"cumulative": 1.5}, {"outliers": -1}, {"rank": 0}, {"dtype": "bfloat16"}):
        (name,) = arguments
        with pytest.raises(InputError, match=f"^aser: {name}="):
            aser(**arguments)
    with pytest.raises(InputError, match="^aser: quantizer=4; a method that quantizes"):
        aser(quantizer=4)
    step = aser(rank=4, quantizer=rtn(), outliers=D_IN + 1)
    assert step.needs == {"gram", "absmean"} and aser().needs == {"gram"}
    with pytest.raises(InputError, match="^aser: outliers=49 is more than d_in=48"):
        jax.eval_shape(step.run, pose(step), LEAF)
    other = dataclasses.replace(rtn(), run=lambda problem, leaf: leaf)
    with pytest.raises(InputError, match="^aser: quantizer=rtn leaves the weight dense"):
        jax.eval_shape(aser(rank=4, quantizer=other, outliers=0).run, pose(aser()), LEAF)
