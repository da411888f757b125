"""An export is whole or absent, replaces nothing, and says what it is of."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io.base import hash_base
from lqec_jax.io.exports import dense as hf_export
from lqec_jax.io.exports.export import FORMATS, RECORD, export_model, find_files, read_record
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


def test_equal_models_give_equal_bytes(model, folder, tmp_path):
    again = export_model(model, tmp_path / "again", "gptq").folder
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_nothing_is_replaced(model, folder):
    before = (folder / RECORD).read_bytes()
    assert "exists; an export replaces nothing" in refusal(export_model, model, folder, "hf")
    assert (folder / RECORD).read_bytes() == before


def test_a_failure_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("half way")

    monkeypatch.setattr(hf_export, "write_config", fail)
    with pytest.raises(RuntimeError, match="half way"):
        export_model(model, tmp_path / "deep" / "out", "hf")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_place_that_is_no_folder_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal(export_model, model, tmp_path / "file" / "out", "hf")
    assert "cannot be written" in line


@pytest.mark.parametrize(
    ("format", "options", "why"),
    [
        ("safetensors", {}, "format 'safetensors' is unknown; known: compressed-tensors, flax"),
        ("gptq", {"dtype": "int8"}, "dtype='int8'; one of auto, float32, bfloat16, float16"),
        ("gptq", {"gptq_version": 3}, "gptq_version=3; 1 or 2 was wanted"),
        ("hf", {"base_onyl": True}, "option 'base_onyl' is unknown; did you mean 'base_only'?"),
        ("hf", {"gptq_version": 2}, "gptq_version is for format gptq, not hf"),
        ("gptq", {"base": "x"}, "base is for format peft, not gptq"),
        ("hf", {"dense": True}, "dense is for format flax, not hf"),
        ("peft", {"base_only": True}, "which are all that peft holds"),
    ],
)
def test_options_are_checked_first(format, options, why, model, tmp_path):
    assert why in refusal(export_model, model, tmp_path / "out", format, **options)
    assert list(tmp_path.iterdir()) == []


def test_every_format_has_its_writer_and_reader():
    from lqec_jax.io.verify.verify import READERS

    assert set(READERS) == set(FORMATS)


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
    ],
)
def test_a_damaged_record_is_refused(change, why, folder):
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps(record | change))
    assert why in refusal(read_record, folder)


def test_another_folder_is_no_export(tmp_path):
    assert f"has no {RECORD}" in refusal(read_record, tmp_path)


def test_a_dtype_rounds_scales_and_never_codes(model, tmp_path):
    from safetensors.numpy import load_file

    done = export_model(model, tmp_path / "out", "gptq", dtype="bfloat16")
    tensors = load_file(done.folder / "model.safetensors")
    kinds = {name.rpartition(".")[2]: array.dtype.name for name, array in tensors.items()}
    assert kinds == {"qweight": "int32", "qzeros": "int32", "g_idx": "int32", "scales": "bfloat16",
                     "weight": "bfloat16"}  # fmt: skip
    assert np.isfinite(tensors["lm_head.weight"].astype(np.float32)).all()
