"""SLiM from end to end on one matrix: quantized, pruned, repaired, and stored small."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.errors import InputError
from lqec_jax.quantizers.slim_quant import quantize, search_exactly
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.sparse import Sparse24

D_IN, D_OUT = 128, 96
RNG = np.random.default_rng(0)
W = (RNG.standard_t(5, (D_IN, D_OUT)) / 9).astype(np.float32)
RMS = np.exp(RNG.standard_normal(D_IN)).astype(np.float32)
START = "slim_quant(bits={bits}) | wanda(sparsity='2:4') | "
PAPER = START + "slim_lora(rank=0.1)"
DEPLOYED = START + "slim_lora(rank=0.1, requantize=slim_quant(bits={bits}))"


@cache
def compress(recipe: str, bits: int = 4) -> CompressedLinear:
    steps = parse_recipe(recipe.format(bits=bits)).steps

    @jax.jit
    def run(w, rms):
        problem = LinearProblem(w, LinearStats(rms=rms), jax.random.key(0))
        leaf = CompressedLinear(Dense(w))
        for step in steps:
            leaf, _ = run_linear(step, problem, leaf)
        return leaf

    return run(W, RMS)


def saliency_error(leaf: CompressedLinear) -> float:
    s2 = np.square(RMS) + np.square(RMS).min()
    error = W - np.asarray(leaf.dense())
    return float(np.sqrt(np.sum(s2[:, None] * error**2) / np.sum(s2[:, None] * W**2)))


def test_the_deployed_base_is_what_the_adapter_leaves_masked_and_rounded_again():
    paper, deployed = compress(PAPER), compress(DEPLOYED)
    assert isinstance(paper.base, Sparse24) and isinstance(deployed.base, Sparse24)
    kept = np.asarray(paper.base.kept())
    np.testing.assert_array_equal(deployed.base.kept(), kept)
    for a, b in zip(
        *(jax.tree.leaves(leaf.corrections) for leaf in (paper, deployed)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    left = np.where(kept, W - np.asarray(paper.corrections[0].dense()), 0).astype(np.float32)
    clip = search_exactly(jnp.asarray(left), 4, jnp.ones((D_IN, 1)))
    wanted = np.where(kept, quantize(jnp.asarray(left), 4, clip).dense(), 0)
    np.testing.assert_allclose(deployed.base.dense(), wanted, atol=1e-6)
    assert np.abs(np.asarray(deployed.base.dense()) - np.asarray(paper.base.dense())).max() > 0.01


@pytest.mark.parametrize("recipe", [PAPER, DEPLOYED, DEPLOYED + " | quantize_adapter()"])
def test_two_of_four_are_zero_exactly(recipe):
    base = np.asarray(compress(recipe).base.dense()).reshape(-1, 4, D_OUT)
    assert ((base == 0).sum(axis=1) >= 2).all()
    kept = np.asarray(compress(recipe).base.kept()).reshape(-1, 4, D_OUT)
    assert (kept.sum(axis=1) == 2).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_again_lowers_the_saliency_error_and_the_adapter_lowers_it_more(bits):
    without = saliency_error(compress(START.rstrip("| "), bits))
    naive = saliency_error(compress(START + "naive_lora(rank=0.1)", bits))
    paper, deployed = (saliency_error(compress(recipe, bits)) for recipe in (PAPER, DEPLOYED))
    assert deployed < paper < naive < without
    assert deployed > 0.9 * paper  # a half step of an alternation, not a method of its own


def test_rounding_the_adapter_costs_little_and_its_bits_are_counted():
    plain, rounded = (compress(DEPLOYED + tail) for tail in ("", " | quantize_adapter()"))
    assert saliency_error(plain) < saliency_error(rounded) < 1.1 * saliency_error(plain)
    (correction,) = rounded.corrections
    assert isinstance(correction, QuantizedLowRank) and correction.rank == int(0.1 * D_OUT)
    # Of 4 weights two of 4 bits and their places; one scale; 4 bits a number and 2 scales.
    base = D_IN * D_OUT * 3 + 32
    adapter = correction.rank * ((D_IN + D_OUT) * 4 + 2 * 16)
    assert rounded.stored_bits() == base + adapter
    held = sum(np.asarray(array).nbytes for array in jax.tree.leaves(rounded))
    assert rounded.stored_bits() == 8 * held


def test_requantize_takes_a_quantizer():
    with pytest.raises(InputError, match="slim_lora: quantizer=True; a method that quantizes"):
        parse_recipe("slim_lora(requantize=True)")
    with pytest.raises(InputError, match="slim_lora: quantizer=wanda leaves the weight dense"):
        preview_leaf(parse_recipe("rtn(bits=4) | slim_lora(requantize=wanda())"), 256, 128)
