"""Every family is read from a folder, compressed, saved, read back; RILQ trains the oddest."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import lqec_jax as lqec
from lqec_jax.recipe import parse_recipe
from tests.golden.make_family_logits import VARIANTS, draw_weights

SEQLEN = 24  # three windows of attention
# Every linear is [32, 32], and one recipe object: its step compiles once for all families.
SQUARE = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "ffn_dim": 32,
    "word_embed_proj_dim": 32,
}
FINE = parse_recipe("rtn(bits=8, group_size=16)")
NAMES = ("mistral/window", "qwen2/late_window", "qwen3/plain", "opt/plain", "gemma2/plain")


def write(folder, name):
    raw = VARIANTS[name]
    raw = raw | {key: SQUARE[key] for key in SQUARE if key in raw or key == "head_dim"}
    if raw["model_type"] == "opt":
        del raw["head_dim"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(draw_weights(raw, seed=0), folder / "model.safetensors")
    return folder


def make_tokens(count):
    return np.random.RandomState(1).randint(0, 64, (count, SEQLEN)).astype(np.int32)


def perplexity(model, tokens):
    logits = np.asarray(lqec.logits(model, tokens), np.float64)[:, :-1]
    label = np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return np.exp((np.log(np.exp(logits).sum(-1)) - label).mean())


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_compressed_and_read_back(name, tmp_path):
    folder, tokens = write(tmp_path / "model", name), make_tokens(4)
    lqec.compress(folder, FINE, tokens, seqlen=SEQLEN, out=tmp_path / "small")
    planned = lqec.plan(folder, FINE, seqlen=SEQLEN, windows=4)["file_bytes"]
    assert planned == (tmp_path / "small" / "model.safetensors").stat().st_size
    small = lqec.load(tmp_path / "small")
    teacher, student = (stage["ppl"] for stage in small.report["stages"])
    # Block by block in the streams, or the whole model at once: one computation.
    assert perplexity(small, tokens[-1:]) == pytest.approx(student, rel=1e-4)
    # Eight bits are nearly the teacher's 32, and not all of them.
    assert 1e-6 < abs(student / teacher - 1) < 0.05


@pytest.mark.thorough
def test_rilq_trains_through_softcaps_and_unequal_windows(tmp_path):
    folder, tokens = write(tmp_path / "model", "gemma2/plain"), make_tokens(80)
    recipe = "rtn(bits=3, group_size=16) | rilq(rank=4, updates=30, batch=4, eval_every=10)"
    small = lqec.compress(folder, recipe, tokens, seqlen=SEQLEN)
    losses = [point["val_loss"] for point in small.report["fits"][0]["history"]]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0]
    _, rounded, trained = (stage["ppl"] for stage in small.report["stages"])
    assert trained < 0.85 * rounded
    windows = [np.asarray(segment["attn"]["window"]) for segment in small.params["blocks"]]
    assert np.concatenate(windows)[[0, 2]].tolist() == [8, 8]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(small.params))
