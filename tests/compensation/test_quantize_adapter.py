"""Rounded adapters: what is rounded, what is kept, and how little is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from lqec_kernels.outliers import Outliers

D_IN, D_OUT, RANK = 96, 64, 4
RNG = np.random.default_rng(0)


def draw(*shape: int) -> jnp.ndarray:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


PROBLEM = LinearProblem(draw(D_IN, D_OUT), LinearStats(), jax.random.key(0))


def run(leaf: CompressedLinear, arguments: str = "") -> CompressedLinear:
    (step,) = parse_recipe(f"quantize_adapter({arguments})").steps
    return jax.jit(step.run)(PROBLEM, leaf)


def test_every_low_rank_correction_is_rounded_and_nothing_else_changes():
    outliers = Outliers(jnp.asarray([3, 9], jnp.uint32), draw(2), D_IN, D_OUT)
    ranks = (LowRank(draw(D_IN, RANK), draw(RANK, D_OUT)), LowRank(draw(D_IN, 2), draw(2, D_OUT)))
    leaf = CompressedLinear(Dense(draw(D_IN, D_OUT)), (ranks[0], outliers, ranks[1]))
    came = run(leaf, "group_size=32")
    first, kept, second = came.corrections
    assert isinstance(first, QuantizedLowRank) and isinstance(second, QuantizedLowRank)
    assert (first.rank, second.rank, first.a.bits) == (RANK, 2, 4)
    for one, other in ((kept, outliers), (came.base, leaf.base)):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_unbalanced_halves_are_balanced_before_they_are_rounded():
    a, b = draw(D_IN, RANK), draw(RANK, D_OUT)
    base = Dense(draw(D_IN, D_OUT))
    plain = run(CompressedLinear(base, (LowRank(a, b),)))
    # 1e6 and 1e-6 leave float16, in which a group's scale is stored.
    skewed = run(CompressedLinear(base, (LowRank(1e8 * a, 1e-8 * b),)))
    np.testing.assert_allclose(
        skewed.corrections[0].dense(), plain.corrections[0].dense(), rtol=1e-3, atol=1e-3
    )


def test_four_bits_a_factor_lose_less_than_seven_percent_and_eight_nearly_nothing():
    adapter = LowRank(draw(512, 32), draw(32, 256))
    exact = np.asarray(adapter.dense())
    leaf = CompressedLinear(Dense(jnp.zeros((512, 256))), (adapter,))
    lost = {}
    for bits in (2, 4, 8):
        came = np.asarray(run(leaf, f"bits={bits}").corrections[0].dense())
        lost[bits] = np.sum(np.square(came - exact)) / np.sum(np.square(exact))
    assert 1e-5 < lost[8] < 1e-3 < lost[4] < 0.07 < lost[2]


def test_size_is_what_the_format_says():
    leaf = preview_leaf(parse_recipe("rtn(bits=2) | svd(rank=8) | quantize_adapter()"), 256, 384)
    (correction,) = leaf.corrections
    # 384 is three groups of 128; 4.125 bits each number.
    assert correction.stored_bits() == 8 * (256 + 384) * (4 + 16 / 128)
    assert isinstance(correction, QuantizedLowRank)


def test_there_must_be_an_adapter():
    with pytest.raises(InputError, match="quantize_adapter: there is no adapter to round; put"):
        preview_leaf(parse_recipe("rtn(bits=2) | quantize_adapter()"), 64, 64)


def test_a_pooled_adapter_is_sent_to_merge():
    pooled = LowRank(draw(D_IN // 32, RANK), draw(RANK, D_OUT), pool=32)
    with pytest.raises(InputError, match=r"quantize_adapter: a pooled adapter .* merge\(\)"):
        run(CompressedLinear(Dense(draw(D_IN, D_OUT)), (pooled,)))


@pytest.mark.parametrize("arguments", ["bits=1", "bits=9", "group_size=0", "bits='4'"])
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match="quantize_adapter: "):
        parse_recipe(f"quantize_adapter({arguments})")
