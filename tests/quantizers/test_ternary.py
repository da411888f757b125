"""Ternary weights: a threshold, then the least squares of three levels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.quantizers.ternary import quantize, ternary
from lqec_kernels.formats import CompressedLinear

D_IN, D_OUT, GROUP = 64, 12, 32
W = np.random.RandomState(0).standard_normal((D_IN, D_OUT)).astype(np.float32)


@partial(jax.jit, static_argnames=("shift", "threshold"))
def run(w, shift=True, threshold=0.7):
    base = quantize(w, GROUP, shift=shift, threshold=threshold)
    return base, base.dense()


def trits_by_numpy(w: np.ndarray, threshold: float = 0.7) -> np.ndarray:
    delta = threshold * np.abs(w).reshape(-1, GROUP, D_OUT).mean(axis=1)
    return np.sign(w) * (np.abs(w) > np.repeat(delta, GROUP, axis=0))


@pytest.mark.parametrize("threshold", [0.7, 1.0])
def test_levels_are_the_least_squares_of_the_thresholded_signs(threshold):
    _, dense = run(W, threshold=threshold)
    trits = trits_by_numpy(W, threshold)
    for start in range(0, D_IN, GROUP):
        for column in range(D_OUT):
            t, w = trits[start : start + GROUP, column], W[start : start + GROUP, column]
            design = np.stack([t, np.ones(GROUP)], axis=1)
            wanted = design @ np.linalg.lstsq(design, w, rcond=None)[0]
            np.testing.assert_allclose(dense[start : start + GROUP, column], wanted, atol=2e-3)


def test_without_a_shift_it_is_the_plain_ternary_weight():
    base, dense = run(W, shift=False)
    trits = trits_by_numpy(W).reshape(-1, GROUP, D_OUT)
    size = np.abs(W).reshape(-1, GROUP, D_OUT)
    alpha = (size * np.abs(trits)).sum(1) / np.abs(trits).sum(1)
    wanted = (alpha[:, None] * trits).reshape(D_IN, D_OUT)
    np.testing.assert_allclose(dense, wanted, rtol=1e-3)
    assert base.shifts is None
    assert CompressedLinear(base).bits_per_weight == 2 + 16 / GROUP
    assert CompressedLinear(run(W)[0]).bits_per_weight == 2 + 32 / GROUP


def test_a_shift_is_never_farther_from_any_group():
    def by_group(dense):
        return np.square(dense - W).reshape(-1, GROUP, D_OUT).sum(axis=1)

    plain, shifted = by_group(run(W, shift=False)[1]), by_group(run(W)[1])
    assert (shifted <= plain * (1 + 1e-4)).all()
    assert shifted.sum() < 0.99 * plain.sum()


@pytest.mark.parametrize("shift", [True, False])
def test_two_planes_have_one_alpha_and_constants_are_kept(shift):
    w = W.copy()
    w[:GROUP, 0], w[GROUP:, 0], w[:, 1] = 0.5, -2.0, 0.0
    base, dense = run(w, shift=shift)
    assert base.bits == 2 and base.alphas.shape == (1, D_IN // GROUP, D_OUT)
    np.testing.assert_array_equal(dense[:, :2], w[:, :2])
    for start in range(0, D_IN, GROUP):
        assert max(len(np.unique(c)) for c in np.asarray(dense[start : start + GROUP]).T) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threshold": 3}, "threshold=3; a number from 0 to 2"),
        ({"group_size": 0}, "group_size=0; an integer >= 1"),
        ({"shift": 1}, "shift=1; one of True, False"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^ternary: ") as caught:
        ternary(**arguments)
    assert said in str(caught.value)


def test_a_group_that_does_not_divide_is_refused():
    from lqec_jax.core.types import LinearProblem, LinearStats
    from lqec_kernels.formats import Dense

    problem = LinearProblem(jnp.asarray(W), LinearStats(), jax.random.key(0))
    with pytest.raises(InputError, match="ternary: d_in=64 is not divisible by group_size=48"):
        ternary(group_size=48).run(problem, CompressedLinear(Dense(problem.w)))
