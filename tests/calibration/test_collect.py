"""Statistics of a linear's inputs against float64 numpy, over batches of unequal size."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.calibration.collect import STATISTICS, collect
from lqec_jax.core.types import LinearStats

FIELDS = {field.name for field in dataclasses.fields(LinearStats)}


def make_batches(dtype, d_in=12, seed=0):
    rng = np.random.default_rng(seed)
    channels = np.exp(rng.uniform(-6, 6, d_in))
    shapes = [(4, 7, d_in), (1, 3, d_in), (5, d_in)]
    return [jnp.asarray(rng.standard_normal(shape) * channels, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_is_over_the_tokens_of_all_batches(dtype):
    batches = make_batches(dtype)
    x = np.concatenate([np.asarray(b, np.float64).reshape(-1, b.shape[-1]) for b in batches])
    rms = collect(iter(batches), frozenset({"rms"})).rms
    assert rms.dtype == jnp.float32 and rms.shape == (12,)
    np.testing.assert_allclose(rms, np.sqrt(np.square(x).mean(axis=0)), rtol=1e-6)


def test_half_precision_inputs_are_summed_in_float32():
    # In float16 the square of 300 is Inf, and 2048 + 1 is 2048.
    large = collect([jnp.full((3, 2), 300, jnp.float16)], frozenset({"rms"})).rms
    np.testing.assert_array_equal(large, [300, 300])
    ones = [jnp.ones((tokens, 2), jnp.float16) for tokens in (2048, 1)]
    np.testing.assert_array_equal(collect(ones, frozenset({"rms"})).rms, [1, 1])


@pytest.mark.parametrize("needs", [frozenset(), *(frozenset({name}) for name in STATISTICS)])
def test_only_what_is_asked_for_is_set(needs):
    stats = collect(make_batches(jnp.float32), needs)
    assert {name for name in FIELDS if getattr(stats, name) is not None} == needs


def test_every_statistic_is_a_field():
    assert set(STATISTICS) == FIELDS
