"""Sizes from shapes alone are those of what is written, to the byte."""

import json

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io import tensor_file
from lqec_jax.planning.sizes import measure_model
from lqec_jax.recipe import parse_recipe
from tests.golden.tiny_checkpoint import RAW, SEQLEN, make_tokens, write_checkpoint

RECIPES = ("rtn(bits=3, group_size=32) | svd(rank=3)", "rtn(bits=2, group_size=None)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("sizes") / "model")


def measure(folder, recipe=RECIPES[0]):
    return measure_model(str(folder), parse_recipe(recipe))


@pytest.mark.parametrize("shard_bytes", [tensor_file.SHARD_BYTES, 4000])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_artifact_has_the_planned_bytes(folder, tmp_path, recipe, shard_bytes, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", shard_bytes)
    small = lqec.compress(folder, recipe, make_tokens(4), seqlen=SEQLEN, windows=4)
    lqec.save(small, tmp_path / "out")
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 4000 else len(files) > 3
    sizes = measure(folder, recipe)
    assert sizes.files == sum(file.stat().st_size for file in files)
    assert sizes.student == sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    assert sizes.bits_per_weight == pytest.approx(small.report["bits_per_weight"], rel=1e-12)


def test_the_dense_model_has_the_checkpoint_s_bytes(folder):
    sizes = measure(folder)
    stored = lqec.load(folder, dtype="float32").params
    assert sizes.dense == sum(leaf.nbytes for leaf in jax.tree.leaves(stored))
    assert sizes.adapters == 5 * 3 * sum(row["d_in"] + row["d_out"] for row in sizes.rows)
    assert sizes.largest == 32 * 64


def test_weights_are_not_needed_and_their_dtype_is_read_from_the_config(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**RAW, "torch_dtype": "bfloat16"}))
    alone, whole = measure(tmp_path), measure(folder)
    assert alone.linears == whole.linears
    assert (alone.dense, alone.stored_dtype.itemsize) == (whole.dense // 2, 2)


def test_nothing_of_the_weights_is_read(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    data[length:] = np.full((len(data) - length) // 4, np.nan, np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    assert measure(tmp_path) == measure(folder)


def test_an_unknown_dtype_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**RAW, "torch_dtype": "int8"}))
    with pytest.raises(InputError, match="dtype 'int8'.*one of float32"):
        measure(tmp_path)
