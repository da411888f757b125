"""AWQ: a scale that protects the channels that matter, undone where the weight is read."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.linear import linear
from lqec_jax.core.types import LinearProblem, LinearStats, output_error
from lqec_jax.errors import InputError
from lqec_jax.quantizers import rtn
from lqec_jax.quantizers.awq import awq
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense

D_IN, D_OUT, GROUP = 64, 24, 16
RNG = np.random.default_rng(0)
W = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)
# A few inputs are much larger than the others, as in language models.
LOUD = np.where(np.arange(D_IN) % 13 == 5, 12.0, 1.0)
X = (RNG.standard_normal((400, D_IN)) * LOUD).astype(np.float32)


class Rotation:
    """x ↦ x M for an M that mixes channels."""

    def apply(self, x):
        return x


@lru_cache
def compiled(**arguments):
    return jax.jit(awq(group_size=GROUP, **arguments).run)


def run(w=W, x=X, transform=None, **arguments) -> tuple[LinearProblem, CompressedLinear]:
    gram = jnp.asarray(x.T @ x / len(x))
    problem = LinearProblem(jnp.asarray(w), LinearStats(gram=gram), jax.random.key(0))
    base = problem.w if transform is None else problem.w / transform.scale[:, None]
    return problem, compiled(**arguments)(problem, CompressedLinear(Dense(base), (), transform))


def exponent_of(leaf: CompressedLinear, x=X) -> float:
    """Returns the r that explains a stored scale, 1/c = const · rms^-r."""
    rms = np.sqrt(np.mean(x**2, axis=0))
    logs = np.log(rms), -np.log(np.asarray(leaf.input_transform.scale, np.float64))
    return np.polyfit(*logs, 1)[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_it_loses_less_than_rounding_where_inputs_differ(bits):
    problem, leaf = run(bits=bits)
    rounded = CompressedLinear(jax.jit(rtn.quantize, static_argnums=1)(W, GroupGrid(bits, GROUP)))
    assert output_error(problem, leaf) < 0.6 * output_error(problem, rounded)
    assert leaf.input_transform.scale.dtype == jnp.float16
    assert leaf.stored_bits() == leaf.base.stored_bits() + 16 * D_IN
    assert 0.2 < exponent_of(leaf) < 1


def test_the_exponent_is_the_best_of_the_grid():
    """Every candidate by hand, in float64; ours is none worse."""
    problem, leaf = run(bits=3, clip_search=False, n_grid=10)
    gram, rms = np.asarray(problem.stats.gram, np.float64), np.sqrt(np.mean(X**2, axis=0))
    round_off = jax.jit(lambda w: rtn.quantize(w, GroupGrid(3, GROUP)).dense())
    reached = []
    for r in np.arange(10) / 10:
        c = rms**r / np.sqrt((rms**r).max() * (rms**r).min())
        stored = np.float32(np.float16(1 / c))
        error = W - stored[:, None] * np.asarray(round_off(W / stored[:, None]))
        reached.append(np.sum(error * (gram @ error)) / np.sum(W * (gram @ W)))
    assert output_error(problem, leaf) == pytest.approx(min(reached), rel=1e-3)
    assert exponent_of(leaf) == pytest.approx(np.argmin(reached) / 10, abs=0.005)
    assert min(reached) < 0.9 * reached[0]


def test_alike_inputs_need_no_scale():
    x = RNG.standard_normal((D_IN, D_IN))
    alike = np.linalg.qr(x)[0].astype(np.float32) * np.float32(np.sqrt(D_IN))  # gram = identity
    problem, leaf = run(x=alike, bits=3, clip_search=False, n_grid=10)
    np.testing.assert_allclose(leaf.input_transform.scale, 1.0, atol=1e-3)
    rounded = CompressedLinear(rtn.quantize(problem.w, GroupGrid(3, GROUP)))
    assert output_error(problem, leaf) <= output_error(problem, rounded) * (1 + 1e-5)


@pytest.mark.parametrize("x", [0 * X, X[:1], X * (np.arange(D_IN) > 20)], ids=["0", "1", "dead"])
def test_never_worse_than_rounding_and_always_finite(x):
    problem, leaf = run(x=x, bits=2)
    rounded = CompressedLinear(rtn.quantize(problem.w, GroupGrid(2, GROUP)))
    assert np.isfinite(leaf.dense()).all()
    error = output_error(problem, leaf)
    assert error <= output_error(problem, rounded) * (1 + 1e-5) and np.isfinite(error)
    if not x.any():
        np.testing.assert_array_equal(leaf.input_transform.scale, 1.0)
        np.testing.assert_array_equal(leaf.base.codes, rounded.base.codes)


def test_clips_lower_every_output_that_they_change():
    problem, plain = run(bits=2, clip_search=False)
    _, clipped = run(bits=2)
    gram = np.asarray(problem.stats.gram, np.float64)

    def errors(leaf):
        error = W - np.asarray(leaf.dense(), np.float64)
        return np.sum(error * (gram @ error), axis=0)

    assert (errors(clipped) <= errors(plain) * (1 + 1e-4)).all()
    assert errors(clipped).sum() < 0.9 * errors(plain).sum()


def test_the_scale_is_undone_at_the_input():
    problem, leaf = run(bits=8, symmetric=True)
    assert leaf.base.zeros is None
    x = jnp.asarray(X[:5])
    np.testing.assert_allclose(linear(x, leaf), x @ leaf.dense(), atol=1e-3)
    np.testing.assert_allclose(leaf.dense(), W, atol=0.05)


def test_a_scale_that_is_there_is_multiplied():
    before = ChannelScale(jnp.asarray(np.exp(0.5 * RNG.standard_normal(D_IN)), jnp.float16))
    problem, leaf = run(bits=4, transform=before)
    rounded = CompressedLinear(rtn.quantize(problem.w, GroupGrid(4, GROUP)))
    assert isinstance(leaf.input_transform, ChannelScale)
    assert output_error(problem, leaf) < 0.6 * output_error(problem, rounded)


def test_a_rotation_leaves_no_room():
    problem, leaf = run(bits=4)
    turned = CompressedLinear(leaf.base, (), Rotation())
    with pytest.raises(InputError, match="awq: the weight stands behind a Rotation transform"):
        awq(group_size=GROUP).run(problem, turned)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 1}, "bits=1; an integer from 2 to 8"),
        ({"n_grid": 0}, "n_grid=0; an integer >= 1"),
        ({"clip_search": "output"}, "clip_search='output'; one of True, False"),
        ({"group_size": True}, "group_size=True"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^awq: ") as caught:
        awq(**arguments)
    assert said in str(caught.value)
