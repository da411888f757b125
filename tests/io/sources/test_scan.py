"""One pass hashes a checkpoint and finds what is not finite, wherever it lies."""

import hashlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io import tensor_file
from lqec_jax.io.sources.scan import check_finite, count_non_finite, scan_checkpoint
from lqec_jax.io.tensor_file import read_header


def write(folder, **arrays):
    """Writes a config and two files of tensors; returns the config and the tensors' places."""
    (folder / "config.json").write_text('{"a": 1}')
    names = sorted(arrays)
    entries = {}
    for number, part in enumerate((names[::2], names[1::2])):
        path = folder / f"{number}.safetensors"
        save_file({name: arrays[name] for name in part}, path)
        entries |= read_header(path)
    return folder / "config.json", entries


def make_arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((5, 7)).astype(dtype) for name in "abcd"}


def hash_files(folder):
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize("chunk", [8, 8 << 20])
def test_files_are_hashed_whole_and_looked_at_once(tmp_path, monkeypatch, chunk):
    config, entries = write(tmp_path, **make_arrays(), codes=np.ones(3, np.int8))
    seen = []
    monkeypatch.setattr(tensor_file, "_CHUNK", chunk)
    monkeypatch.setattr(
        "lqec_jax.io.sources.scan.count_non_finite",
        lambda array: seen.append(array.size) or count_non_finite(array),
    )
    assert scan_checkpoint(config, entries) == hash_files(tmp_path)
    assert sum(seen) == 4 * 35  # integers have no NaN
    # A tensor that no index names is a part of its file all the same.
    del entries["b"]
    assert scan_checkpoint(config, entries) == hash_files(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_first_bad_tensor_by_name_is_named_and_counted(tmp_path, dtype):
    arrays = make_arrays(dtype)
    arrays["c"][2, 3:6] = (np.nan, np.inf, -np.inf)
    arrays["d"][0, 0] = np.nan
    config, entries = write(tmp_path, **arrays)
    with pytest.raises(InputError, match="0.safetensors: 'c' holds 3 non-finite of 35 values"):
        scan_checkpoint(config, entries)
    with pytest.raises(InputError, match="'c' holds 3 non-finite of 35 values"):
        check_finite(arrays["c"], tmp_path / "0.safetensors", "c")


def test_a_file_that_became_shorter_is_named(tmp_path):
    config, entries = write(tmp_path, **make_arrays())
    path = tmp_path / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="1.safetensors: holds 130 of the 140 bytes"):
        scan_checkpoint(config, entries)
