"""SLiM-Quant: the one clip of a matrix is the best one, and the best channels may be doubled."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers import slim_quant as module
from lqec_jax.quantizers.slim_quant import slim_quant
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense
from lqec_kernels.packing import unpack

D_IN, D_OUT = 96, 64
RNG = np.random.RandomState(0)
WEIGHTS = {
    "gaussian": RNG.standard_normal((D_IN, D_OUT)).astype(np.float32),
    "laplace": RNG.laplace(size=(D_IN, D_OUT)).astype(np.float32),
}
# One weight far from all others: the best clip is a hundredth of the largest weight.
WEIGHTS["an outlier"] = WEIGHTS["gaussian"] + 250 * np.eye(D_IN, D_OUT) * (np.arange(D_OUT) == 3)


@partial(jax.jit, static_argnums=(1, 2))
def find(w, bits, search="exact"):
    clip = module.SEARCHES[search](w, bits, jnp.ones((D_IN, 1)))
    return clip, module.quantize(w, bits, clip)


def square_by_numpy(w: np.ndarray, bits: int, clip: float) -> float:
    half = 2 ** (bits - 1)
    scale = clip / (half - 1)
    return np.mean((w - scale * np.clip(np.round(w / scale), -half, half - 1)) ** 2)


def best_by_force(w: np.ndarray, bits: int) -> float:
    clips = np.abs(w).max() * np.arange(1, 4097) / 4096
    return min(square_by_numpy(w.astype(np.float64), bits, clip) for clip in clips[::3])


@pytest.mark.parametrize(("name", "bits"), [("gaussian", 4), ("laplace", 4), ("an outlier", 3)])
def test_no_clip_is_better_by_two_percent(name, bits):
    w = WEIGHTS[name].astype(np.float32)
    clip, base = find(w, bits)
    reached = np.mean((np.asarray(base.dense()) - w) ** 2)
    assert reached == pytest.approx(square_by_numpy(w, bits, float(clip)), rel=1e-3)
    assert reached <= 1.02 * best_by_force(w, bits)


def test_the_integral_takes_the_clip_of_its_formula():
    w = WEIGHTS["laplace"]
    clip, base = find(w, 3, "integral")
    counts, edges = np.histogram(np.abs(w), 512, (0, np.abs(w).max()))
    x = (edges[1:] + edges[:-1]) / 2
    # The estimate at all bins, where the method looks at every tenth and then beside the best.
    delta = x / 8
    floored = np.floor(x[None] / delta[:, None]) * delta[:, None]
    there = np.where(np.arange(512)[None] < np.arange(512)[:, None], floored, x[:, None])
    errors = (counts * (x - there) ** 2).sum(axis=1)
    chosen = np.argmin(np.abs(x - float(clip)))
    assert x[chosen] == pytest.approx(float(clip), rel=1e-4)
    assert errors[chosen] <= 1.01 * errors.min()
    assert np.mean((base.dense() - w) ** 2) >= best_by_force(w, 3)


def test_one_scale_is_stored_for_all():
    w = WEIGHTS["gaussian"]
    clip, base = find(w, 4)
    assert isinstance(base, Affine) and base.zeros is None
    assert base.scales.shape == (1, 1) and base.scales.dtype == jnp.float32
    assert base.scales[0, 0] == pytest.approx(float(clip) / 7)
    assert CompressedLinear(base).bits_per_weight == 4 + 32 / w.size
    codes = np.asarray(unpack(base.codes, 4, D_IN), np.float32)
    np.testing.assert_allclose(base.dense(), (codes - 8) * float(clip) / 7, rtol=1e-5)


def pose(w, transform=None):
    rms = np.exp(np.random.RandomState(3).standard_normal(D_IN)).astype(np.float32)
    problem = LinearProblem(jnp.asarray(w), LinearStats(jnp.asarray(rms)), jax.random.key(0))
    return problem, CompressedLinear(Dense(problem.w), (), transform), rms


def test_salient_channels_are_doubled_before_and_halved_after():
    step, plain = slim_quant(bits=4, boost=0.05), slim_quant(bits=4)
    assert step.needs == {"rms"} and plain.needs == set()
    # Where an input is large, its weights are small: doubling them makes their grid finer.
    w = WEIGHTS["gaussian"] / (0.1 + pose(WEIGHTS["gaussian"])[2][:, None]) ** 0.7
    problem, start, rms = pose(w)
    leaf = jax.jit(step.run)(problem, start)
    halved = np.asarray(leaf.input_transform.scale) == 0.5
    assert halved.sum() == round(0.05 * D_IN)
    salience = rms * np.abs(w).sum(axis=1)
    assert salience[halved].min() > salience[~halved].max()
    assert (np.asarray(leaf.input_transform.scale)[~halved] == 1).all()
    doubled = np.where(halved, 2, 1)[:, None] * w
    scale = float(leaf.base.scales[0, 0])
    wanted = scale * np.clip(np.round(doubled / scale), -8, 7)
    np.testing.assert_allclose(leaf.base.dense(), wanted, atol=1e-5)
    other = jax.jit(plain.run)(problem, start)
    assert step.objective(problem, leaf) < step.objective(problem, other)


def test_a_scale_that_is_there_takes_the_doubling_in():
    problem, start, _ = pose(WEIGHTS["gaussian"], ChannelScale(jnp.full(D_IN, 0.25)))
    leaf = jax.jit(slim_quant(bits=4, boost=0.05).run)(problem, start)
    assert set(np.unique(leaf.input_transform.scale)) == {0.125, 0.25}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 1}, "bits=1; an integer from 2 to 8"),
        ({"search": "grid"}, "search='grid'; one of 'exact', 'integral'"),
        ({"boost": 2}, "boost=2; a number from 0 to 1"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^slim_quant: ") as caught:
        slim_quant(**arguments)
    assert said in str(caught.value)
