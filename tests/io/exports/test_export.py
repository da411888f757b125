"""An export is whole or absent, replaces nothing, and keeps its numbers."""

import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.exports import dense as hf_export
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.record import RECORD
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


def test_a_refused_option_leaves_nothing(model, tmp_path):
    for options, why in [({"gptq_version": 3}, "gptq_version=3; 1 or 2 was wanted"),
                         ({"dtype": "int8"}, "dtype='int8'")]:  # fmt: skip
        assert why in refusal(export_model, model, tmp_path / "out", "gptq", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_rounds_scales_and_never_codes(model, tmp_path):
    from safetensors.numpy import load_file

    done = export_model(model, tmp_path / "out", "gptq", dtype="bfloat16")
    tensors = load_file(done.folder / "model.safetensors")
    kinds = {name.rpartition(".")[2]: array.dtype.name for name, array in tensors.items()}
    assert kinds == {"qweight": "int32", "qzeros": "int32", "g_idx": "int32", "scales": "bfloat16",
                     "weight": "bfloat16"}  # fmt: skip
    assert np.isfinite(tensors["lm_head.weight"].astype(np.float32)).all()
