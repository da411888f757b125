"""A model does not know what its weights are made of: formats give their dense twins' logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import get_at, set_at
from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.recipe import parse_recipe
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.golden.tiny_checkpoint import write_checkpoint

TOKENS = np.arange(24).reshape(2, 12)
# Format -> a recipe without data that makes it.
RECIPES = {
    "affine, one scale": "slim_quant(bits=4)",
    "planes of signs": "ternary(group_size=16)",
    "one bit, scaled inputs": "onebit()",
    "codebook of each column, outliers": "squeezellm(bits=2, weights='ones', outliers=0.01)",
    "scales of scales": "nf(bits=4, group_size=16, double=True)",
    "pairs, both sides rotated": "hadamard(output=True) | higgs(bits=3)",
    "rounded adapters": "rtn(bits=2, group_size=16) | svd(rank=4) | quantize_adapter()",
    "real zeros, pooled adapters": "hqq(bits=2, group_size=16)",
    "mask over dense": "magnitude(sparsity=0.5)",
    "two of four over affine": "magnitude(sparsity='2:4') | rtn(bits=4, group_size=16)",
}
# A model holds seven formats, one a linear: a program for each would be minutes of compiling.
FIRST = (0, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lqec.load(write_checkpoint(tmp_path_factory.mktemp("m") / "tiny", num_hidden_layers=2))


@pytest.fixture(scope="module")
def run(model):
    """Returns params -> logits and the gradients of the adapters, compiled once a model."""

    @jax.jit
    def run(params):
        adapters, frozen = lqec.partition(params, select="adapters")

        def loss(adapters):
            whole = lqec.combine(adapters, frozen)
            _, hidden = model.fns.hidden(whole, TOKENS)
            logits = model.fns.head(whole, hidden)
            return jnp.mean(jnp.square(logits)), logits

        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(adapters)
        return logits, jax.tree.leaves(gradients)

    return run


def rewrite(model, changes):
    """Returns the parameters with every linear changed by its own, stacks of layers whole."""
    blocks = []
    for block in model.params["blocks"]:
        for path, change in zip(model.fns.linears, changes, strict=True):
            block = set_at(block, f"{path}/kernel", change(get_at(block, f"{path}/kernel")))
        blocks.append(block)
    return {**model.params, "blocks": tuple(blocks)}


def compress_stack(recipe, pool=1):
    steps = parse_recipe(recipe).steps

    @jax.jit
    @jax.vmap
    def compress(w):
        problem = LinearProblem(w.astype(jnp.float32), LinearStats(), jax.random.key(0))
        leaf = CompressedLinear(Dense(problem.w))
        for step in steps:
            leaf, _ = run_linear(step, problem, leaf)
        a = 0.1 * pool * jnp.ones((leaf.d_in // pool, 2))
        rank = LowRank(a, 0.1 * jnp.ones((2, leaf.d_out)), pool)
        return CompressedLinear(
            leaf.base, (rank, *leaf.corrections), leaf.input_transform, leaf.output_transform
        )

    return compress


@pytest.mark.parametrize("first", FIRST)
def test_logits_and_adapter_gradients_are_those_of_the_dense_twin(model, run, first):
    names = [*RECIPES, *RECIPES][first : first + len(model.fns.linears)]
    compress = [compress_stack(RECIPES[name], 16 if "pooled" in name else 1) for name in names]
    params = rewrite(model, compress)

    @jax.jit
    def as_dense(leaf: CompressedLinear) -> CompressedLinear:
        base = leaf.dense() - leaf.corrections[0].dense()
        return CompressedLinear(Dense(base), leaf.corrections[:1])

    packed = run(params)
    wanted = run(rewrite(replace(model, params=params), [as_dense] * len(names)))
    np.testing.assert_allclose(packed[0], wanted[0], rtol=1e-3, atol=1e-4)
    for a, b in zip(packed[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4 * np.abs(b).max() + 1e-8)


def test_every_format_is_in_a_model(model):
    seven = range(len(model.fns.linears))
    assert {(first + n) % len(RECIPES) for first in FIRST for n in seven} == set(
        range(len(RECIPES))
    )
