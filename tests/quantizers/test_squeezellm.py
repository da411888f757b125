"""SqueezeLLM: the best clusters of every column, and outliers that are exact."""

from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers import squeezellm as module
from lqec_jax.quantizers.squeezellm import fit_levels, squeezellm
from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense
from lqec_kernels.outliers import Outliers
from lqec_kernels.transforms import Hadamard

RNG = np.random.RandomState(0)
SMALL, WEIGHT = RNG.standard_normal((11, 5)).astype(np.float32), RNG.rand(11, 5).astype(np.float32)
WEIGHT[3, 0] = 0
D_IN, D_OUT = 64, 24
W = RNG.standard_t(3, (D_IN, D_OUT)).astype(np.float32)
FISHER = np.exp(RNG.standard_normal((D_IN, D_OUT))).astype(np.float32)

levels_of = jax.jit(fit_levels, static_argnums=2)


def loss(w, weight, levels) -> np.ndarray:
    """Returns Σ weight (w - nearest level)² of each column, in float64."""
    distance = np.abs(w[:, None].astype(np.float64) - np.asarray(levels, np.float64)[None])
    return (weight * distance.min(axis=1) ** 2).sum(axis=0)


def best_by_force(x: np.ndarray, weight: np.ndarray, count: int) -> float:
    """Returns the least error of all ways to cut sorted points into intervals."""
    order = np.argsort(x)
    x, weight = x[order].astype(np.float64), weight[order].astype(np.float64)
    least = np.inf
    for inner in combinations(range(1, len(x)), count - 1):
        error = 0.0
        for part in np.split(np.arange(len(x)), inner):
            mass = weight[part].sum()
            mean = (weight[part] * x[part]).sum() / mass if mass else 0.0
            error += (weight[part] * (x[part] - mean) ** 2).sum()
        least = min(least, error)
    return least


@pytest.mark.parametrize("bits", [1, 2])
def test_no_clusters_are_better(bits):
    levels = levels_of(SMALL, WEIGHT, bits)
    assert (np.diff(levels, axis=0) >= 0).all()
    reached = loss(SMALL, WEIGHT, levels)
    wanted = [best_by_force(SMALL[:, i], WEIGHT[:, i], 2**bits) for i in range(5)]
    np.testing.assert_allclose(reached, wanted, rtol=1e-4)


def lloyd(x, weight, count, seed) -> np.ndarray:
    centres = np.sort(np.random.RandomState(seed).choice(x, count, replace=False))
    for _ in range(100):
        nearest = np.abs(x[:, None] - centres).argmin(axis=1)
        for k in range(count):
            mass = weight[nearest == k].sum()
            if mass:
                centres[k] = (weight * x)[nearest == k].sum() / mass
    return centres


def test_it_is_no_worse_than_the_best_of_many_lloyd_runs():
    levels = levels_of(W, FISHER, 3)
    reached = loss(W, FISHER, levels)
    for column in range(4):
        runs = [lloyd(W[:, column], FISHER[:, column], 8, seed) for seed in range(20)]
        best = min(loss(W[:, [column]], FISHER[:, [column]], c[:, None])[0] for c in runs)
        assert reached[column] <= best * (1 + 1e-5)


def test_cells_and_lloyd_are_near_the_optimum(monkeypatch):
    w, weight = RNG.standard_normal((480, 4)).astype(np.float32), RNG.rand(480, 4)
    exact = loss(w, weight, jax.jit(fit_levels, static_argnums=2)(w, weight, 2))
    monkeypatch.setattr(module, "CELLS", 48)
    coarse = loss(w, weight, jax.jit(partial(fit_levels, bits=2))(w, weight))
    assert (coarse >= exact * (1 - 1e-5)).all()
    assert (coarse <= exact * 1.002).all()


def pose(input_transform=None, output_transform=None, rms=None):
    stats = LinearStats(fisher=jnp.asarray(FISHER), rms=rms)
    problem = LinearProblem(jnp.asarray(W), stats, jax.random.key(0))
    return problem, CompressedLinear(Dense(problem.w), (), input_transform, output_transform)


