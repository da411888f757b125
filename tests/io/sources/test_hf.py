"""Hugging Face folders: what is read, what it costs, and one line for every way they are broken."""

import dataclasses
import hashlib
import json
import sys
import tracemalloc
import types
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lqec_jax.errors import MissingExtra
from lqec_jax.io.sources.hf import Checkpoint, check_tensors, read_block, read_outer
from lqec_jax.models.families import Fused
from tests.io.sources.folders import CONFIG, LLAMA, open_model, refusal, weights, write_folder

BABYLLAMA = Path(__file__).parents[4] / "shared/models/babyllama"


# --- opening


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_come_as_stored(tmp_path, shards, dtype):
    arrays = weights(dtype=dtype)
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", arrays, shards=shards))
    assert checkpoint.names() == sorted(arrays)
    assert checkpoint.config == CONFIG and checkpoint.folder == tmp_path / "m"
    for name, wanted in arrays.items():
        assert checkpoint.shape(name) == wanted.shape
        assert checkpoint.dtype(name) == wanted.dtype
        came = checkpoint.read(name)
        assert came.dtype == wanted.dtype and came.tobytes() == wanted.tobytes()


def test_opening_reads_no_weights(tmp_path):
    """With damaged data a checkpoint still opens: only the tensor that is read can notice."""
    arrays = weights()
    folder = write_folder(tmp_path / "m", arrays)
    whole = (folder / "model.safetensors").read_bytes()
    tail = max(array.nbytes for array in arrays.values())
    (folder / "model.safetensors").write_bytes(whole[:-tail] + b"\xff" * tail)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shape("model.norm.weight") == (8,)


def test_an_unknown_tensor_is_named(tmp_path):
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", weights()))
    assert "'lm_heads.weight'" in refusal(checkpoint.read, "lm_heads.weight")


def test_no_folder_or_a_file(tmp_path):
    assert f"no folder {tmp_path / 'x'}" in refusal(Checkpoint.open, tmp_path / "x")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in refusal(Checkpoint.open, tmp_path / "model.safetensors")
    assert "config.json is missing" in refusal(Checkpoint.open, tmp_path)


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "neither model.safetensors nor" in refusal(Checkpoint.open, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    message = refusal(Checkpoint.open, tmp_path)
    assert "'pytorch_model.bin'" in message and "save_pretrained" in message


def test_two_versions_of_the_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "m", weights())
    write_folder(folder, weights(seed=1), shards=2)
    assert "two versions" in refusal(Checkpoint.open, folder)


def test_a_shard_cut_short_is_named_with_its_sizes(tmp_path):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-9])
    message = refusal(Checkpoint.open, folder)
    assert str(shard) in message and f"{size - 9} bytes" in message and str(size) in message


def test_a_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path / "m", weights(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = refusal(Checkpoint.open, folder)
    assert "1 of 3 shards missing: 'model-00002-of-00003.safetensors'" in message


def test_an_index_that_promises_a_tensor_its_shard_lacks(tmp_path):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 tensor that the shard does not hold: 'ghost'" in refusal(Checkpoint.open, folder)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "pytorch.bin", 3, None])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, shard):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'model.norm.weight' is no file name" in refusal(Checkpoint.open, folder)


@pytest.mark.parametrize("content", ['{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": 1}'])
def test_an_index_without_a_map(tmp_path, content):
    folder = write_folder(tmp_path / "m", weights(), shards=2)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "no weight_map" in refusal(Checkpoint.open, folder)


def test_the_fingerprint_is_config_then_files_in_name_order(tmp_path):
    folder = write_folder(tmp_path / "m", weights(), shards=3)
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert Checkpoint.open(folder).fingerprint() == wanted
    # One bit of one weight is another model; a README is not.
    (folder / "README.md").write_text("changed")
    assert Checkpoint.open(folder).fingerprint() == wanted
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    assert Checkpoint.open(folder).fingerprint() != wanted


# --- the hub


def test_a_hub_id_without_the_extra_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra) as caught:
        Checkpoint.open("org/name")
    message = str(caught.value)
    assert "no folder 'org/name'" in message and "lqec-jax[hf]" in message and "\n" not in message


