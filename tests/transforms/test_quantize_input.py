"""Quantized inputs: the step, a model that has them, and its exports."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import load_artifact
from lqec_jax.io.exports import flax
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.record import EXACT_INPUTS
from lqec_jax.io.verify.verify import verify_export
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf
from lqec_jax.transforms.quantize_input import quantize_input
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.inputs import InputGrid
from tests.io.packed_models import make_model

TOKENS = np.arange(64).reshape(2, 32) % 60


def with_grid(grid: InputGrid):
    model = make_model()
    is_leaf = lambda node: isinstance(node, CompressedLinear)  # noqa: E731
    params = jax.tree.map(
        lambda node: replace(node, input_grid=grid) if is_leaf(node) else node,
        model.params, is_leaf=is_leaf,
    )  # fmt: skip
    return replace(model, params=params)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("quantize_input()", InputGrid("fp8", 8, "tensor")),
        ("quantize_input(format='int', bits=6)", InputGrid("int", 6, "token")),
        ("quantize_input(format='fp8_e5m2', per='token')", InputGrid("fp8_e5m2", 8, "token")),
    ],
)
def test_a_recipe_says_what_is_read_and_later_steps_keep_it(text, wanted):
    steps = "magnitude(sparsity=0.5) | squeezellm(bits=2, weights='ones', outliers=0.01)"
    for recipe in (text, f"{text} | rtn(bits=4, group_size=16) | svd(rank=2) | quantize_adapter()",
                   f"{text} | {steps}"):  # fmt: skip
        assert preview_leaf(parse_recipe(recipe), 64, 32).input_grid == wanted
    assert parse_recipe(str(parse_recipe(text))).steps[0].arguments["per"] == wanted.per


def test_eight_bits_cost_a_model_little_and_two_much():
    exact = np.asarray(lqec.logits(make_model(), TOKENS))
    lost = {}
    for grid in (InputGrid(), InputGrid("int", 8, "token"), InputGrid("int", 2, "token")):
        came = np.asarray(lqec.logits(with_grid(grid), TOKENS))
        lost[grid] = float(np.std(came - exact) / np.std(exact))
    eight = max(lost[InputGrid()], lost[InputGrid("int", 8, "token")])
    assert 0 < eight < 0.05
    assert lost[InputGrid("int", 2, "token")] > 10 * eight


def test_an_artifact_keeps_it_and_exports_say_that_they_do_not(tmp_path):
    model = with_grid(InputGrid())
    came = load_artifact(lqec.save(model, tmp_path / "artifact"))
    assert jax.tree.structure(came.params) == jax.tree.structure(model.params)
    logits = np.asarray(lqec.logits(model, TOKENS))
    np.testing.assert_allclose(np.asarray(lqec.logits(came, TOKENS)), logits, atol=1e-5)
    dense = export_model(model, tmp_path / "hf", "hf")
    assert EXACT_INPUTS in dense.notes
    assert verify_export(dense.folder, model).logit_difference < 1e-4
    packed = export_model(model, tmp_path / "flax", "flax")
    assert EXACT_INPUTS not in packed.notes
    module, params = flax.load(packed.folder)
    theirs = module.apply({"params": params}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(theirs, logits, atol=1e-4)


@pytest.mark.parametrize(
    "arguments", ["bits=4", "format='fp4'", "per='group'", "format='int', bits=9"]
)
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match="quantize_input: "):
        parse_recipe(f"quantize_input({arguments})")
    assert quantize_input().scope == "linear"
