"""Spectra of weight errors: exact for planted ones, and beside chance's."""

import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.analysis.spectra import capture_noise, choose_ranks, describe_error
from lqec_kernels.formats import CompressedLinear, Dense, LowRank

D_IN, D_OUT = 48, 32


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_planted_error_is_found():
    w, u, v = draw(D_IN, D_OUT), np.linalg.qr(draw(D_IN, 3, seed=1))[0], draw(D_OUT, 3, seed=2)
    error = u * [4.0, 2.0, 1.0] @ np.linalg.qr(v)[0].T
    row = describe_error("up", 2, jnp.asarray(w), CompressedLinear(Dense(jnp.asarray(w - error))))
    norm = np.linalg.norm(w)
    assert row["path"] == "blocks/2/up" and row["ranks"][:3] == [1, 2, 3]
    np.testing.assert_allclose(row["singular"][:3], np.array([4, 2, 1]) / norm, rtol=1e-4)
    np.testing.assert_allclose(row["captured"][:3], np.array([16, 20, 21]) / 21, rtol=1e-4)
    assert row["relative_error"] == pytest.approx(21 / norm**2, rel=1e-4)
    assert row["stable_rank"] == pytest.approx(21 / 16, rel=1e-4)
    assert (row["half"], row["most"]) == (1, 2)


def test_corrections_count():
    w, a, b = draw(D_IN, D_OUT), draw(D_IN, 2, seed=1), draw(2, D_OUT, seed=2)
    leaf = CompressedLinear(
        Dense(jnp.asarray(w - a @ b)), (LowRank(jnp.asarray(a), jnp.asarray(b)),)
    )
    assert describe_error("up", 0, jnp.asarray(w), leaf)["relative_error"] < 1e-10


def test_a_weight_without_error_or_of_zeros_is_no_trouble():
    w = jnp.asarray(draw(D_IN, D_OUT))
    exact = describe_error("up", 0, w, CompressedLinear(Dense(w)))
    assert exact["relative_error"] == 0.0 and exact["stable_rank"] == 0.0
    nothing = describe_error("up", 0, 0 * w, CompressedLinear(Dense(0 * w)))
    assert np.isfinite(nothing["singular"]).all() and nothing["relative_error"] == 0.0


@pytest.mark.parametrize("shape", [(400, 200), (300, 300), (100, 600)])
def test_chance_captures_what_the_law_says(shape):
    energy = np.cumsum(np.linalg.svd(draw(*shape), compute_uv=False) ** 2)
    ranks = [5, 20, 80]
    shares = energy[np.array(ranks) - 1] / energy[-1]
    np.testing.assert_allclose(capture_noise(*shape, ranks), shares, rtol=0.02)


def test_the_laws_own_figures():
    """Of a square matrix in the limit: shares 1/256, 1/64, 1/16 and 1/4 of the directions."""
    found = capture_noise(2048, 2048, [8, 32, 128, 512])
    np.testing.assert_allclose(found, [0.015, 0.058, 0.210, 0.623], atol=6e-4)


@pytest.mark.parametrize("largest", [1, 5, 16, 17, 100])
def test_ranks_rise_to_the_last(largest):
    ranks = choose_ranks(largest)
    assert ranks[0] == 1 and ranks[-1] == largest and ranks == sorted(set(ranks))