def test_a_hub_id_is_fetched(monkeypatch, tmp_path):
    folder, asked = write_folder(tmp_path / "m", weights()), []
    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, **patterns: asked.append(name) or str(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert Checkpoint.open("org/name-1.5b").folder == folder
    assert asked == ["org/name-1.5b"]


def test_a_hub_that_fails_is_one_line(monkeypatch, tmp_path):
    def fail(name, **patterns):
        raise ConnectionError("no route\nsecond line")

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = fail
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    message = refusal(Checkpoint.open, "org/name")
    assert "(no route)" in message and "'org/name'" in message


def test_a_local_folder_wins_over_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write_folder(tmp_path / "org" / "name", weights())
    assert len(Checkpoint.open("org/name").names()) == 21


# --- into our trees


def test_a_block_is_transposed_into_our_orientation(tmp_path):
    arrays = weights()
    model = open_model(write_folder(tmp_path / "m", arrays))
    block = read_block(*model, 1, np.float32)
    at = "model.layers.1"
    assert set(block) == {"attn_norm", "attn", "mlp_norm", "mlp"}
    assert block["attn"]["k"]["kernel"].shape == (8, 4)
    assert block["mlp"]["down"]["kernel"].shape == (12, 8)
    x = np.random.default_rng(5).standard_normal((3, 12)).astype(np.float32)
    wanted = x @ arrays[f"{at}.mlp.down_proj.weight"].T
    np.testing.assert_allclose(x @ block["mlp"]["down"]["kernel"], wanted, rtol=1e-6)
    np.testing.assert_array_equal(
        block["attn"]["q"]["kernel"], arrays[f"{at}.self_attn.q_proj.weight"].T
    )
    np.testing.assert_array_equal(
        block["mlp_norm"]["scale"], arrays[f"{at}.post_attention_layernorm.weight"]
    )
    assert all(leaf["kernel"].flags.c_contiguous for leaf in block["attn"].values())


def fused(*linears):
    """Returns a family's line for several linears that the checkpoint keeps as one."""
    name = "model.layers.{layer}." + "_".join(path.replace("/", "_") for path in linears)
    return dict.fromkeys(linears, Fused(name, linears))


def test_a_stored_tensor_may_be_several_linears(tmp_path):
    arrays = weights()
    wanted = read_block(*open_model(write_folder(tmp_path / "apart", arrays)), 1, np.float16)
    lines = fused("attn/q", "attn/k", "attn/v") | fused("mlp/up", "mlp/gate")
    names = {path: LLAMA.names[path] + ".weight" for path in lines}
    for layer in range(2):
        for line in dict.fromkeys(lines.values()):
            parts = [arrays.pop(names[path].format(layer=layer)) for path in line.linears]
            arrays[line.name.format(layer=layer) + ".weight"] = np.concatenate(parts)
    checkpoint, _, config = open_model(write_folder(tmp_path / "fused", arrays))
    family = dataclasses.replace(LLAMA, names={**LLAMA.names, **lines})
    check_tensors(checkpoint, family, config)
    came = read_block(checkpoint, family, config, 1, np.float16)
    jax.tree.map(np.testing.assert_array_equal, came, wanted)
    assert jax.tree.structure(came) == jax.tree.structure(wanted)
    shapes = {p: stored.inner_shape for p, stored in family.block_tensors(config).items()}
    assert shapes == family.block_shapes(config)


def test_a_fused_tensor_of_another_width_or_none_is_named_once(tmp_path):
    family = dataclasses.replace(LLAMA, names={**LLAMA.names, **fused("attn/q", "attn/k")})
    checkpoint, _, config = open_model(write_folder(tmp_path / "m", weights()))
    message = refusal(read_block, checkpoint, family, config, 0, np.float32)
    assert "1 tensor missing: 'model.layers.0.attn_q_attn_k.weight'" in message
    arrays = weights() | {"model.layers.0.attn_q_attn_k.weight": np.ones((11, 8), np.float32)}
    checkpoint = open_model(write_folder(tmp_path / "n", arrays))[0]
    message = refusal(read_block, checkpoint, family, config, 0, np.float32)
    assert "is [11, 8], config.json asks for [12, 8]" in message


def test_outer_has_embedding_norm_and_head(tmp_path):
    arrays = weights()
    model = open_model(write_folder(tmp_path / "m", arrays, shards=2))
    outer = read_outer(*model, np.float32)
    assert set(outer) == {"embed", "norm", "head"}
    np.testing.assert_array_equal(outer["embed"]["embedding"], arrays["model.embed_tokens.weight"])
    np.testing.assert_array_equal(outer["head"]["kernel"], arrays["lm_head.weight"].T)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, "bfloat16"])
