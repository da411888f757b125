"""CALDERA: factors and a base in turns, neither of which may raise what the inputs see of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.compensation.caldera import caldera, factor_coarsely
from lqec_jax.compensation.whitened import qera
from lqec_jax.core.closed_form import complete, reduce_rank
from lqec_jax.core.types import LinearProblem, LinearStats, output_error, run_linear
from lqec_jax.errors import InputError
from lqec_jax.quantizers.gptq import gptq
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.compensation.leaves import assert_same_but_last_places

D_IN, D_OUT, RANK, GROUP = 48, 32, 6, 16


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
X = (draw(300, D_IN, seed=1) @ (np.eye(D_IN) + draw(D_IN, D_IN, seed=2) / 4)) * np.exp(
    draw(D_IN, seed=3) / 2
)
GRAM = (X.T @ X / len(X)).astype(np.float32)
PROBLEM = LinearProblem(jnp.asarray(W), LinearStats(gram=jnp.asarray(GRAM)), jax.random.key(0))
LEAF = CompressedLinear(Dense(PROBLEM.w))
BASE = gptq(bits=2, group_size=GROUP)


def solve(step, leaf: CompressedLinear = LEAF) -> tuple:
    return jax.jit(lambda problem, leaf: run_linear(step, problem, leaf))(PROBLEM, leaf)


def energy(error) -> float:
    error = np.asarray(error, np.float64)
    return float(np.sum(error * (GRAM @ error)))


def test_the_other_half_is_what_least_squares_gives():
    error, a = draw(D_IN, D_OUT, seed=4), draw(D_IN, RANK, seed=5)
    root = np.linalg.cholesky(GRAM.astype(np.float64)).T
    wanted = np.linalg.lstsq(root @ a, root @ error, rcond=None)[0]
    np.testing.assert_allclose(complete(error, GRAM, a), wanted, atol=1e-4)
    # A component said twice, and one that says nothing.
    a[:, 1], a[:, 2] = a[:, 0], 0
    b = np.asarray(complete(jnp.asarray(error), jnp.asarray(GRAM), jnp.asarray(a)))
    wanted = np.linalg.lstsq(root @ a, root @ error, rcond=None)[0]
    assert energy(error - a @ b) == pytest.approx(energy(error - a @ wanted), rel=1e-5)
    np.testing.assert_array_equal(b[2], 0.0)
    # Blind to the gram on the other side, as a is on the inputs'.
    b = draw(RANK, D_OUT, seed=6)
    a = np.asarray(complete(error.T, np.ones(D_OUT, np.float32), b.T)).T
    least = energy(error - a @ b)
    for seed in range(20):
        assert energy(error - (a + 1e-2 * draw(*a.shape, seed=seed)) @ b) > least


def test_rounds_lower_what_rounding_left():
    error = W - np.round(W)
    arguments = jnp.asarray(error), PROBLEM.stats.gram, RANK
    left = {}
    for rounds in (0, 10):
        factors = jax.jit(factor_coarsely, static_argnums=(2, 3, 4, 5))(*arguments, 3, 16, rounds)
        assert isinstance(factors, QuantizedLowRank) and factors.rank == RANK
        assert (factors.a.bits, factors.b.bits) == (3, 3)
        left[rounds] = energy(error - factors.dense())

    @partial(jax.jit, static_argnums=2)
    def reduce(error, gram, rank):
        a, b = reduce_rank(error, gram, rank)
        return a @ b, QuantizedLowRank.round(a, b, bits=3, group_size=16).dense()

    best, plain = reduce(*arguments)
    assert left[0] == pytest.approx(energy(error - plain), rel=1e-5)
    least = energy(error - best)
    assert least < left[10]
    assert left[10] - least < 0.6 * (left[0] - least)


@pytest.mark.parametrize("first", ["factors", "base"])
def test_a_factor_step_never_raises_the_error_and_the_best_pair_is_kept(first):
    step = caldera(quantizer=BASE, rank=RANK, iters=8, first=first, dtype="float32")
    leaf, (_, errors, won, _) = solve(step)
    assert errors[won] == errors.min()
    assert float(output_error(PROBLEM, leaf)) == pytest.approx(float(errors[won]), rel=1e-4)
    assert np.linalg.matrix_rank(leaf.corrections[0].dense()) == RANK
    before = energy(W - leaf.base.dense())
    after = energy(W - leaf.dense())
    assert after < before
    spectrum = np.linalg.svd(
        np.linalg.cholesky(GRAM.astype(np.float64)).T @ (W - leaf.base.dense()), compute_uv=False
    )
    assert after == pytest.approx(np.sum(spectrum[RANK:] ** 2), rel=1e-4)
    kept = [
        float(output_error(PROBLEM, solve(caldera(quantizer=BASE, rank=RANK, iters=iters,
                                                  first=first, dtype="float32"))[0]))
        for iters in (1, 3)
    ]  # fmt: skip
    assert kept[0] >= kept[1] * (1 - 1e-5) >= float(errors[won]) * (1 - 2e-5)


def test_one_turn_from_the_base_is_the_quantizer_and_then_qera():
    one, _ = solve(caldera(quantizer=BASE, rank=RANK, iters=1, first="base"))
    base, _ = solve(BASE)
    other, _ = solve(qera(rank=RANK), base)
    assert_same_but_last_places(one, other)


def test_factors_in_few_bits_take_turns_too():
    step = caldera(quantizer=BASE, rank=RANK, factor_bits=4, factor_group_size=GROUP, iters=4)
    leaf, (_, errors, won, _) = solve(step)
    (correction,) = leaf.corrections
    assert isinstance(correction, QuantizedLowRank) and correction.a.bits == 4
    assert float(output_error(PROBLEM, leaf)) == pytest.approx(float(errors[won]), rel=1e-4)
    bits = 4 * RANK * (64 + D_OUT) + 16 * RANK * (D_IN + D_OUT) // GROUP
    assert correction.stored_bits() == bits  # 48 inputs fill two runs of 32


def test_without_a_quantizer_the_base_stays():
    base, _ = solve(BASE)
    leaf, _ = solve(caldera(rank=RANK, factor_bits=4, factor_group_size=GROUP), base)
    np.testing.assert_array_equal(leaf.base.codes, base.base.codes)
    whole, _ = solve(caldera(rank=RANK), base)
    assert isinstance(whole.corrections[0], LowRank)
    left = [float(output_error(PROBLEM, leaf)) for leaf in (whole, leaf, base)]
    assert left[0] < left[1] < left[2]
    assert left[1] - left[0] < 0.1 * (left[2] - left[0])


@pytest.mark.parametrize(
    "arguments",
    [{"rank": 0}, {"factor_bits": 1}, {"factor_bits": 9}, {"factor_group_size": 0}, {"inner": -1},
     {"iters": 0}, {"first": "b"}, {"keep": "b"}, {"dtype": "b"}, {"quantizer": 3}],
)  # fmt: skip
def test_arguments_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(InputError, match=f"^caldera: {name}="):
        caldera(**arguments)
