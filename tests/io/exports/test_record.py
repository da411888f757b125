"""The record of an export says which model it is of and which files, and is checked when read."""

import hashlib
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import drop_corrections, each_block, set_at, stack_blocks
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.leaves import flatten
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.record import RECORD, find_files, hash_base, read_record
from tests.io.packed_models import make_model


@pytest.fixture(scope="module")
def model():
    return make_model(ranks=(0, 0))


@pytest.fixture
def folder(model, tmp_path):
    return export_model(model, tmp_path / "out", "gptq").folder


def refusal(call, *arguments, **named):
    with pytest.raises(InputError) as said:
        call(*arguments, **named)
    assert "\n" not in str(said.value)
    return str(said.value)


def test_the_record_says_what_it_is_of(model, folder):
    record = read_record(folder)
    assert (record["format"], record["recipe"], record["dtype"]) == ("gptq", "rtn(bits=2)", "auto")
    assert record["fingerprint"] == "abc" and record["base_sha256"] == hash_base(model.params)
    assert record["model"] is None  # it was never a folder
    for name, digest in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    written = {path.name for path in folder.iterdir()} - {RECORD}
    assert set(record["files"]) == written == {"config.json", "model.safetensors",
                                               "quantize_config.json"}  # fmt: skip


def test_the_model_is_named_where_its_folder_is_its_own(model, tmp_path):
    artifact = lqec.save(model, tmp_path / "artifact")
    done = lqec.export(artifact, tmp_path / "one", "gptq")
    assert read_record(done.folder)["model"] == str(artifact)
    # Compressed in memory, a model still knows the dense folder that it came from.
    (tmp_path / "dense").mkdir()
    done = lqec.export(replace(model, folder=tmp_path / "dense"), tmp_path / "two", "gptq")
    assert read_record(done.folder)["model"] is None


def test_damage_to_a_file_is_found(folder):
    record = read_record(folder)
    assert find_files(record, folder) == []
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    (folder / "quantize_config.json").unlink()
    assert find_files(record, folder) == [
        "model.safetensors is not the file that was exported (sha256 differs)",
        "quantize_config.json is missing",
    ]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": "gguf"}, "format 'gguf' of version 1 is not read"),
        ({"format_version": 9}, "of version 9 is not read"),
        ({"files": None}, "files is missing or damaged"),
        ({"base_sha256": 5}, "base_sha256 is missing or damaged"),
        ({"format": ["hf"]}, "format ['hf'] of version 1 is not read"),
        ({"format_version": {}}, "of version {} is not read"),
        ({"files": {"../../etc/hosts": "0"}}, "files is missing or damaged"),
        ({"files": {"model.safetensors": 5}}, "files is missing or damaged"),
        ({"files": {"a\0b": "0"}}, "files is missing or damaged"),
        ({"dtype": "float9"}, "dtype is missing or damaged"),
        ({"dtype": ["auto"]}, "dtype is missing or damaged"),
        ({"model": 3}, "model is missing or damaged"),
        ({"base": {}}, "base is missing or damaged"),
        ({"base": "\0"}, "base is missing or damaged"),
        ({"base_only": "yes"}, "base_only is missing or damaged"),
        ({"exact_inputs": []}, "exact_inputs is missing or damaged"),
    ],
)
def test_a_damaged_record_is_refused(change, why, folder):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | change))
    assert why in refusal(read_record, folder)


def test_another_folder_is_no_export(tmp_path):
    assert f"has no {RECORD}" in refusal(read_record, tmp_path)


def test_the_hash_is_of_the_base_alone():
    model = make_model()
    wanted = hash_base(model.params)
    assert hash_base(drop_corrections(model.params)) == wanted
    other = jax.tree.map(lambda a: a, model.params)
    other["norm"] = {"scale": model.params["norm"]["scale"].at[3].add(1e-3)}
    assert hash_base(other) != wanted
    assert hash_base(make_model(symmetric=False).params) != wanted


def test_the_hash_does_not_see_how_blocks_are_stacked():
    model = make_model()
    apart = tuple(s for block in each_block(model.params) for s in stack_blocks([block]))
    assert (len(model.params["blocks"]), len(apart)) == (1, 2)
    assert hash_base({**model.params, "blocks": apart}) == hash_base(model.params)


def test_a_models_name_is_the_one_it_always_had():
    """Of arrays as `np.ascontiguousarray` gives them: a block's own window is an array of one."""
    model = make_model()
    segment = set_at(model.params["blocks"][0], "attn/window", np.array([3, 4], np.int32))
    params = {**model.params, "blocks": (segment,)}
    base = drop_corrections(params)
    blocks = {str(number): block for number, block in enumerate(each_block(base))}
    arrays = flatten({**base, "blocks": blocks})[0]
    assert arrays["blocks.1.attn.window"].shape == ()
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode() + array.tobytes())
    assert hash_base(params) == digest.hexdigest()
