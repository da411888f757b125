"""HIGGS: the error is the grid's distortion, whatever the weight."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers.higgs import higgs, quantize
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf
from lqec_kernels.formats import Affine, CompressedLinear, Dense

# ||w - ŵ||² / ||w||² by (p, bits), the squared error of the grids for N(0, I_p).
DISTORTION = {(1, 2): 0.117482, (1, 3): 0.034548, (1, 4): 0.009501,
              (2, 2): 0.10745, (2, 3): 0.02960, (2, 4): 0.00775}  # fmt: skip
D_IN, D_OUT = 352, 400  # 352 = 44 · 8, babyllama's d_ff
LONG, NARROW = 2048, 64
RNG = np.random.default_rng(0)
NORMAL = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)
HEAVY = RNG.standard_t(4, (LONG, NARROW)).astype(np.float32)
OUTLIERS = RNG.standard_normal((LONG, NARROW)).astype(np.float32)
OUTLIERS[RNG.random((LONG, NARROW)) < 0.01] *= 6
SHAPES = {
    "heavy tails": HEAVY,
    "outliers": OUTLIERS,
    "large inputs": OUTLIERS * np.exp(0.5 * RNG.standard_normal((LONG, 1))).astype(np.float32),
    "large outputs": HEAVY * np.exp(RNG.standard_normal(NARROW)).astype(np.float32),
    "mostly zero": OUTLIERS * (RNG.random((LONG, NARROW)) < 0.2),
    "uniform": RNG.random((LONG, NARROW), np.float32) - 0.5,
}


@lru_cache
def compiled(**arguments):
    step = higgs(**arguments)

    @jax.jit
    def solve(w):
        problem = LinearProblem(w, LinearStats(), jax.random.key(0))
        leaf = step.run(problem, CompressedLinear(Dense(w)))
        return leaf, step.objective(problem, leaf)

    return solve


@pytest.mark.parametrize("name", SHAPES)
def test_the_error_is_the_grids_whatever_the_weight(name):
    # A sum of 2048 terms is normal enough; 131,072 weights have a standard error of 0.4 %.
    _, error = compiled(bits=2, block=LONG)(SHAPES[name])
    assert error == pytest.approx(DISTORTION[2, 2], rel=0.02)


@pytest.mark.parametrize(("p", "bits"), DISTORTION)
def test_distortion_of_gaussian_weights(p, bits):
    # Long blocks: a short one divided by its own rms has fewer large numbers than a normal;
    # those make most of the error at 4 bits, so that it takes a million weights to know it.
    w = np.random.default_rng(1).standard_normal((LONG, 512)).astype(np.float32)
    _, error = compiled(bits=bits, p=p, block=LONG)(w)
    assert error == pytest.approx(DISTORTION[p, bits], rel=0.01)


@pytest.mark.parametrize(("name", "ratio"), [("heavy tails", 1.3), ("mostly zero", 2)])
def test_without_the_rotation_it_is_not(name, ratio):
    w = SHAPES[name]
    plain = jax.jit(lambda w: quantize(w, "gauss2_p2", LONG).dense())(w)
    assert np.sum(np.square(plain - w)) / np.sum(w**2) > ratio * DISTORTION[2, 2]


def test_bits_are_exact():
    leaf, _ = compiled(bits=3)(NORMAL)
    count = D_IN * D_OUT
    # Six bits for two weights, one float16 a block and column, one bit an input.
    assert leaf.stored_bits() == 3 * count + 16 * D_OUT + 11 * 32
    assert (leaf.base.bits, leaf.base.table) == (6, "gauss3_p2")
    assert leaf.bits_per_weight == pytest.approx(3.05, abs=0.01)


@pytest.mark.parametrize(
    ("d_in", "block"), [(352, 352), (4096, 512), (11008, 344), (5120, 512), (13824, 512)]
)
def test_blocks_are_the_largest_up_to_512(d_in, block):
    leaf = preview_leaf(parse_recipe("higgs(bits=2)"), d_in, 64)
    assert leaf.input_transform.block == leaf.base.group_size == block
    assert leaf.base.scales.shape == (d_in // block, 64)
    per_weight = leaf.bits_per_weight - 2 - 16 / block
    assert 0 < per_weight <= 1 / 64 + 1e-9  # a sign an input


def test_the_scale_of_a_block_is_its_rms():
    leaf, _ = compiled(bits=4)(NORMAL)
    rms = np.sqrt(np.mean(NORMAL**2, axis=0))  # which no rotation changes
    np.testing.assert_allclose(leaf.base.scales[0], rms, rtol=1e-3)


def test_a_rotation_that_is_there_is_used():
    steps = parse_recipe("hadamard(block=128) | higgs(bits=2)").steps
    w = jnp.asarray(HEAVY)
    problem = LinearProblem(w, LinearStats(), jax.random.key(0))

    @jax.jit
    def solve(problem):
        leaf = CompressedLinear(Dense(problem.w))
        for step in steps:
            leaf = step.run(problem, leaf)
        return leaf, steps[-1].objective(problem, leaf)

    leaf, error = solve(problem)
    assert leaf.input_transform.block == 128 and leaf.base.group_size == 512
    assert DISTORTION[2, 2] * 0.97 < error < DISTORTION[2, 2] * 1.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"bits": 1}, "bits=1; an integer from 2 to 4"), ({"p": 3}, "p=3; one of 1, 2"),
     ({"block": 2}, "block=2; an integer >= 4"), ({"scale_dtype": "int8"}, "scale_dtype='int8'")],
)  # fmt: skip
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^higgs: ") as caught:
        higgs(**arguments)
    assert said in str(caught.value)


def test_what_cannot_be_rotated_is_refused():
    with pytest.raises(InputError, match="higgs: d_in=50 has no Hadamard block"):
        preview_leaf(parse_recipe("higgs()"), 50, 64)
    packed = Affine(jnp.zeros((4, 4), jnp.uint32), jnp.ones((1, 4)), None, 4, 32, 32)
    problem = LinearProblem(jnp.zeros((32, 4)), LinearStats(), jax.random.key(0))
    with pytest.raises(InputError, match="higgs: rotates a dense weight, and this one is Affine"):
        higgs().run(problem, CompressedLinear(packed))
