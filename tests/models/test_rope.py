"""Rotary embedding: each extension's own law, and transformers' frequencies."""

import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.models import rope
from lqec_jax.models.config import Rope
from lqec_jax.models.families import read_config

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama_ropes.json").read_text())
LLAMA3 = Rope("llama3", 500000.0, 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = Rope("yarn", 10000.0, 16.0, 4096)


def frequencies(config: Rope, head_dim: int = 128, length: int = 32) -> np.ndarray:
    return rope.inverse_frequencies(config, head_dim, length)[0]


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_transformers(name):
    golden = GOLDEN[name]
    config = read_config(golden["config"])
    frequency, scale = rope.inverse_frequencies(config.rope, config.head_dim, golden["length"])
    assert frequency.dtype == np.float32
    # transformers raises theta to a float32 power; ours is rounded once, at the end.
    np.testing.assert_allclose(frequency, golden["inverse_frequencies"], rtol=2e-6)
    assert scale == pytest.approx(golden["attention_scale"], rel=1e-12)


def test_default_is_the_geometric_series():
    np.testing.assert_allclose(
        frequencies(Rope(theta=100.0), head_dim=8), [1, 100**-0.25, 0.1, 100**-0.75], rtol=1e-7
    )


def test_dot_product_depends_on_distance_only():
    draw = np.random.RandomState(0)
    q, k = (jnp.asarray(draw.standard_normal((1, 1, 2, 16)), jnp.float32) for _ in range(2))
    frequency = frequencies(Rope(theta=100.0), head_dim=16)

    def score(at_q: int, at_k: int) -> np.ndarray:
        turned_q = rope.rotate(q, jnp.array([at_q]), frequency)
        turned_k = rope.rotate(k, jnp.array([at_k]), frequency)
        return np.asarray(jnp.sum(turned_q * turned_k, axis=-1))

    np.testing.assert_allclose(score(9, 4), score(105, 100), atol=1e-4)
    assert np.abs(score(9, 4) - score(4, 9)).max() > 0.1
    assert np.abs(score(9, 4) - score(9, 5)).max() > 0.1


def test_pairs_are_the_halves_of_a_head():
    x = jnp.zeros((1, 1, 1, 8)).at[..., 1].set(1.0)
    turned = rope.rotate(x, jnp.array([3]), np.array([0.0, 0.5, 0.0, 0.0], np.float32), 2.0)
    expected = np.zeros(8)
    expected[1], expected[5] = 2 * math.cos(1.5), 2 * math.sin(1.5)
    np.testing.assert_allclose(turned[0, 0, 0], expected, atol=1e-6)


def test_rotate_equals_turn_with_the_tables():
    x = jnp.asarray(np.random.RandomState(1).standard_normal((2, 5, 3, 16)), jnp.float32)
    cos, sin = rope.tables(YARN, 16, 12)
    assert cos.shape == sin.shape == (12, 8) and cos.dtype == jnp.float32
    frequency, scale = rope.inverse_frequencies(YARN, 16, 12)
    offsets = jnp.array([[0], [7]]) + jnp.arange(5)
    turned = rope.rotate(x, offsets, frequency, scale)
    np.testing.assert_allclose(turned[0], rope.turn(x, cos[:5], sin[:5])[0], atol=1e-6)
    np.testing.assert_allclose(turned[1], rope.turn(x, cos[7:], sin[7:])[1], atol=1e-6)


def test_half_precision_input_is_turned_in_float32():
    x = jnp.asarray(np.random.RandomState(2).standard_normal((1, 4, 2, 16)), jnp.bfloat16)
    positions = jnp.arange(1000, 1004)
    frequency = frequencies(Rope(), head_dim=16)
    turned = rope.rotate(x, positions, frequency)
    assert turned.dtype == jnp.bfloat16
    exact = rope.rotate(x.astype(jnp.float32), positions, frequency)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_linear_is_default_at_positions_over_factor():
    cos, sin = rope.tables(Rope("linear", factor=4.0), 16, 33)
    plain_cos, plain_sin = rope.tables(Rope(), 16, 9)
    np.testing.assert_allclose(cos[::4], plain_cos, atol=1e-6)
    np.testing.assert_allclose(sin[::4], plain_sin, atol=1e-6)


def test_dynamic_leaves_the_original_context_and_slows_beyond_it():
    dynamic = Rope("dynamic", factor=2.0, original_length=64)
    plain = frequencies(Rope(), head_dim=16)
    for length in (1, 63, 64):
        np.testing.assert_array_equal(frequencies(dynamic, 16, length), plain)
    longer, longest = frequencies(dynamic, 16, 96), frequencies(dynamic, 16, 128)
    assert longer[0] == longest[0] == 1.0
    assert (longest[1:] < longer[1:]).all() and (longer[1:] < plain[1:]).all()
    # The exponent d / (d - 2) makes the slowest pair interpolate by exactly the growth.
    np.testing.assert_allclose(plain[-1] / longer[-1], 2 * 96 / 64 - 1, rtol=1e-6)


def test_llama3_keeps_fast_pairs_and_divides_slow_ones():
    plain = frequencies(Rope(theta=500000.0))
    scaled = frequencies(LLAMA3)
    turns = 8192 * plain / (2 * math.pi)
    fast, slow = turns > 4, turns < 1
    between = ~fast & ~slow
    assert fast.sum() > 5 and slow.sum() > 5 and between.sum() > 2
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
    assert (np.diff(scaled) < 0).all()


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    plain, scaled = frequencies(Rope()), frequencies(YARN)
    turns = 4096 * plain / (2 * math.pi)
    # Truncation widens the ramp by less than one pair on either side.
    fast, slow = np.flatnonzero(turns > 32)[:-1], np.flatnonzero(turns < 1)[1:]
    assert len(fast) > 5 and len(slow) > 5
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 16, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


def test_yarn_without_a_ramp_is_a_step():
    plain = frequencies(Rope(), head_dim=16)
    # A pair of index 2.5, between the third and the fourth, would turn this often in 1,000 tokens.
    turns = 10000 ** (-2.5 / 8) * 1000 / (2 * math.pi)
    step = Rope("yarn", 10000.0, 4.0, 1000, beta_fast=turns, beta_slow=turns, truncate=False)
    frequency = frequencies(step, head_dim=16)
    np.testing.assert_allclose(frequency[:3], plain[:3], rtol=1e-6)
    np.testing.assert_allclose(frequency[3:], plain[3:] / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 0.1 * math.log(16) + 1),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.3}, 1.3),
        ({"mscale": 0.7}, 0.1 * math.log(16) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        (
            {"mscale": 1.0, "mscale_all_dim": 0.5},
            (0.1 * math.log(16) + 1) / (0.05 * math.log(16) + 1),
        ),
        ({"attention_factor": 1.3, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.3),
    ],
)
def test_yarn_attention_scale(changes, scale):
    yarn = Rope(**{"kind": "yarn", "factor": 16.0, "original_length": 4096, **changes})
    assert rope.inverse_frequencies(yarn, 128, 32)[1] == pytest.approx(scale, rel=1e-12)
    cos, _ = rope.tables(yarn, 128, 1)
    np.testing.assert_allclose(cos, np.full((1, 64), scale), rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        Rope("linear", factor=1.0),
        Rope("llama3", factor=1.0, original_length=8192),
        Rope("yarn", factor=1.0, original_length=4096),
        Rope("dynamic", factor=1.0, original_length=4096),
    ],
    ids=lambda config: config.kind,
)
def test_factor_one_changes_nothing(config):
    np.testing.assert_allclose(frequencies(config), frequencies(Rope()), rtol=1e-7)


@pytest.mark.parametrize("config", [Rope("linear", factor=4.0), LLAMA3, YARN], ids=lambda c: c.kind)
def test_only_dynamic_depends_on_length(config):
    short, long = frequencies(config, length=4), frequencies(config, length=100000)
    np.testing.assert_array_equal(short, long)