def test_every_array_has_the_dtype_asked_for(tmp_path, stored, wanted):
    arrays = weights(dtype=stored)
    model = open_model(write_folder(tmp_path / "m", arrays))
    block = read_block(*model, 0, wanted)
    came = block["mlp"]["up"]["kernel"]
    assert came.dtype == np.dtype(wanted)
    assert block["attn_norm"]["scale"].dtype == np.dtype(wanted)
    expected = arrays["model.layers.0.mlp.up_proj.weight"].T.astype(wanted)
    np.testing.assert_array_equal(came, expected)


def test_a_block_costs_its_own_memory_and_one_tensor(tmp_path):
    raw = CONFIG | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    arrays = weights(raw)
    model = open_model(write_folder(tmp_path / "m", arrays, raw))
    inside = {n: a.nbytes for n, a in arrays.items() if n.startswith("model.layers.3.")}
    tracemalloc.start()
    try:
        read_block(*model, 3, np.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    allowed = sum(inside.values()) + 2 * max(inside.values())
    assert sum(inside.values()) < peak < allowed < sum(a.nbytes for a in arrays.values()) / 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_non_finite_weight_is_named_and_counted(tmp_path, bad, dtype):
    arrays = weights(dtype=dtype)
    name = "model.layers.1.mlp.gate_proj.weight"
    arrays[name][3, 2:5] = bad
    model = open_model(write_folder(tmp_path / "m", arrays))
    message = refusal(read_block, *model, 1, np.float32)
    assert repr(name) in message and "3 non-finite of 96 values" in message
    assert read_block(*model, 0, np.float32)["mlp"]["gate"]["kernel"].shape == (8, 12)


def test_values_beyond_float16_are_refused_not_made_infinite(tmp_path):
    arrays = weights(dtype=ml_dtypes.bfloat16)
    arrays["model.norm.weight"][:2] = 1e6
    model = open_model(write_folder(tmp_path / "m", arrays))
    message = refusal(read_outer, *model, np.float16)
    assert "'model.norm.weight' has 2 values beyond the range of float16" in message
    assert read_outer(*model, "bfloat16")["norm"]["scale"][0] == np.float32(999424)


def test_integer_weights_are_refused(tmp_path):
    arrays = weights()
    name = "model.layers.0.mlp.up_proj.weight"
    arrays[name] = arrays[name].astype(np.int8)
    model = open_model(write_folder(tmp_path / "m", arrays))
    message = refusal(read_block, *model, 0, np.float32)
    assert repr(name) in message and "is int8, wanted" in message


def test_a_wrong_shape_is_named_with_both(tmp_path):
    arrays = weights()
    name = "model.layers.1.self_attn.k_proj.weight"
    arrays[name] = np.ones((8, 8), np.float32)
    model = open_model(write_folder(tmp_path / "m", arrays))
    for call in (lambda: read_block(*model, 1, np.float32), lambda: check_tensors(*model)):
        message = refusal(call)
        assert f"{name!r} is [8, 8], config.json asks for [4, 8]" in message


def test_a_kernel_stored_in_our_orientation_is_caught(tmp_path):
    arrays = weights()
    name = "model.layers.0.mlp.down_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    model = open_model(write_folder(tmp_path / "m", arrays))
    assert "is [12, 8], config.json asks for [8, 12]" in refusal(read_block, *model, 0, np.float32)


def test_missing_tensors_are_named(tmp_path):
    arrays = weights()
    del arrays["model.layers.0.mlp.up_proj.weight"], arrays["lm_head.weight"]
    model = open_model(write_folder(tmp_path / "m", arrays))
    message = refusal(read_block, *model, 0, np.float32)
    assert "1 tensor missing: 'model.layers.0.mlp.up_proj.weight'" in message
    message = refusal(read_outer, *model, np.float32)
    assert "2 tensors missing" in message and "'lm_head.weight'" in message
    assert "tie_word_embeddings" in message


def test_a_deeper_config_than_the_weights(tmp_path):
    raw = CONFIG | {"num_hidden_layers": 3}
    model = open_model(write_folder(tmp_path / "m", weights(), raw))
    message = refusal(check_tensors, *model)
    assert "9 tensors missing" in message and "and 6 more" in message


def test_a_shallower_config_than_the_weights(tmp_path):
    raw = CONFIG | {"num_hidden_layers": 1}
    model = open_model(write_folder(tmp_path / "m", weights(), raw))
    message = refusal(read_outer, *model, np.float32)
    assert "9 tensors that a llama of 1 layers does not have" in message
    assert "'model.layers.1.input_layernorm.weight'" in message and "and 6 more" in message


def test_unknown_tensors_are_refused_and_rotary_tables_are_not(tmp_path):
    arrays = weights()
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    model = open_model(write_folder(tmp_path / "m", arrays))
    check_tensors(*model)
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.ones(8, np.float32)
    model = open_model(write_folder(tmp_path / "m", arrays))
    message = refusal(check_tensors, *model)
    assert "1 tensor that" in message and "'model.layers.0.self_attn.q_proj.bias'" in message


def test_biases_are_read_where_the_config_has_them(tmp_path):
    raw = CONFIG | {"mlp_bias": True}
    arrays = weights()
    for layer in range(2):
        for name, size in (("gate", 12), ("up", 12), ("down", 8)):
            arrays[f"model.layers.{layer}.mlp.{name}_proj.bias"] = np.full(size, layer, np.float32)
    model = open_model(write_folder(tmp_path / "m", arrays, raw))
    check_tensors(*model)
    np.testing.assert_array_equal(read_block(*model, 1, np.float32)["mlp"]["up"]["bias"], [1] * 12)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    raw = CONFIG | {"tie_word_embeddings": True}
    arrays = weights(raw)
    assert "head" not in read_outer(*open_model(write_folder(tmp_path / "a", arrays, raw)), "f4")
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    assert "head" not in read_outer(*open_model(write_folder(tmp_path / "b", arrays, raw)), "f4")
    arrays["lm_head.weight"][19, 7] += 1e-3
    message = refusal(read_outer, *open_model(write_folder(tmp_path / "c", arrays, raw)), "f4")
    assert "'lm_head.weight' differs from 'model.embed_tokens.weight'" in message


@pytest.mark.skipif(not BABYLLAMA.is_dir(), reason="../shared/models/babyllama is absent")
def test_a_real_checkpoint_is_read_as_its_library_reads_it():
    checkpoint, llama, config = open_model(BABYLLAMA)
    arrays = load_file(BABYLLAMA / "model.safetensors")
    outer = read_outer(checkpoint, llama, config, np.float32)
    assert set(outer) == {"embed", "norm"}
    seen = sum(leaf.size for part in outer.values() for leaf in part.values())
    for layer in range(config.layers):
        block = read_block(checkpoint, llama, config, layer, np.float32)
        wanted = arrays[f"model.layers.{layer}.mlp.down_proj.weight"]
        np.testing.assert_array_equal(block["mlp"]["down"]["kernel"].T, wanted)
        linears = [leaf["kernel"] for part in ("attn", "mlp") for leaf in block[part].values()]
        seen += sum(w.size for w in linears) + 2 * config.d_model
    assert seen == 936_448
