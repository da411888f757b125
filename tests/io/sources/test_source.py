"""What lies in a folder is decided in one place, and weights come from there the same way."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import set_at
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import META
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.sources.flax import MSGPACK
from lqec_jax.io.sources.hf import EMBEDDED
from lqec_jax.io.sources.source import make_source, open_dense, open_folder, read_source
from lqec_jax.io.tensor_file import read_entry
from lqec_jax.planning.sizes import measure_model
from lqec_jax.recipe import parse_recipe
from tests.golden.tiny_checkpoint import write_checkpoint
from tests.io.packed_models import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("source") / "dense")


def test_a_folder_is_known_by_its_files(folder, tmp_path):
    assert open_folder(folder).kind == "dense" and open_folder(str(folder)).folder == folder
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    assert open_folder(bare).kind == "bare"
    (bare / MSGPACK).touch()
    assert open_folder(bare).kind == "flax"
    (bare / "model.safetensors").touch()  # which are read rather
    assert open_folder(bare).kind == "dense"
    (bare / META).write_text("{}")
    assert open_folder(bare).kind == "artifact"
    assert open_folder("demo").folder == EMBEDDED and open_folder("demo").kind == "dense"
    with pytest.raises(InputError, match="no folder .*nothing"):
        open_folder(tmp_path / "nothing")


def test_an_export_is_dense_or_for_other_tools(tmp_path):
    model = make_model()
    for format, kind in (("hf", "dense"), ("gptq", "export"), ("flax", "export")):
        out = tmp_path / format
        try:
            export_model(model, out, format, base_only=format == "gptq")
        except InputError as error:  # a model that the format cannot say
            pytest.fail(str(error))
        assert open_folder(out).kind == kind
    for verb in (lqec.load, lambda path: measure_model(path, parse_recipe("rtn()"))):
        with pytest.raises(InputError, match="gptq is an export .*; name the artifact it was"):
            verb(str(tmp_path / "gptq"))


def test_what_is_compressed_is_no_source(tmp_path):
    lqec.save(make_model(), tmp_path / "small")
    for read in (open_dense, read_source):
        with pytest.raises(InputError, match="small is compressed already; name the dense folder"):
            read(open_folder(tmp_path / "small"))


def test_opening_reads_no_block(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        "lqec_jax.io.sources.hf.read_entry",
        lambda entry: read.append(entry.shape) or read_entry(entry),
    )
    found = open_folder(folder)
    checkpoint, config, _ = open_dense(found)
    assert not read and config.layers == 5
    source = read_source(found)
    assert sorted(read) == [(32,), (64, 32), (64, 32)]  # norm, embedding, head
    block = source.block(1)
    assert len(read) == 3 + 9
    stored = checkpoint.read("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_array_equal(block["mlp"]["down"]["kernel"], stored.T)


def test_the_fingerprint_changes_with_the_model(folder, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    one, two = (read_source(open_folder(path)) for path in (folder, other))
    assert one.fingerprint != two.fingerprint
    assert one.folder == folder and one.raw_config == json.loads(
        (folder / "config.json").read_text()
    )


def test_a_model_in_memory_is_a_source_too(folder):
    model = lqec.load(folder)
    source, like = make_source(model), read_source(open_folder(folder))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), source.block(3), like.block(3))
    assert jax.tree.all(same) and source.fingerprint == like.fingerprint
    assert set(source.outer) == set(like.outer) == {"embed", "norm", "head"}
    broken = set_at(model.params, "norm/scale", model.params["norm"]["scale"].at[3].set(np.nan))
    with pytest.raises(InputError, match="hold NaN or Inf"):
        make_source(dataclasses.replace(model, params=broken))
    with pytest.raises(InputError, match="compressed already"):
        make_source(dataclasses.replace(model, recipe="rtn()"))
