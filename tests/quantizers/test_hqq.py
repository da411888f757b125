"""Half-quadratic quantization: real zeros that lower the mean absolute error of every group."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers import hqq as module
from lqec_jax.quantizers import rtn
from lqec_jax.quantizers.hqq import Solver, hqq, quantize
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.packing import unpack

# N(0, 1) in groups of 64: mean |w - ŵ| before and after, and mean square after.
REFERENCE = {
    2: (0.3810, 0.3657, 0.1888),
    3: (0.1624, 0.1542, 0.03339),
    4: (0.0757, 0.0728, 0.00737),
}
D_IN, D_OUT, GROUP = 96, 32, 32


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@partial(jax.jit, static_argnames=("bits", "group_size", "options"))
def run(w, bits=2, group_size=GROUP, options=()):
    options = dict(options)
    round_zero = options.pop("round_zero", False)
    base = quantize(w, bits, group_size, Solver(**options), round_zero=round_zero)
    return base, base.dense()


def by_group(error: np.ndarray, group_size: int) -> np.ndarray:
    """Returns the mean absolute error of each group, [groups, d_out]."""
    return np.abs(error).reshape(-1, group_size, error.shape[1]).mean(axis=1)


@pytest.mark.parametrize("bits", REFERENCE)
def test_gaussian_groups(bits):
    w = draw(64 * 40, 400)
    first, last, square = REFERENCE[bits]
    start = run(w, bits, 64, (("rounds", 0),))[1] - w
    error = run(w, bits, 64)[1] - w
    assert np.abs(start).mean() == pytest.approx(first, rel=0.01)
    assert np.abs(error).mean() == pytest.approx(last, rel=0.01)
    assert np.mean(np.square(error)) == pytest.approx(square, rel=0.01)
    assert (by_group(error, 64) <= by_group(start, 64) * (1 + 1e-5)).all()


def test_a_start_from_integer_zeros_is_rounding_and_lifts_heavy_tails():
    w = draw(D_IN, D_OUT) ** 3
    starts, ends = {}, {}
    for round_zero in (False, True):
        options = (("round_zero", round_zero),)
        starts[round_zero] = run(w, 3, GROUP, (*options, ("rounds", 0)))[1]
        ends[round_zero] = by_group(run(w, 3, GROUP, options)[1] - w, GROUP)
        assert (ends[round_zero] <= by_group(starts[round_zero] - w, GROUP) * (1 + 1e-5)).all()
    rounded = jax.jit(lambda w: rtn.quantize(w, GroupGrid(3, GROUP)).dense())(w)
    np.testing.assert_allclose(starts[True], rounded, atol=1e-6)
    assert ends[True].mean() < ends[False].mean()


def test_codes_are_the_nearest_of_the_stored_grid():
    w = draw(D_IN, D_OUT)
    base, dense = run(w)
    assert base.zeros.dtype == base.scales.dtype == jnp.float16
    codes = np.asarray(unpack(base.codes, 2, D_IN), np.float32)
    scales, zeros = (
        np.repeat(np.asarray(a, np.float32), GROUP, axis=0) for a in (base.scales, base.zeros)
    )
    np.testing.assert_allclose(dense, scales * (codes - zeros), atol=1e-6)
    for code in range(4):
        assert (np.abs(dense - w) <= np.abs(scales * (code - zeros) - w) + 1e-6).all()
    assert (zeros % 1 != 0).mean() > 0.9


def test_a_power_of_one_is_the_soft_threshold():
    x = jnp.asarray([-2.0, -0.3, 0.0, 0.1, 0.3, 5.0])
    wanted = np.sign(x) * np.maximum(np.abs(x) - 0.25, 0)
    np.testing.assert_allclose(module.shrink(x, 4.0, 1.0), wanted, rtol=1e-6)


def test_a_smaller_power_spares_large_errors():
    x = np.asarray([-2.0, 0.0, 0.1, 1.0], np.float32)
    wanted = [-2.0 + 2.0**-0.3 / 10, 0.0, 0.0, 0.9]
    np.testing.assert_allclose(module.shrink(x, 10.0, 0.7), wanted, rtol=1e-6)


def test_the_zeros_are_the_least_squares_ones():
    codes = np.random.RandomState(0).randint(0, 4, (2, 16, 3)).astype(np.float32)
    target, scales = draw(2, 16, 3), 0.5 + np.abs(draw(2, 1, 3, seed=1))
    zeros = np.asarray(module.fit_zeros(target, codes, jnp.asarray(scales)), np.float64)

    def error(zeros):
        return np.square(target - scales * (codes - zeros)).sum(axis=1)

    # The minimum of a parabola: both sides are higher, and by the same.
    left, middle, right = (error(zeros + move) for move in (-0.01, 0, 0.01))
    assert (left > middle).all() and (right > middle).all()
    np.testing.assert_allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize("level", [0.3, -1e-5, 700.0])
def test_a_constant_group_is_kept(level):
    _, dense = run(np.full((D_IN, D_OUT), level, np.float32))
    np.testing.assert_allclose(dense, level, rtol=2**-10)


def test_one_signed_groups_use_all_their_levels():
    w = 5 + draw(D_IN, D_OUT)
    base, dense = run(w)
    assert set(np.unique(unpack(base.codes, 2, D_IN))) == {0, 1, 2, 3}
    np.testing.assert_allclose(
        np.abs(dense - w).mean(), np.abs(run(w - 5)[1] - (w - 5)).mean(), rtol=0.05
    )


def test_a_step_reports_what_it_lowers_and_stores_what_it_counts():
    w = jnp.asarray(draw(D_IN, D_OUT))
    step = hqq(bits=3, group_size=GROUP)
    problem, start = LinearProblem(w, LinearStats(), jax.random.key(0)), CompressedLinear(Dense(w))
    leaf = jax.jit(step.run)(problem, start)
    error = np.abs(leaf.dense() - w).sum() / np.abs(w).sum()
    assert step.objective(problem, leaf) == pytest.approx(float(error), rel=1e-5)
    assert step.needs == set()
    assert leaf.bits_per_weight == 3 + 32 / GROUP
    assert repr(step).startswith("hqq(bits=3, group_size=32, p=0.7, beta=10.0, rounds=20")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 0}, "bits=0; an integer from 1 to 8"),
        ({"p": 0}, "p=0; a number from 0.1 to 1"),
        ({"beta": -1}, "beta=-1; a number >= 0.001"),
        ({"rounds": -1}, "rounds=-1"),
        ({"round_zero": 1}, "round_zero=1; one of True, False"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^hqq: ") as caught:
        hqq(**arguments)
    assert said in str(caught.value)
