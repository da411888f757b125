"""Binary-coded quantization: uniform grids exactly, and a fit that every round improves."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers.bcq import bcq, fit_factors, quantize, recode
from lqec_jax.quantizers.rtn import quantize as round_to_nearest
from lqec_jax.recipe import parse_recipe
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from lqec_kernels.sparse import Masked

D_IN, D_OUT, GROUP = 64, 12, 16
W = np.random.RandomState(0).standard_normal((D_IN, D_OUT)).astype(np.float32)


@partial(jax.jit, static_argnames=("bits", "rounds", "shift", "starts"))
def run(w, bits, rounds=15, shift=False, starts=("greedy", "even")):
    base = quantize(w, bits, GROUP, starts=starts, rounds=rounds, shift=shift)
    return base, base.dense()


def by_group(dense) -> np.ndarray:
    return np.square(dense - W).reshape(-1, GROUP, D_OUT).sum(axis=1)


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, False), (3, True), (8, True)])
def test_a_uniform_grid_is_rewritten_exactly(bits, symmetric):
    @jax.jit
    def rewrite(w):
        uniform = round_to_nearest(w, GroupGrid(bits, GROUP, symmetric))
        planes = recode(uniform)
        return planes, planes.dense(), uniform.dense()

    planes, dense, wanted = rewrite(W)
    assert isinstance(planes, BitPlanes) and planes.bits == bits
    np.testing.assert_allclose(dense, wanted, atol=4e-7 * np.abs(W).max())
    # Each alpha is twice the one before it.
    np.testing.assert_array_equal(planes.alphas[1:], 2 * planes.alphas[:-1])


def test_float_zeros_and_one_scale_are_rewritten_too():
    codes = np.random.RandomState(1).randint(0, 8, (D_IN, D_OUT)).astype(np.uint8)
    zeros = jnp.full((4, D_OUT), 2.3, jnp.float16)
    floating = Affine.from_codes(codes, jnp.ones((4, D_OUT)), zeros, bits=3, group_size=GROUP)
    single = Affine.from_codes(codes, jnp.full((1, 1), 0.3), None, bits=3, group_size=D_IN)
    for base in (floating, single):
        np.testing.assert_allclose(recode(base).dense(), base.dense(), atol=2e-6)


def test_a_recipe_rewrites_the_base_of_the_step_before():
    rounding, rewriting = parse_recipe("rtn(bits=2, group_size=16) | bcq(init='base')").steps
    problem = LinearProblem(jnp.asarray(W), LinearStats(), jax.random.key(0))
    before = jax.jit(rounding.run)(problem, CompressedLinear(Dense(problem.w)))
    rewrite = jax.jit(rewriting.run)
    after = rewrite(problem, before)
    assert type(after.base) is BitPlanes
    np.testing.assert_allclose(after.dense(), before.dense(), atol=1e-6)
    assert repr(rewriting) == "bcq(init='base')"
    masked = CompressedLinear(jax.jit(Masked.from_mask)(before.base, W > 0))
    dense = np.asarray(rewrite(problem, masked).dense())
    np.testing.assert_allclose(dense, np.where(W > 0, before.dense(), 0), atol=1e-6)
    assert (dense[W <= 0] == 0).all()


def test_another_base_is_not_rewritten():
    problem = LinearProblem(jnp.asarray(W), LinearStats(), jax.random.key(0))
    with pytest.raises(
        InputError, match="bcq: init='base' rewrites a uniform base and found Dense"
    ):
        bcq(init="base").run(problem, CompressedLinear(Dense(problem.w)))


def test_one_plane_is_the_mean_magnitude():
    base, dense = run(W, 1)
    mean = np.abs(W).reshape(-1, GROUP, D_OUT).mean(axis=1)
    np.testing.assert_allclose(base.alphas[0], mean, rtol=1e-3)
    np.testing.assert_array_equal(np.sign(dense), np.sign(W))


def test_rounds_never_raise_the_error_of_a_group():
    errors = [by_group(run(W, 2, rounds)[1]) for rounds in (0, 1, 15)]
    for before, after in zip(errors, errors[1:], strict=False):
        assert (after <= before * (1 + 1e-6)).all()
    assert errors[2].sum() < 0.9 * errors[0].sum()


def test_two_starts_end_at_the_better_of_their_ends():
    ends = [by_group(run(W, 3, starts=(name,))[1]) for name in ("greedy", "even")]
    both = by_group(run(W, 3)[1])
    np.testing.assert_allclose(both, np.minimum(*ends), rtol=1e-4, atol=1e-6)
    assert both.sum() < 0.95 * ends[0].sum()


def test_a_shift_lowers_the_error_and_costs_what_an_alpha_does():
    plain, shifted = run(W, 2), run(W, 2, shift=True)
    assert by_group(shifted[1]).sum() < 0.95 * by_group(plain[1]).sum()
    bits = [CompressedLinear(base).bits_per_weight for base in (plain[0], shifted[0])]
    assert bits == [2 + 2 * 16 / GROUP, 2 + 3 * 16 / GROUP]


def test_every_weight_takes_the_nearest_sum():
    base, dense = run(W, 2, shift=True)
    alphas, shifts = np.asarray(base.alphas, np.float32), np.asarray(base.shifts, np.float32)
    nearest = np.full_like(W, np.inf)
    for signs in product((-1, 1), repeat=2):
        level = np.tensordot(np.float32(signs), alphas, 1) + shifts
        nearest = np.minimum(nearest, np.abs(np.repeat(level, GROUP, axis=0) - W))
    np.testing.assert_allclose(np.abs(dense - W), nearest, atol=1e-6)
    assert (alphas[0] >= alphas[1]).all() and (alphas >= 0).all()


def test_the_factors_are_the_least_squares_ones():
    codes = np.random.RandomState(2).randint(0, 8, (1, 40, 3)).astype(np.uint8)
    w = np.random.RandomState(3).standard_normal((1, 40, 3)).astype(np.float32)
    factors = np.asarray(fit_factors(jnp.asarray(w), jnp.asarray(codes), 3, shift=True))
    for column in range(3):
        planes = [np.where(codes[0, :, column] >> i & 1, 1, -1) for i in range(3)]
        design = np.stack([*planes, np.ones(40)], axis=1)
        wanted = np.linalg.lstsq(design, w[0, :, column], rcond=None)[0]
        np.testing.assert_allclose(factors[:, 0, 0, column], wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 5}, "bits=5; an integer from 1 to 4"),
        ({"init": "uniform"}, "init='uniform'; one of 'both', 'greedy', 'even', 'base'"),
        ({"rounds": -1}, "rounds=-1"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^bcq: ") as caught:
        bcq(**arguments)
    assert said in str(caught.value)
