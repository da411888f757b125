"""Wanda against locuslab/wanda@8e8fc87 on one weight with a dead input: the same masks."""

import numpy as np
import pytest

import lqec_jax
from tests.golden.authors.problems import read_mask

SPARSITY = {"u50": "0.5", "24": "'2:4'", "48": "'4:8'"}


@pytest.mark.parametrize("key", SPARSITY)
def test_masks_are_theirs(linear, golden, key):
    recipe = f"wanda(sparsity={SPARSITY[key]})"
    leaf = lqec_jax.quantize(linear.w, recipe, x=linear.x)
    keep = read_mask(golden("wanda")[f"{key}.keep"])
    np.testing.assert_array_equal(leaf.base.kept(), keep)
    np.testing.assert_array_equal(leaf.dense(), np.where(keep, linear.w, 0))


def test_their_scores_are_ours_but_for_what_a_mean_is_of(linear, golden):
    # Sums of squares a sequence there; an order within an output is the same.
    theirs = golden("wanda")["scaler_row"]
    sums = np.sum(np.square(linear.x.astype(np.float64)), axis=0)
    np.testing.assert_allclose(sums / linear.sequences, theirs, rtol=1e-6)
    assert theirs[linear.dead] == 0
