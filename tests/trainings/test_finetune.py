"""The step `finetune`: its presets, what it asks of a recipe, and a run that keeps the whole."""

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf
from lqec_jax.trainings.finetune import OURS, SLIM, finetune
from tests.golden.tiny_checkpoint import SEQLEN, write_checkpoint, write_tokens

START = "rtn(bits=2, group_size=16) | svd(rank=2)"


def test_presets_are_whole_and_an_argument_wins():
    assert set(SLIM) == set(OURS)
    step = finetune(preset="slim", updates=7)
    assert step.arguments["optimizer"] == "adafactor" and step.arguments["decay"] == "linear"
    assert (step.arguments["lr"], step.arguments["warmup"], step.arguments["updates"]) == (
        1e-4,
        5,
        7,
    )
    assert finetune().arguments["train"] == "adapters"
    assert str(parse_recipe(str(step)).steps[0]) == str(step)


def test_how_many_numbers_are_trained_is_known_before():
    step = finetune()
    for tail in ("", " | quantize_adapter()"):
        leaf = preview_leaf(parse_recipe(START + tail), 64, 32)
        assert step.count(leaf) == 2 * (64 + 32)
        assert jax.tree.structure(jax.eval_shape(step.preview, leaf)) == jax.tree.structure(leaf)
    scales = finetune(train="scales")
    assert scales.count(preview_leaf(parse_recipe(START), 64, 32)) == 4 * 32
    bare = preview_leaf(parse_recipe("rtn(bits=2, group_size=16)"), 64, 32)
    assert finetune(rank=0.25).count(bare) == 8 * (64 + 32)


def test_a_recipe_without_adapters_is_refused_before_any_work():
    with pytest.raises(InputError, match="finetune: the model has no adapters; give rank=16"):
        preview_leaf(parse_recipe("rtn(bits=2, group_size=16) | finetune()"), 64, 32)


def test_a_run_keeps_the_embedding_that_was_trained(tmp_path):
    model = lqec.load(write_checkpoint(tmp_path / "model", num_hidden_layers=2))
    calib = write_tokens(tmp_path / "calib.npy", 12)
    recipe = (
        f"{START} | quantize_adapter() | finetune(train='adapters+rest', updates=6, batch=4, "
        "eval_every=3, lr=0.01)"
    )
    small = lqec.compress(model, recipe, calib, seqlen=SEQLEN, windows=12)
    (fit,) = small.report["fits"]
    losses = {point["update"]: point["val_loss"] for point in fit["history"]}
    assert fit["best_update"] and min(losses.values()) < losses[0]
    before, after = (np.asarray(m.params["embed"]["embedding"]) for m in (model, small))
    assert np.abs(after - before).max() > 1e-3
    # The stage is scored through what was kept, on the windows that the fit looked at.
    score = small.report["stages"][-1]
    assert score["nll"] == pytest.approx(losses[fit["best_update"]], rel=1e-4)
    assert fit["notes"][0].startswith("trained: adapters, norms, biases, embedding and head")
