"""NormalFloat: each weight to the nearest of its group's levels, and the field's numbers."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers.nf import nf, quantize
from lqec_kernels.codebook import DoubleScales
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.tables import find_points

D_IN, D_OUT, GROUP = 96, 64, 32


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@partial(jax.jit, static_argnames=("bits", "group_size", "double", "dtype"))
def rounded(w, bits, group_size, double=False, dtype=jnp.float32):
    base = quantize(w, bits, group_size, double=double, dtype=dtype)
    return base, base.dense()


@lru_cache
def gaussian(bits: int, double: bool = False, dtype=jnp.float16):
    w = draw(D_IN, D_OUT)
    return w, *rounded(w, bits, GROUP, double, dtype)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("double", [False, True])
def test_every_weight_goes_to_the_nearest_level_of_its_stored_scale(bits, double):
    w, base, dense = gaussian(bits, double)
    scales = np.repeat(np.asarray(base.columns()[1], np.float32), GROUP, axis=0)
    levels = find_points(f"nf{bits}")[:, 0]
    wanted = np.abs(scales[..., None] * levels - w[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(dense - w), wanted, atol=1e-6)
    # Half the widest gap: at 2 bits that is between -1 and 0.
    assert (np.abs(dense - w) <= scales * np.diff(levels).max() / 2 * 1.01).all()


def test_the_largest_of_a_group_is_kept_and_so_is_zero():
    w, base, dense = gaussian(4, dtype=jnp.float32)
    grouped, kept = w.reshape(-1, GROUP, D_OUT), np.asarray(dense).reshape(-1, GROUP, D_OUT)
    place = np.abs(grouped).argmax(axis=1)[:, None]
    for array in (grouped, kept):
        assert array.shape == (3, GROUP, D_OUT)
    np.testing.assert_allclose(np.take_along_axis(kept, place, 1),
                               np.take_along_axis(grouped, place, 1), rtol=1e-6)  # fmt: skip
    sparse = w * (draw(D_IN, D_OUT, seed=1) > 0)
    np.testing.assert_array_equal(np.asarray(rounded(sparse, 4, GROUP)[1])[sparse == 0], 0)


def test_at_two_bits_the_mean_is_shifted():
    # Weights in (-1/2, 0) go to zero, those in (0.17, 0.67) to 0.34: the mean rises.
    w = draw(64, 4000)
    shift = {bits: float(np.mean(rounded(w, bits, 64)[1] - w)) for bits in (2, 4)}
    assert 0.05 < shift[2] < 0.5 and abs(shift[4]) < 0.01


def test_bits_are_exact():
    _, half, _ = gaussian(3)
    _, single, _ = gaussian(3, dtype=jnp.float32)
    _, twice, _ = gaussian(3, double=True)
    count = D_IN * D_OUT
    assert half.stored_bits() == 3 * count + 16 * count // GROUP
    assert single.stored_bits() == 3 * count + 32 * count // GROUP
    # 192 scales make one block.
    assert twice.stored_bits() == 3 * count + 8 * count // GROUP + 32 + 32
    assert isinstance(twice.scales, DoubleScales)


def test_double_quantization_costs_little():
    (w, half, plain), (_, twice, dense) = gaussian(4), gaussian(4, double=True)
    scales = np.asarray(half.scales, np.float32)
    assert np.abs(np.asarray(twice.columns()[1]) / scales - 1).max() < 0.01
    lost, before = (np.mean(np.square(d - w)) for d in (dense, plain))
    assert lost < 1.02 * before


def test_rounding_twice_is_rounding_once():
    _, _, once = gaussian(3, dtype=jnp.float32)
    np.testing.assert_allclose(rounded(once, 3, GROUP)[1], once, atol=1e-6)


def test_the_step_is_the_function_and_keeps_the_rest():
    w, base, _ = gaussian(2)
    problem = LinearProblem(jnp.asarray(w), LinearStats(), jax.random.key(0))
    step = nf(bits=2, group_size=GROUP)
    leaf = jax.jit(step.run)(problem, CompressedLinear(Dense(problem.w)))
    np.testing.assert_array_equal(leaf.base.codes, base.codes)
    assert step.needs == set()
    error = np.sum(np.square(leaf.dense() - w)) / np.sum(w**2)
    assert step.objective(problem, leaf) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 1}, "bits=1; an integer from 2 to 4"),
        ({"bits": 8}, "bits=8"),
        ({"group_size": 0}, "group_size=0; an integer >= 1"),
        ({"double": 1}, "double=1; one of True, False"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype='bfloat16'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^nf: ") as caught:
        nf(**arguments)
    assert said in str(caught.value)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="nf: d_in=96 is not divisible by group_size=64"):
        quantize(jnp.zeros((96, 4)), 4, 64)
