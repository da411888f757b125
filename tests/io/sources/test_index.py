"""The index of shards: what it does not name, what lies twice, what lies beside, by name."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lqec_jax.io.sources.hf import Checkpoint, check_tensors
from tests.io.sources.folders import open_model, refusal, weights, write_folder

SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def add_to_shard(folder, shard, **arrays):
    """Puts tensors into a shard, and leaves the index as it was."""
    save_file(load_file(folder / shard) | arrays, folder / shard)


def test_a_tensor_that_the_index_does_not_name_is_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    name = "model.layers.0.self_attn.q_proj.bias"
    add_to_shard(folder, SHARDS[1], **{name: np.ones(8, np.float32)})
    message = refusal(Checkpoint.open, folder)
    assert "does not name 1 tensor" in message and f"{name!r} ({SHARDS[1]})" in message


def test_a_tensor_of_the_model_is_refused_too_where_the_index_lost_it(tmp_path):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))
    assert "does not name 1 tensor that the shards hold: 'model.norm.weight'" in refusal(
        Checkpoint.open, folder
    )


def test_constants_that_the_index_does_not_name_are_said(tmp_path, caplog):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    before = open_model(folder)
    assert not caplog.messages
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for value, shard in enumerate(SHARDS):  # and in both, whatever their values
        add_to_shard(folder, shard, **{name: np.full(1, value, np.float32)})
    checkpoint = open_model(folder)[0]
    check_tensors(checkpoint, *before[1:])
    assert name not in checkpoint.entries
    (said,) = caplog.messages
    assert "does not name" in said and name in said and "not read" in said


@pytest.mark.parametrize("home", [0, 1])
def test_a_tensor_in_two_shards_is_one_value_or_refused(tmp_path, home):
    arrays = weights()
    folder = write_folder(tmp_path / "m", arrays, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name, shard in index.items() if shard == SHARDS[home])
    add_to_shard(folder, SHARDS[1 - home], **{name: arrays[name]})
    np.testing.assert_array_equal(Checkpoint.open(folder).read(name), arrays[name])
    for other in (arrays[name] + 1, arrays[name].astype(np.float16), arrays[name][:1]):
        add_to_shard(folder, SHARDS[1 - home], **{name: other})
        message = refusal(Checkpoint.open, folder)
        assert f"{name!r} lies in {SHARDS[home]} and in {SHARDS[1 - home]}" in message


@pytest.mark.parametrize("shards", [1, 2])
def test_other_weights_beside_are_not_read_and_said(tmp_path, caplog, shards):
    arrays = weights()
    folder = write_folder(tmp_path / "m", arrays, shards=shards)
    Checkpoint.open(folder)
    assert not caplog.messages
    save_file(weights(seed=1), folder / "consolidated.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert caplog.messages == [f"{folder}: 'consolidated.safetensors' beside the weights not read"]
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), arrays["model.norm.weight"])


@pytest.mark.parametrize("case", ["index-stray-tensor", "index-two-values"])
def test_the_cases_of_an_index_that_disagrees_are_refused_by_name(shared, case):
    folder = shared / "cases" / case
    if not folder.is_dir():
        pytest.skip("no folder ../shared/cases")
    name = {"index-stray-tensor": "q_proj.bias", "index-two-values": "model.norm.weight"}[case]
    assert name in refusal(Checkpoint.open, folder)