def test_dense_and_sparse_together_are_the_weight_at_the_outliers():
    step = squeezellm(bits=2, outliers=0.02)
    leaf = jax.jit(step.run)(*pose())
    assert isinstance(leaf.base, Codebook)
    (sparse,) = leaf.corrections
    assert isinstance(sparse, Outliers) and sparse.count == round(0.02 * W.size) == 31
    places = np.asarray(sparse.places)
    dense, flat = np.asarray(leaf.dense()).reshape(-1), W.reshape(-1)
    np.testing.assert_allclose(dense[places], flat[places], rtol=2**-10)
    # Three of the largest Fisher weights, then the largest weights.
    sensitive = set(np.argsort(-FISHER.reshape(-1))[:3])
    assert sensitive <= set(places)
    others = np.delete(np.abs(flat), places)
    assert np.abs(flat[list(set(places) - sensitive)]).min() >= others.max()
    plain = jax.jit(squeezellm(bits=2, outliers=0).run)(*pose())
    assert step.objective(*pose()[:1], leaf) < 0.8 * step.objective(*pose()[:1], plain)
    extra = leaf.bits_per_weight - plain.bits_per_weight
    assert extra == pytest.approx(48 * 31 / W.size)


def test_what_is_reported_is_what_is_lowered():
    step = squeezellm(bits=2, outliers=0)
    problem, start = pose()
    leaf = jax.jit(step.run)(problem, start)
    error = (FISHER * (np.asarray(leaf.dense()) - W) ** 2).sum() / (FISHER * W**2).sum()
    assert step.objective(problem, leaf) == pytest.approx(error, rel=1e-4)
    by_ones = jax.jit(squeezellm(bits=2, outliers=0, weights="ones").run)(problem, start)
    assert error < step.objective(problem, by_ones)
    needs = {w: squeezellm(weights=w).needs for w in ("fisher", "rms", "ones")}
    assert needs == {"fisher": {"fisher"}, "rms": {"rms"}, "ones": set()}


def test_the_fisher_weights_follow_the_scales_around_the_base():
    scales = [np.exp(RNG.standard_normal(n)).astype(np.float32) for n in (D_IN, D_OUT)]
    leaf = pose(*(ChannelScale(jnp.asarray(scale)) for scale in scales))[1]
    problem = pose()[0]
    step = squeezellm(bits=2, outliers=0.02)
    new = jax.jit(step.run)(problem, leaf)
    weight = FISHER * scales[0][:, None] ** 2 * scales[1] ** 2
    assert np.asarray(module._weigh("fisher", problem, leaf)) == pytest.approx(weight, rel=1e-4)
    # The base is as before, so the whole weight is W with both scales, exact at the outliers.
    places = np.asarray(new.corrections[0].places)
    whole = (scales[0][:, None] * W * scales[1]).reshape(-1)
    got = np.asarray(new.dense()).reshape(-1)
    np.testing.assert_allclose(got[places], whole[places], rtol=2e-3)


def test_a_rotation_mixes_what_fisher_weights_and_outliers_are_of():
    rotation = Hadamard(jnp.zeros(2, jnp.uint32), D_IN, D_IN)
    for arguments, what in (({}, "the Fisher weights"), ({"weights": "ones"}, "outliers")):
        with pytest.raises(InputError, match=f"squeezellm: {what} are of single weights"):
            jax.eval_shape(squeezellm(**arguments).run, *pose(rotation))
    leaf = jax.eval_shape(squeezellm(weights="ones", outliers=0).run, *pose(rotation))
    assert isinstance(leaf.input_transform, Hadamard)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 5}, "bits=5; an integer from 1 to 4"),
        ({"weights": "gram"}, "weights='gram'; one of 'fisher', 'rms', 'ones'"),
        ({"outliers": 0.9}, "outliers=0.9; a number from 0 to 0.5"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^squeezellm: ") as caught:
        squeezellm(**arguments)
    assert said in str(caught.value)
