"""Tables: the field's constants, the least error for normal weights, nearest points."""

from functools import lru_cache
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.tables import POINTS, find_points, find_table

SCALAR = [name for name in POINTS if find_points(name).shape[1] == 1]
VECTOR = [name for name in POINTS if find_points(name).shape[1] > 1]
# Squared error of N(0, 1) weights: Lloyd-Max's, and pairs' as HIGGS ships them.
DISTORTION = {
    "gauss1": 0.363380, "gauss2": 0.117482, "gauss3": 0.034548, "gauss4": 0.009501,
    "gauss2_p2": 0.10745, "gauss3_p2": 0.02960, "gauss4_p2": 0.00775,
}  # fmt: skip


@lru_cache
def round_trip(name: str):
    """Returns the compiled points -> (codes, nearest points)."""
    table = find_table(name)

    @jax.jit
    def run(points):
        codes = table.encode(points)
        return codes, table.decode(codes)

    return run


def test_normal_float_is_qloras():
    nf2, nf3, nf4 = (find_points(f"nf{bits}")[:, 0] for bits in (2, 3, 4))
    np.testing.assert_allclose(nf2, [-1, 0, 0.33791519, 1], atol=5e-8)
    wanted = [-1, -0.47862916, -0.21714182, 0, 0.16093017, 0.33791519, 0.56261697, 1]
    np.testing.assert_allclose(nf3, wanted, atol=5e-8)
    assert nf4.dtype == np.float32 and nf4[1] == np.float32(-0.6961928009986877)
    # By its definition: quantiles at even steps of probability.
    above = [NormalDist().inv_cdf(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    np.testing.assert_allclose(nf4[8:], np.sort(above) / max(above), atol=2e-7)


def test_the_dynamic_map_has_256_levels_in_seven_decades():
    levels = find_points("dynamic")[:, 0]
    assert len(np.unique(levels)) == 256 and {0.0, 1.0} <= set(levels.tolist())
    below = levels[levels < 0]
    np.testing.assert_array_equal(-below[::-1], levels[(levels > 0) & (levels < 1)])
    counts, _ = np.histogram(levels[levels < 1], bins=10.0 ** np.arange(-7, 1))
    assert counts.tolist() == [2**i for i in range(7)]


@pytest.mark.parametrize("name", DISTORTION)
def test_gaussian_grids_have_the_least_error(name):
    points, bits = find_points(name).astype(np.float64), int(name[5])
    assert len(points) == 2 ** (bits * points.shape[1])
    if points.shape[1] == 1:
        levels, normal = points[:, 0], NormalDist()
        middles = (levels[1:] + levels[:-1]) / 2
        mass = np.diff([0, *map(normal.cdf, middles), 1])
        density = np.array([0, *map(normal.pdf, middles), 0])
        # Every level is the mean of what goes to it, so the error is what the levels lack.
        np.testing.assert_allclose(-np.diff(density) / mass, levels, atol=1e-6)
        error = 1 - np.sum(mass * levels**2)
    else:
        y = np.random.default_rng(0).standard_normal((250, 2, 1000)).astype(np.float32)
        error = np.mean((np.asarray(round_trip(name)(y)[1]) - y) ** 2) / np.mean(y**2)
    assert error == pytest.approx(DISTORTION[name], rel=0.01)


@pytest.mark.parametrize("name", SCALAR)
def test_a_number_goes_to_the_nearest_level_and_a_tie_to_the_lower(name):
    levels = find_points(name)[:, 0]
    y = np.linspace(-1.3, 1.3, 999, dtype=np.float32).reshape(1, 1, -1)
    codes, nearest = round_trip(name)(y)
    wanted = np.abs(levels[:, None] - y[0]).min(axis=0)
    np.testing.assert_allclose(np.abs(nearest - y)[0, 0], wanted, atol=1e-6)
    assert codes.dtype == jnp.uint32 and find_table(name).bits == np.log2(len(levels))
    ties = ((levels[1:] + levels[:-1]) / 2).reshape(1, 1, -1)
    np.testing.assert_array_equal(round_trip(name)(ties)[0][0], np.arange(len(levels) - 1))
    np.testing.assert_array_equal(round_trip(name)(levels.reshape(1, 1, -1))[1][0, 0], levels)


@pytest.mark.parametrize("name", VECTOR)
def test_a_vector_goes_to_the_nearest_point(name):
    points = find_points(name)
    count, dim = points.shape
    y = np.random.default_rng(1).standard_normal((3, dim, 50)).astype(np.float32)
    _, nearest = round_trip(name)(y)
    distance = np.sum((points[:, None, :, None] - y) ** 2, axis=2)  # [codes, n, m]
    np.testing.assert_allclose(np.sum((nearest - y) ** 2, axis=1), distance.min(axis=0), atol=1e-4)
    codes, back = round_trip(name)(points.T[None])
    np.testing.assert_array_equal(codes[0], np.arange(count))
    np.testing.assert_array_equal(back[0], points.T)


def test_codes_may_have_leading_axes():
    table = find_table("gauss2_p2")
    codes = np.random.default_rng(2).integers(0, 16, (2, 3, 5, 4)).astype(np.uint8)
    points = jax.jit(table.decode)(codes)
    assert points.shape == (2, 3, 5, 2, 4)
    np.testing.assert_array_equal(np.moveaxis(points, -2, -1), find_points("gauss2_p2")[codes])
    np.testing.assert_array_equal(jax.jit(table.encode)(points), codes)


def test_an_unknown_table_names_the_known():
    with pytest.raises(ValueError, match="no table 'nf5'; there are .*e8p, gauss1.*nf4"):
        find_table("nf5")
