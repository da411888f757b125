"""SLiM against Mohammad-Mozaffari/slim@ed72646 on one weight with a dead input.

2 of 4, 4 bits, rank 8. That code chooses the mask on the weight before it is rounded, makes the
adapter for the rounded and masked weight, and then rounds again what the adapter leaves.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax
from lqec_jax.core.closed_form import reduce_rank
from lqec_jax.core.types import LinearStats
from lqec_jax.quantizers.slim_quant import quantize
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.sparse import Masked
from tests.golden.authors.problems import (
    RANK,
    codes_of,
    distance,
    product,
    read_mask,
    run,
    stored_product,
)

# Σ (w - ŵ)² of our exact search of the clip, in units of what their clip leaves.
EXACT = {4: 0.954, 3: 0.882, 2: 0.624}
# tr(Δᵀ H Δ) of whole recipes, in units of their final weight's.
WHOLE = {
    "slim_quant(bits=4) | wanda() | slim_lora(rank=8)": ("slimlora", 0.990),
    "slim_quant(bits=4) | wanda() | slim_lora(rank=8, requantize=slim_quant(bits=4))":
        ("slimlora", 0.911),
    "slim_quant(bits=4) | wanda() | naive_lora(rank=8)": ("naive", 0.986),
}  # fmt: skip


class Case:
    """The authors' numbers, and what they are made of."""

    def __init__(self, linear, stored: dict):
        self.linear, self.stored = linear, stored
        self.keep = read_mask(stored["keep24"])
        self.base = self.weight("base_before_lora")
        # Sums of squares a sequence, and what their saliency adds to them: a dead input counts as
        # one where they look for the least.
        self.sums = np.sum(np.square(linear.x.astype(np.float64)), axis=0) / linear.sequences
        self.shifted = self.sums + np.minimum(self.sums[self.sums > 0].min(), 1.0)

    def weight(self, key: str) -> np.ndarray:
        return self.stored[f"{key}.codes"] / self.stored[f"{key}.factor"].astype(np.float64)

    def start(self) -> CompressedLinear:
        """Returns their rounded and masked weight as a leaf."""
        base = Masked.from_mask(Dense(jnp.asarray(self.base, jnp.float32)), jnp.asarray(self.keep))
        return CompressedLinear(dataclasses.replace(base, pattern="2:4"))

    def stats(self, sums: np.ndarray) -> LinearStats:
        tokens = len(self.linear.x) / self.linear.sequences
        return LinearStats(rms=jnp.asarray(np.sqrt(sums / tokens), jnp.float32))

    def solve(self, error: np.ndarray) -> np.ndarray:
        """Returns their closed form's answer by ours, with their weights of inputs."""
        factors = reduce_rank(
            jnp.asarray(error, jnp.float32), jnp.asarray(self.shifted, jnp.float32), RANK
        )
        a, b = (np.asarray(factor, np.float64) for factor in factors)
        return a @ b


@pytest.fixture(scope="module")
def case(linear, golden):
    return Case(linear, golden("slim"))


@pytest.mark.parametrize("bits", EXACT)
def test_the_clip_of_the_integral_is_in_the_bin_of_theirs(case, bits):
    w, half = case.linear.w, 2 ** (bits - 1)
    base = lqec_jax.quantize(w, f"slim_quant(bits={bits}, search='integral')").base
    size = np.abs(w.astype(np.float64))
    # Their bins begin at the least |w|, ours at zero.
    width = (size.max() - size.min()) / 512
    bin_of = round(float(case.stored[f"quant{bits}.alpha"] - size.min()) / width - 0.5)
    theirs = size.min() + (bin_of + 0.5) * width
    assert case.stored[f"quant{bits}.alpha"] == pytest.approx(theirs, rel=1e-6)
    clip = float(base.scales.reshape(())) * (half - 1)
    assert clip == pytest.approx((bin_of + 0.5) * size.max() / 512, rel=1e-6)
    codes = codes_of(base).astype(int) - half
    assert np.sum(codes != case.stored[f"quant{bits}.codes"]) <= 2


