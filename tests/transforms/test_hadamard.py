"""Rotation as a step: nothing is lost, outliers are spread, and any quantizer may follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf
from lqec_jax.transforms.hadamard import hadamard
from lqec_kernels.formats import CompressedLinear, Dense

D_IN, D_OUT = 96, 64
RNG = np.random.default_rng(0)
# A few inputs a hundred times as large as the others, and heavy tails.
HEAVY = RNG.standard_t(2.5, (D_IN, D_OUT)).astype(np.float32)
HEAVY[5] *= 20
MIX = RNG.standard_normal((D_IN, D_IN)) * np.exp(-np.arange(D_IN) / 20)
X = (RNG.standard_normal((400, D_IN)) @ MIX).astype(np.float32)


def run(text: str, w=HEAVY, seed: int = 0):
    """Returns the leaf, its weight and its relative output error."""
    steps = parse_recipe(text).steps
    stats = LinearStats(gram=jnp.asarray(X.T @ X / len(X)))
    problem = LinearProblem(jnp.asarray(w), stats, jax.random.key(seed))

    @jax.jit
    def solve(problem):
        leaf = CompressedLinear(Dense(problem.w))
        for step in steps:
            leaf, _ = run_linear(step, problem, leaf)
        return leaf, leaf.dense()

    leaf, dense = solve(problem)
    error = X @ (np.asarray(dense) - w)
    return leaf, np.asarray(dense), np.sum(error**2) / np.sum((X @ w) ** 2)


@pytest.mark.parametrize("text", ["hadamard(output=True)", "hadamard(block=32)",
                                  "hadamard(input=False, output=True)"])  # fmt: skip
def test_a_rotation_loses_nothing_and_spreads_outliers(text):
    leaf, dense, _ = run(text)
    np.testing.assert_allclose(dense, HEAVY, atol=1e-5 * np.abs(HEAVY).max())

    def peak(w):
        return np.abs(w).max() / np.sqrt(np.mean(np.square(w)))

    if "input=False" not in text:  # the large input is large for all outputs
        assert peak(np.asarray(leaf.base.w)) < 0.5 * peak(HEAVY)
    if text == "hadamard(output=True)":  # both sides: as small as a normal weight's
        assert peak(np.asarray(leaf.base.w)) < np.sqrt(2 * np.log(4 * D_IN * D_OUT * 10))


def test_a_rotation_helps_the_quantizers_that_follow():
    for quantizer in ("rtn(bits=3, group_size=None)", "gptq(bits=3, group_size=None)"):
        plain, rotated = run(quantizer)[2], run(f"hadamard() | {quantizer}")[2]
        assert rotated < 0.7 * plain


def test_a_quantizer_behind_a_rotation_sees_the_rotated_gram():
    # With error feedback on the right gram the output error is below plain rounding's.
    rtn, gptq = (run(f"hadamard() | {q}(bits=2, group_size=32)")[2] for q in ("rtn", "gptq"))
    assert gptq < 0.8 * rtn


def test_a_key_draws_the_signs_and_they_cost_a_bit_a_channel():
    first, again, other = (run("hadamard(output=True)", seed=s)[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(first.input_transform.signs, again.input_transform.signs)
    assert (first.input_transform.signs != other.input_transform.signs).any()
    assert first.stored_bits() == D_IN * D_OUT * 32 + D_IN + D_OUT


def test_widths_without_a_matrix_are_rotated_in_blocks_or_refused():
    leaf = preview_leaf(parse_recipe("hadamard(output=True)"), 184, 11008)
    assert (leaf.input_transform.block, leaf.output_transform.block) == (8, 11008)
    with pytest.raises(InputError, match="hadamard: d_in=50 has no Hadamard block"):
        preview_leaf(parse_recipe("hadamard()"), 50, 64)
    with pytest.raises(InputError, match="hadamard: block=64 does not divide d_in=96"):
        preview_leaf(parse_recipe("hadamard(block=64)"), 96, 64)
    with pytest.raises(InputError, match="hadamard: input=False and output=False leave nothing"):
        hadamard(input=False)
    with pytest.raises(InputError, match="hadamard: block=1; an integer >= 2"):
        hadamard(block=1)
