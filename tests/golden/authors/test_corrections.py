"""Corrections of a base in closed form against their authors' code, on one base of 2 bits.

LQER and L2QER are ChengZhang-98/lqer@88b6960, QERA ChengZhang-98/QERA@bd7fc86, EoRA
NVlabs/EoRA@11ff6c0. `live` inputs are all seen; of `dead` ones one never is, and its row of a
product is left to chance by the authors' code. Products are compared, not their halves.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax
from lqec_jax.core.types import LinearStats
from tests.golden.authors.problems import (
    GROUP,
    RANK,
    Linear,
    codes_of,
    dequantize,
    distance,
    product,
    run,
    stored_product,
)

BASE = f"rtn(bits=2, group_size={GROUP}, scale_dtype='float32')"
FILES = {"lqer": "lqer", "l2qer": "lqer", "qera": "qera", "qera_approx": "qera", "eora": "eora"}


class Case(NamedTuple):
    """The base that all of them correct, and what is missing of the weight."""

    linear: Linear
    base: np.ndarray
    read: object

    def inputs(self, kind: str) -> np.ndarray:
        return self.linear.live if kind == "live" else self.linear.x

    def solve(self, method: str, kind: str = "live") -> np.ndarray:
        recipe = f"{BASE} | {method}(rank={RANK}, dtype='float32')"
        return product(lqec_jax.quantize(self.linear.w, recipe, x=self.inputs(kind)))

    def error(self, correction: np.ndarray, kind: str) -> float:
        """Returns the squared error of what the weight answers to its inputs."""
        missing = (self.linear.w - self.base).astype(np.float64) - correction
        return float(np.sum(np.square(self.inputs(kind).astype(np.float64) @ missing)))

    def weighed(self, correction: np.ndarray, weights: np.ndarray) -> float:
        missing = (self.linear.w - self.base).astype(np.float64) - correction
        return float(np.sum(np.square(weights[:, None] * missing)))


@pytest.fixture(scope="module")
def case(linear, golden):
    return Case(linear, dequantize(golden("qera"), "base"), golden)


@pytest.mark.parametrize("name", sorted(set(FILES.values())))
def test_rounding_gives_the_base_that_they_were_given(case, name):
    stored = case.read(name)
    base = lqec_jax.quantize(case.linear.w, BASE).base
    np.testing.assert_array_equal(codes_of(base), stored["base.codes"])
    np.testing.assert_allclose(base.dense(), dequantize(stored, "base"), atol=1e-6)


def test_lqer_is_theirs(case):
    assert distance(case.solve("lqer"), stored_product(case.read("lqer"), "lqer")) < 3e-5


@pytest.mark.parametrize("kind", ["live", "dead"])
def test_l2qer_is_theirs_where_it_is_given_their_scale(case, kind):
    key = f"l2qer.{kind}"
    stored = case.read("lqer")
    start = lqec_jax.quantize(case.linear.w, BASE)
    stats = LinearStats(absmean=jnp.asarray(stored[f"{key}.scale"]))
    leaf = run(f"l2qer(rank={RANK}, dtype='float32')", case.linear.w, stats, start)
    seen = case.inputs(kind).any(axis=0)
    assert distance(product(leaf)[seen], stored_product(stored, key)[seen]) < 1e-4


@pytest.mark.parametrize("kind", ["live", "dead"])
def test_l2qer_means_over_all_tokens_where_theirs_takes_the_largest_sequence(case, kind):
    key, stored = f"l2qer.{kind}", case.read("lqer")
    x = np.abs(case.inputs(kind).astype(np.float64))
    largest = x.reshape(case.linear.sequences, -1, x.shape[1]).mean(axis=1).max(axis=0)
    largest = np.maximum(largest, 1e-4)
    scale = largest / np.sqrt(largest.min() * largest.max())
    np.testing.assert_allclose(scale, stored[f"{key}.scale"], rtol=1e-6)
    ours, theirs = case.solve("l2qer", kind), stored_product(stored, key)
    live = x.any(axis=0)
    assert 0.05 < distance(ours[live], theirs[live]) < 0.1
    # Each is the better by its own weights, and ours by the answers, which both are a guess of.
    assert case.weighed(ours, x.mean(axis=0)) < case.weighed(theirs, x.mean(axis=0))
    assert case.weighed(theirs, scale) < case.weighed(ours, scale)
    assert case.error(ours, kind) < case.error(theirs, kind)


@pytest.mark.parametrize(("method", "key"), [("qera", "exact"), ("qera_approx", "approx")])
@pytest.mark.parametrize("kind", ["live", "dead"])
def test_qera_is_theirs(case, method, key, kind):
    stored = case.read("qera")
    ours, theirs = case.solve(method, kind), stored_product(stored, f"{key}.{kind}.f32")
    seen = case.inputs(kind).any(axis=0)
    assert distance(ours[seen], theirs[seen]) < 3e-4
    # The exact one is the least there is. The other guesses, and stands by what it weighs.
    assert case.error(ours, kind) == pytest.approx(case.error(theirs, kind), rel=1e-6)
    if kind == "live":
        # Their root is taken in float32: ours, which takes none, is nearer to it in float64.
        exact = stored_product(stored, f"{key}.live.f64")
        assert distance(ours, exact) < 3e-5
        assert distance(ours, exact) <= distance(theirs, exact) or key == "approx"


@pytest.mark.parametrize("kind", ["live", "dead"])
def test_eora_is_theirs_on_one_sample(case, kind):
    theirs = stored_product(case.read("eora"), f"{kind}.one")
    ours, seen = case.solve("eora", kind), case.inputs(kind).any(axis=0)
    assert distance(ours[seen], theirs[seen]) < 3e-4
    assert case.error(ours, kind) == pytest.approx(case.error(theirs, kind), rel=1e-6)


@pytest.mark.parametrize("kind", ["live", "dead"])
def test_eora_counts_all_sequences_alike_where_theirs_forgets_the_first(case, kind):
    theirs = stored_product(case.read("eora"), f"{kind}.seqs")
    ours, seen = case.solve("eora", kind), case.inputs(kind).any(axis=0)
    assert 0.04 < distance(ours[seen], theirs[seen]) < 0.1
    ratio = case.error(ours, kind) / case.error(theirs, kind)
    assert ratio == pytest.approx(0.995, abs=0.002)
