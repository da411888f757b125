"""The dense export: the model's own logits from a folder in the original names."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

import lqec_jax as lqec
from lqec_jax.io import tensor_file
from lqec_jax.io.exports.export import export_model
from tests.golden.tiny_checkpoint import write_checkpoint
from tests.io.packed_models import RAW, make_model

TOKENS = np.arange(32).reshape(2, 16)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export_model(model, tmp_path_factory.mktemp("hf") / "out", "hf").folder


def test_the_folder_gives_the_models_logits(model, folder):
    again = lqec.load(folder)
    assert again.raw_config == RAW | {"torch_dtype": "float32"}
    difference = np.abs(lqec.logits(again, TOKENS) - lqec.logits(model, TOKENS))
    assert float(difference.max()) <= 1e-4


def test_names_and_orientation_are_the_originals(model, folder, tmp_path):
    original = write_checkpoint(tmp_path / "m", num_hidden_layers=2, num_key_value_heads=4)
    with safe_open(folder / "model.safetensors", "np") as ours:
        with safe_open(original / "model.safetensors", "np") as theirs:
            shapes = [{n: f.get_slice(n).get_shape() for n in f.keys()} for f in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert ours.metadata() == {"format": "pt"}  # transformers reads no other
        w = ours.get_tensor("model.layers.1.mlp.down_proj.weight")
    leaf = jax.tree.map(lambda a: a[1], model.params["blocks"][0]["mlp"]["down"]["kernel"])
    np.testing.assert_array_equal(w, leaf.dense().T)


def test_the_base_alone_leaves_the_adapters_out(model, tmp_path):
    done = export_model(model, tmp_path / "base", "hf", base_only=True)
    params = lqec.load(done.folder).params["blocks"][0]
    leaf = model.params["blocks"][0]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(params["attn"]["q"]["kernel"], leaf.base.dense())
    assert json.loads((done.folder / "lqec_export.json").read_text())["base_only"] is True


def test_a_dense_model_keeps_its_dtype_and_its_tensors(tmp_path):
    folder = write_checkpoint(tmp_path / "m", num_hidden_layers=1, tie_word_embeddings=True)
    model = lqec.load(folder)
    done = export_model(model, tmp_path / "out", "hf", dtype="bfloat16")
    assert json.loads((done.folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = export_model(lqec.load(done.folder), tmp_path / "again", "hf")
    assert not done.notes and not again.notes
    bytes_of = [(d.folder / "model.safetensors").read_bytes() for d in (done, again)]
    assert bytes_of[0] == bytes_of[1]
    assert lqec.load(again.folder).params["embed"]["embedding"].dtype == "bfloat16"


def test_shards_have_an_index(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 20_000)
    done = export_model(model, tmp_path / "out", "hf")
    index = json.loads((done.folder / tensor_file.INDEX).read_text())
    files = sorted(path.name for path in done.folder.glob("*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * 24_736
    whole, parts = lqec.load(folder).params, lqec.load(done.folder).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, parts))