@pytest.mark.parametrize("bits", EXACT)
def test_the_exact_search_leaves_less_than_their_clip(case, bits):
    w = case.linear.w
    ours = np.asarray(lqec_jax.quantize(w, f"slim_quant(bits={bits})").dense())
    theirs = case.weight(f"quant{bits}")
    ratio = np.sum(np.square(w - ours)) / np.sum(np.square(w - theirs))
    assert ratio == pytest.approx(EXACT[bits], abs=0.003)


@pytest.mark.parametrize("key", ["quant4", "absmax4", "slimlora"])
def test_codes_of_their_clips_are_theirs(case, key):
    factor, w = case.stored[f"{key}.factor"], case.linear.w
    if key == "slimlora":  # the last rounding, of what the adapter leaves
        w = np.where(case.keep, w - stored_product(case.stored, key), 0).astype(np.float32)
    base = quantize(jnp.asarray(w), 4, jnp.asarray(np.float32(7) / factor))
    codes = codes_of(base).astype(int) - 8
    assert np.sum(codes != case.stored[f"{key}.codes"]) <= 2


def test_the_mask_is_theirs_where_it_is_chosen_before_the_rounding(case):
    start = CompressedLinear(Dense(jnp.asarray(case.linear.w)))
    leaf = run("wanda(sparsity='2:4')", case.linear.w, case.stats(case.shifted), start)
    np.testing.assert_array_equal(leaf.base.kept(), case.keep)
    # Without their shift, a dead input's weights go first.
    leaf = lqec_jax.quantize(case.linear.w, "wanda(sparsity='2:4')", x=case.linear.x)
    differ = np.asarray(leaf.base.kept()) != case.keep
    assert 0 < differ.sum() < 10


def test_after_the_rounding_another_mask_is_chosen_and_is_no_worse(case):
    """Weights of one code are told apart by their input alone, and then by their order."""
    leaf = lqec_jax.quantize(case.linear.w, "slim_quant(bits=4) | wanda()", x=case.linear.x)
    assert 0.1 < np.mean(np.asarray(leaf.base.kept()) != case.keep) < 0.13
    ratio = case.linear.error(leaf.dense()) / case.linear.error(case.stored["nolora.w"])
    assert ratio == pytest.approx(1.04, abs=0.01)
    other = lqec_jax.quantize(case.linear.w, "wanda() | slim_quant(bits=4)", x=case.linear.x)
    assert case.linear.error(other.dense()) < case.linear.error(leaf.dense())


@pytest.mark.parametrize("key", ["slimlora", "slimlora_noquant"])
def test_the_adapter_is_theirs_where_a_dead_input_counts_as_theirs(case, key):
    base = case.base if key == "slimlora" else np.where(case.keep, case.linear.w, 0)
    theirs = stored_product(case.stored, key)
    assert distance(case.solve(case.linear.w - base), theirs) < 3e-5
    if key == "slimlora_noquant":
        left = np.where(case.keep, case.linear.w - theirs, 0)
        np.testing.assert_allclose(case.stored[f"{key}.w"], left, atol=1e-6)


def test_the_naive_adapter_is_theirs(case):
    leaf = run(f"naive_lora(rank={RANK}, dtype='float32')", case.linear.w, LinearStats(),
               case.start())  # fmt: skip
    assert distance(product(leaf), stored_product(case.stored, "naive")) < 3e-5


def test_a_dead_input_moves_our_adapter_by_so_much(case):
    """Ours takes the least of the inputs that are seen, which is 37 times as much."""
    leaf = run(f"slim_lora(rank={RANK}, dtype='float32')", case.linear.w, case.stats(case.sums),
               case.start())  # fmt: skip
    ours, theirs = product(leaf), stored_product(case.stored, "slimlora")
    assert distance(ours, theirs) == pytest.approx(0.104, abs=0.005)
    ratio = case.linear.error(case.base + ours) / case.linear.error(case.base + theirs)
    assert ratio == pytest.approx(0.987, abs=0.002)


@pytest.mark.parametrize("recipe", WHOLE)
def test_whole_recipes_leave_no_more_than_theirs(case, recipe):
    key, ratio = WHOLE[recipe]
    theirs = case.linear.error(case.weight(key) + stored_product(case.stored, key))
    ours = case.linear.error(lqec_jax.quantize(case.linear.w, recipe, x=case.linear.x).dense())
    assert ours / theirs == pytest.approx(ratio, abs=0.01)
