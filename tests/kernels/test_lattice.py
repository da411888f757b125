"""E8P: 65,536 different points of a shifted lattice, the exact nearest one, its error."""

import zlib
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.lattice import decode_e8p, e8_ball, e8p_patterns, encode_e8p

encode, decode = jax.jit(encode_e8p), jax.jit(decode_e8p)


@cache
def every_point() -> np.ndarray:
    """Returns E8P, [65536, 8], in the order of the codes."""
    return np.asarray(decode(jnp.arange(2**16, dtype=jnp.uint16)[:, None]))[..., 0]


def test_the_patterns_are_the_short_ones_and_some_of_the_next():
    patterns = e8p_patterns()
    norms = np.sum(patterns**2, axis=1)
    assert len(np.unique(patterns, axis=0)) == 256
    assert np.isin(patterns, (0.5, 1.5, 2.5)).all()
    # One of norm 2, 8 of 4, 28 of 6, 56 + 8 of 8, ... and 29 of five 3/2 and three 1/2.
    assert [int((norms == n).sum()) for n in (2, 4, 6, 8, 10, 12)] == [1, 8, 28, 64, 126, 29]
    last = patterns[norms == 12]
    assert (np.sum(last == 0.5, axis=1) == 3).all() and (np.sum(last == 1.5, axis=1) == 5).all()
    assert np.ptp(np.sum(last == 0.5, axis=0)) <= 1


def test_every_code_is_a_point_of_its_own():
    points = every_point()
    assert len(np.unique(points, axis=0)) == 2**16
    for shift in (0.25, -0.25):
        inner = points[(0 if shift > 0 else 1) :: 2] - shift
        assert (np.abs(inner) % 1 == 0.5).all()  # halves
        assert (np.sum(inner, axis=1) % 2 == 0).all()  # with an even sum
    # The set is its own mirror image: -(σa + ¼) = (-σ)a - ¼, and eight signs keep the parity.
    assert {tuple(p) for p in points[:512].tolist()} == {tuple(-p) for p in points[:512]}


# Artifacts hold codes: other points would read them wrongly.
def test_codes_stay_what_they_are():
    assert zlib.crc32(every_point().astype("<f4").tobytes()) == 1447463484
    assert zlib.crc32(e8_ball().astype("<f4").tobytes()) == 333791178


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_the_nearest_point_is_that_of_a_search_over_all(spread):
    y = spread * np.random.default_rng(0).standard_normal((8, 200)).astype(np.float32)
    points = every_point().astype(np.float64)
    distance = np.sum(points**2, axis=1)[:, None] - 2 * points @ y  # less |y|²
    codes = np.asarray(encode(y))
    chosen = distance[codes, np.arange(y.shape[1])]
    np.testing.assert_allclose(chosen, distance.min(axis=0), atol=1e-5)
    assert (codes == distance.argmin(axis=0)).mean() > 0.98  # ties aside


def test_a_point_is_its_own_nearest():
    codes = np.random.default_rng(1).integers(0, 2**16, 2000)
    np.testing.assert_array_equal(encode(every_point()[codes].T), codes)


def test_the_error_of_normal_weights_is_the_tables():
    y = np.random.default_rng(2).standard_normal((8, 40000)).astype(np.float32)
    y /= np.sqrt(np.mean(y**2))
    scale = 1.03
    error = np.asarray(decode(encode(scale * y)[None]))[0] / scale - y
    assert np.mean(error**2) == pytest.approx(0.0909, rel=0.01)


def test_the_ball_of_e8_has_its_roots():
    points = e8_ball()
    norms = np.sum(points**2, axis=1)
    assert len(np.unique(points, axis=0)) == 256
    assert [int((norms == n).sum()) for n in (0, 2, 4)] == [1, 240, 15]
    # Points of E8 have integer products with one another.
    products = points @ points.T
    np.testing.assert_array_equal(products, np.round(products))
