"""Files are whole or absent: what a failure leaves, and what is left beside them."""

import os
import stat

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lqec_jax.io import files
from lqec_jax.io.files import replace_folder, write_json, write_tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_json_comes_back_and_leaves_no_temporary_name(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None], "y": "é"})
    write_json(tmp_path / "a.json", {"x": 2})
    assert (tmp_path / "a.json").read_text() == '{\n "x": 2\n}\n'
    assert names(tmp_path) == ["a.json"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    before = (tmp_path / "a.json").read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"x": list(range(99999)), "y": object()})
    assert (tmp_path / "a.json").read_bytes() == before


def test_a_disk_that_fails_before_the_rename_leaves_the_old_files(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("no space left")

    write_json(tmp_path / "a.json", {"x": 1})
    write_tensors(tmp_path / "a.safetensors", {"x": np.zeros(3)})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "a.json", {"x": 2})
    with pytest.raises(OSError, match="no space"):
        write_tensors(tmp_path / "a.safetensors", {"x": np.ones(3)})
    assert {path: path.read_bytes() for path in before} == before


def test_arrays_come_back_whatever_their_layout_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    whole = rng.standard_normal((4, 6)).astype(np.float32)
    arrays = {
        "transposed": whole.T,
        "strided": whole[::2, 1::2],
        "swapped": rng.standard_normal((2, 3, 4)).swapaxes(0, 2),
        "scalar": np.float16(0.5).reshape(()),
        "empty": np.zeros((0, 3), np.uint32),
        "half": whole.astype(ml_dtypes.bfloat16).T,
    }
    write_tensors(tmp_path / "a.safetensors", arrays)
    came = load_file(tmp_path / "a.safetensors")
    assert set(came) == set(arrays)
    for name, array in arrays.items():
        assert (came[name].shape, came[name].dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(came[name], array)
    assert names(tmp_path) == ["a.safetensors"]


def test_equal_arrays_give_equal_bytes_in_any_order(tmp_path):
    arrays = {"b": np.arange(4.0), "a": np.ones((2, 2), np.float16), "c": np.arange(3)}
    write_tensors(tmp_path / "one", arrays)
    write_tensors(tmp_path / "two", dict(reversed(arrays.items())))
    write_tensors(tmp_path / "other", {**arrays, "c": np.arange(1, 4)})
    one, two, other = ((tmp_path / name).read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a", {"x": np.zeros(1)})
        assert os.umask(0o027) == 0o027  # as it was found
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_takes_the_place_of_another_and_of_nothing_else(tmp_path, exists):
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "mine").write_text("kept")
    if exists:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "stale").write_text("stale")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("new")
    replace_folder(tmp_path / "new", tmp_path / "out")
    assert names(tmp_path) == ["out", "out.old"]
    assert names(tmp_path / "out") == ["a"]
    assert (tmp_path / "out.old" / "mine").read_text() == "kept"
