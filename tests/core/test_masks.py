"""Masks have exactly as many zeros as they are to have, and keep the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.masks import keep_largest, keep_pattern, parse_sparsity
from lqec_jax.errors import InputError

RNG = np.random.default_rng(0)
SCORE = np.abs(RNG.standard_normal((48, 10))).astype(np.float32)
SCORES = {
    "any": SCORE,
    "few values": np.round(SCORE),
    "equal": np.full_like(SCORE, 0.25),
    "zero": np.zeros_like(SCORE),
    "tiny and huge": SCORE * 10.0 ** RNG.integers(-40, 38, SCORE.shape).astype(np.float32),
}
largest = jax.jit(keep_largest, static_argnums=1)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("zeros", [0, 1, 23, 47])
def test_the_largest_of_a_column_stay(name, zeros):
    score = SCORES[name]
    order = np.argsort(score, axis=0, kind="stable")  # of equal ones the lowest index goes first
    wanted = np.ones(score.shape, bool)
    np.put_along_axis(wanted, order[:zeros], False, axis=0)
    np.testing.assert_array_equal(largest(score, zeros), wanted)


def test_the_largest_of_all_stay():
    flat = SCORES["few values"].reshape(-1)
    wanted = np.ones(flat.size, bool)
    wanted[np.argsort(flat, kind="stable")[:200]] = False
    np.testing.assert_array_equal(largest(flat, 200), wanted)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (5, 6)])
def test_the_largest_of_every_few_stay(name, n, m):
    score = SCORES[name]
    runs = score.reshape(-1, m, score.shape[1])
    order = np.argsort(runs, axis=1, kind="stable")
    wanted = np.ones(runs.shape, bool)
    np.put_along_axis(wanted, order[:, : m - n], False, axis=1)
    came = np.asarray(jax.jit(keep_pattern, static_argnums=(1, 2))(jnp.asarray(score), n, m))
    np.testing.assert_array_equal(came, wanted.reshape(score.shape))
    assert (came.reshape(runs.shape).sum(1) == n).all()


def test_what_a_recipe_says():
    half = parse_sparsity("m", "2:4")
    assert (half.fraction, half.pattern, half.kept_of) == (0.5, "2:4", (2, 4))
    assert parse_sparsity("m", "1:4").fraction == 0.75
    assert parse_sparsity("m", 0.3).fraction == 0.3 and not parse_sparsity("m", 0.3).pattern


@pytest.mark.parametrize(
    "sparsity", ["4:2", "4:4", "0:4", "2-4", "", 0.0, 1.0, 2, True, None, -0.5]
)
def test_other_sparsities_are_refused(sparsity):
    with pytest.raises(InputError) as caught:
        parse_sparsity("wanda", sparsity)
    assert str(caught.value) == (
        f"wanda: sparsity={sparsity!r}; a fraction between 0 and 1, or n of m such as '2:4' was "
        "wanted"
    )


def test_a_pattern_that_does_not_divide_is_refused():
    parse_sparsity("wanda", "2:4").check("wanda", 8)
    parse_sparsity("wanda", 0.5).check("wanda", 7)
    with pytest.raises(InputError, match="wanda: d_in=6 is not divisible by 4, .*such as 0.5$"):
        parse_sparsity("wanda", "2:4").check("wanda", 6)
