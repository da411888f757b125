"""SparseGPT against IST-DASLab/sparsegpt@147d215 on one weight with a dead input.

That code prunes every weight whose score is at most the one in the middle, so one a block more than
half; ours prunes half.
"""

import numpy as np
import pytest

import lqec_jax
from lqec_jax.sparsifiers import sparsegpt
from tests.golden.authors.problems import dense, distance, read_mask

JOINT = "24_w4_bs128"
ONE_GRID = "sparsity='2:4', bits=4, group_size=None"
# What ours leaves of tr(Δᵀ H Δ), in units of what the authors' code leaves, pruning and rounding to
# 4 bits at once. Their one grid an output is that of the weights before; ours is fitted to what
# pruning alone would make of them, whose range is wider. On this weight that is worse, with the
# search too, and better only with grids that cost more bits; on six random weights the two were
# within 3 % of each other on average.
JOINTLY = {
    f"sparsegpt({ONE_GRID}, clip_search=False)": 1.146,
    f"sparsegpt({ONE_GRID})": 1.297,
    f"sparsegpt({ONE_GRID}, clip_search='output')": 1.132,
    "sparsegpt(sparsity='2:4', bits=4, group_size=32)": 0.982,
}


@pytest.fixture(scope="module")
def stored(golden):
    return golden("sparsegpt")


def prune(linear, sparsity: str):
    recipe = f"sparsegpt(sparsity={sparsity}, damp={linear.damping()})"
    leaf = lqec_jax.quantize(linear.silenced(), recipe, x=linear.x)
    return np.asarray(leaf.dense()), np.asarray(leaf.base.kept())


def test_a_pattern_keeps_what_theirs_keeps_and_makes_the_same_of_it(linear, stored):
    w_hat, keep = prune(linear, "'2:4'")
    same = (keep == read_mask(stored["24_bs128.keep"])).all(axis=0)
    assert np.sum(~same) <= 1  # a score on the other side, on another processor
    assert distance(w_hat[:, same], stored["24_bs128.w"][:, same]) < 1e-4


def test_half_is_pruned_and_not_one_more(linear, stored):
    w_hat, keep = prune(linear, "0.5")
    theirs = read_mask(stored["u50_bs128.keep"])
    assert np.sum(~keep) == keep.size // 2 == np.sum(~theirs) - 1
    same = (keep == theirs).all(axis=0)
    assert np.sum(~same) <= 2
    assert distance(w_hat[:, same], stored["u50_bs128.w"][:, same]) < 1e-4
    assert linear.error(w_hat) == pytest.approx(stored["u50_bs128.err"], rel=2e-3)


def test_inputs_that_compete_in_larger_blocks_lose_less(linear, stored):
    # Ours are 128 wherever they fit.
    assert linear.error(prune(linear, "0.5")[0]) < 0.55 * stored["u50_bs32.err"]


def test_a_dead_row_makes_no_difference_to_the_error(linear, stored):
    # Pruned by theirs before the sweep and by ours in it; the damping is another too.
    came = linear.error(dense("sparsegpt(sparsity='2:4')", linear.w, linear.x))
    assert came == pytest.approx(stored["24_bs128.err"], rel=2e-4)


@pytest.mark.parametrize("recipe", JOINTLY)
def test_pruning_and_rounding_at_once_differs_by_so_much(linear, stored, recipe):
    ratio = linear.error(dense(recipe, linear.w, linear.x)) / stored[f"{JOINT}.err"]
    assert ratio == pytest.approx(JOINTLY[recipe], rel=0.01)


def test_with_their_grid_pruning_and_rounding_at_once_is_theirs(linear, stored, monkeypatch):
    """So what the grid is fitted to is all the difference."""

    def fit_before(sweep, w, lower, sizes, known):
        scales, zeros = sweep.grid.fit(w[None])
        return known._replace(scales=scales[0], zeros=zeros[0])

    monkeypatch.setattr(sparsegpt._Sweep, "fit", fit_before)
    recipe = (
        f"sparsegpt({ONE_GRID}, clip_search=False, scale_dtype='float32', damp={linear.damping()})"
    )
    came, theirs = dense(recipe, linear.silenced(), linear.x), stored[f"{JOINT}.w"]
    differ = (np.abs(came - theirs) > 1e-4).any(axis=0)
    assert np.sum(differ) <= 1  # half way between two codes, on another processor
    assert distance(came[:, ~differ], theirs[:, ~differ]) < 1e-4


def test_what_is_stored_is_what_their_errors_are_of(linear, stored):
    for key in ("u50_bs128", "u50_bs32", "24_bs128", JOINT):
        assert linear.error(stored[f"{key}.w"]) == pytest.approx(stored[f"{key}.err"], rel=1e-5)
