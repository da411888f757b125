"""SVD compensation: the nearest matrix of its rank, blind to what flows through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.compensation.svd import lqer, naive_lora, svd
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, LowRank

D_IN, D_OUT = 40, 24


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
ROUNDED = np.round(2 * W) / 2


def run(step, leaf: CompressedLinear, rms=None) -> CompressedLinear:
    problem = LinearProblem(jnp.asarray(W), LinearStats(rms=rms), jax.random.key(0))
    return jax.jit(step.run)(problem, leaf)


def energy(error) -> float:
    return float(np.sum(np.square(np.asarray(error, np.float64))))


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_what_is_left_is_the_tail_of_the_error(rank):
    leaf = run(svd(rank=rank, dtype="float32"), CompressedLinear(Dense(jnp.asarray(ROUNDED))))
    spectrum = np.linalg.svd((W - ROUNDED).astype(np.float64), compute_uv=False)
    left = energy(W - np.asarray(leaf.dense()))
    assert left == pytest.approx(np.sum(spectrum[rank:] ** 2), abs=1e-5 * np.sum(spectrum**2))
    np.testing.assert_array_equal(leaf.base.w, ROUNDED)


def test_no_other_matrix_of_that_rank_is_nearer():
    leaf = run(svd(rank=3, dtype="float32"), CompressedLinear(Dense(jnp.asarray(ROUNDED))))
    (correction,) = leaf.corrections
    a, b = np.asarray(correction.a), np.asarray(correction.b)
    least = energy(W - ROUNDED - a @ b)
    for seed in range(20):
        step = 1e-2 * draw(*a.shape, seed=seed), 1e-2 * draw(*b.shape, seed=seed + 100)
        assert energy(W - ROUNDED - (a + step[0]) @ (b + step[1])) > least


def test_it_is_blind_to_the_inputs():
    leaf = CompressedLinear(Dense(jnp.asarray(ROUNDED)))
    skewed = run(svd(rank=4), leaf, rms=jnp.exp(draw(D_IN)))
    np.testing.assert_array_equal(skewed.corrections[0].a, run(svd(rank=4), leaf).corrections[0].a)
    assert svd().needs == set()


def test_it_sees_the_transforms_and_earlier_corrections():
    earlier = LowRank(jnp.asarray(draw(D_IN, 2)), jnp.asarray(draw(2, D_OUT)))
    leaf = CompressedLinear(
        Dense(jnp.asarray(ROUNDED)), (earlier,), ChannelScale(jnp.full(D_IN, 0.5)), None
    )
    after = run(svd(rank=24, dtype="float32"), leaf)
    assert len(after.corrections) == 2 and after.corrections[1].rank == 24
    np.testing.assert_allclose(after.dense(), W, atol=1e-4)


def test_factors_are_stored_in_half_precision_unless_said():
    leaf = CompressedLinear(Dense(jnp.asarray(ROUNDED, jnp.float16)))
    half, single = (run(svd(rank=0.25, **said), leaf) for said in ({}, {"dtype": "float32"}))
    assert half.corrections[0].rank == 6
    assert {a.dtype for a in jax.tree.leaves(half.corrections)} == {jnp.dtype("float16")}
    assert {a.dtype for a in jax.tree.leaves(single.corrections)} == {jnp.dtype("float32")}
    assert half.stored_bits() - leaf.stored_bits() == 16 * 6 * (D_IN + D_OUT)
    lost = energy(half.dense() - single.dense()) / energy(single.corrections[0].dense())
    assert 0 < lost < 1e-6


@pytest.mark.parametrize("make", [lqer, naive_lora])
def test_another_name_gives_the_same_bytes(make):
    leaf = CompressedLinear(Dense(jnp.asarray(ROUNDED)))
    one, other = (run(named(rank=4), leaf).corrections[0] for named in (svd, make))
    np.testing.assert_array_equal(one.a, other.a)
    np.testing.assert_array_equal(one.b, other.b)
    assert make().name == make.__name__ and make().needs == set()


@pytest.mark.parametrize("make", [svd, lqer, naive_lora])
@pytest.mark.parametrize("arguments", [{"rank": 0}, {"rank": 1.5}, {"dtype": "bfloat16"}])
def test_other_arguments_are_refused(make, arguments):
    (name,) = arguments
    with pytest.raises(InputError, match=f"^{make.__name__}: {name}="):
        make(**arguments)


def test_a_rank_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="svd: rank=25 is larger than min"):
        run(svd(rank=25), CompressedLinear(Dense(jnp.asarray(ROUNDED))))
