"""E8P against Cornell-RelaxML/quip-sharp@1d8f873: what any choice of its last patterns shares.

Numbers stand here as they were read off that code's tables, so that this runs without ../shared;
the file there has the same, and the distances of 200 vectors beside.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.quantizers.e8p import STAGES, round_to_lattice
from lqec_kernels.lattice import decode_e8p, e8p_patterns

NORMS = {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
COLUMN_SUMS = [231, 232, 232, 233, 234, 234, 234, 235]
POINT_NORMS = {
    0.5: 2, 1.5: 56, 2.5: 252, 3.5: 688, 4.5: 1514, 5.5: 2664, 6.5: 4396, 7.5: 7056, 8.5: 9330,
    9.5: 9980, 10.5: 11062, 11.5: 7860, 12.5: 5892, 13.5: 3252, 14.5: 1010, 15.5: 348, 16.5: 174,
}  # fmt: skip
MEAN_NORM, LARGEST = 9.5703125, 2.75
SEED, COUNT = 31, 40000
# Mean squared error a coordinate of normal numbers, by how many lattice units are one of theirs.
ERRORS = {0.90: 0.09908351, 1.00: 0.09198062, 1.03: 0.09150808, 1.10: 0.09291854}


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    codes = jnp.arange(2**16, dtype=jnp.uint32)[None]
    return np.asarray(decode_e8p(codes))[0]  # [8, 65536]


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return np.random.default_rng(SEED).standard_normal((COUNT, 8)).astype(np.float32).T


def test_patterns_have_their_norms_and_sums():
    patterns = e8p_patterns()
    norms, counts = np.unique(np.sum(np.square(patterns), axis=1), return_counts=True)
    assert dict(zip(norms, counts, strict=True)) == NORMS
    assert len(np.unique(patterns, axis=0)) == 256
    assert np.sum(patterns.sum(axis=1) % 2 == 1) == 149
    assert patterns.sum() == 1865
    # Ours of the last norm are chosen so that no coordinate is larger than another by much.
    sums = patterns.sum(axis=0)
    assert np.ptp(sums) <= np.ptp(COLUMN_SUMS) and sums.sum() == sum(COLUMN_SUMS)


def test_points_have_their_norms(points):
    norms, counts = np.unique(np.sum(np.square(points), axis=0), return_counts=True)
    theirs = np.array([POINT_NORMS[norm] for norm in norms])
    assert list(norms) == list(POINT_NORMS)
    # The signs of a pattern decide its points' norms, and the last 29 patterns are of one kind.
    np.testing.assert_array_equal(counts, theirs)
    assert len(np.unique(points, axis=1).T) == 2**16
    assert np.mean(np.sum(np.square(points), axis=0)) == MEAN_NORM
    assert np.abs(points).max() == LARGEST
    np.testing.assert_allclose(points.mean(axis=1), 0, atol=1e-7)


@jax.jit
def place(y: jax.Array) -> jax.Array:
    return round_to_lattice(y, 2)[0]


@pytest.mark.parametrize("scale", ERRORS)
def test_normal_numbers_have_their_error(normal, scale):
    error = np.mean(np.square(np.asarray(place(normal * np.float32(scale))) / scale - normal))
    assert error == pytest.approx(ERRORS[scale], rel=2e-3)


def test_our_scale_is_theirs():
    assert STAGES[2][0] == 1.03


def test_the_file_says_the_same_and_its_vectors_are_as_far(golden, normal):
    stored = golden("e8p_invariants")
    assert dict(zip(stored["full.sqnorm_values"], stored["full.sqnorm_counts"],
                    strict=True)) == POINT_NORMS  # fmt: skip
    for scale, error in ERRORS.items():
        assert stored[f"gauss.mse_scale_{scale:.2f}"] == pytest.approx(error, abs=1e-8)
    first = normal[:, :200] * np.float32(1.03)
    ours = np.sum(np.square(np.asarray(place(first)) - first), axis=0)
    theirs = stored["gauss.first200_sqdist_scale_1.03"]
    # A vector that is nearest to one of the 29 patterns, theirs or ours, is as near to no other.
    same = np.abs(ours - theirs) < 1e-4
    assert same.mean() > 0.9
    assert ours.sum() == pytest.approx(theirs.sum(), rel=0.02)
