"""The reader of one safetensors file: equal to the format's own library, refusing every damage."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io.tensor_file import DTYPES, read_chunks, read_entry, read_header, read_part


def write(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_reads_what_the_library_wrote_in_every_dtype(tmp_path):
    bits = np.random.default_rng(0).integers(0, 256, (2, 3, 8), np.uint8)
    arrays = {}
    for code, dtype in DTYPES.items():
        raw = bits % 2 if code == "BOOL" else bits
        arrays[code] = raw.view(dtype)
    save_file(arrays, tmp_path / "all.safetensors")
    entries = read_header(tmp_path / "all.safetensors")
    assert set(entries) == set(DTYPES)
    for code, wanted in arrays.items():
        came = read_entry(entries[code])
        assert (came.shape, came.dtype) == (wanted.shape, wanted.dtype)
        assert came.tobytes() == wanted.tobytes()
        assert entries[code].bytes == wanted.nbytes


def test_scalars_and_empty_tensors(tmp_path):
    arrays = {"a": np.array(3.5, np.float32), "b": np.zeros((0, 4), np.float32)}
    save_file(arrays, tmp_path / "f.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "f.safetensors")
    assert set(entries) == {"a", "b"}
    assert read_entry(entries["a"]) == 3.5 and read_entry(entries["b"]).shape == (0, 4)


@pytest.mark.parametrize(("axis", "start", "stop"), [(0, 1, 3), (1, 0, 2), (1, 3, 4), (2, 2, 5)])
def test_a_part_is_the_slice_of_the_whole(tmp_path, axis, start, stop):
    array = np.arange(3 * 4 * 5, dtype=np.float16).reshape(3, 4, 5)
    save_file({"a": np.ones(7, np.float32), "b": array}, tmp_path / "f.safetensors")
    part = read_part(read_header(tmp_path / "f.safetensors")["b"], axis, start, stop)
    assert part.dtype == array.dtype
    np.testing.assert_array_equal(part, np.take(array, range(start, stop), axis))


def test_reading_one_tensor_leaves_the_others_on_disk(tmp_path):
    megabyte = 1 << 18
    arrays = {f"t{i:02d}": np.full(megabyte, i, np.float32) for i in range(32)}
    save_file(arrays, tmp_path / "big.safetensors")
    tracemalloc.start()
    try:
        array = read_entry(read_header(tmp_path / "big.safetensors")["t07"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.unique(array) == 7
    assert array.nbytes <= peak < 1.25 * array.nbytes


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_a_file_cut_short_names_both_sizes(tmp_path, cut):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.ones((8, 8), np.float32)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    message = refusal(path)
    assert f"is {len(whole) - cut} bytes" in message and f"asks for {len(whole)}" in message


def test_a_file_cut_in_its_header_names_both_sizes(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.ones((8, 8), np.float32)}, path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    path.write_bytes(path.read_bytes()[:20])
    assert f"is 20 bytes, its header asks for at least {8 + length}" in refusal(path)


def test_a_file_too_long_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.ones(4, np.float32)}, path)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\0\0")
    assert f"is {size + 2} bytes, its header asks for {size}" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 64, b"<html>an error page</html>"])
def test_not_a_safetensors_file(tmp_path, content):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    assert f"{len(content)} bytes: not a safetensors file" in refusal(path)


def test_a_git_lfs_pointer_says_how_to_get_the_weights(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 99\n")
    assert "git lfs pull" in refusal(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b'{"w": {"dtype"', "damaged"),
        (b"\xff\xfe\xfd{}", "damaged"),
        (b"[1, 2]", "damaged"),
        ({"w": 5}, "damaged"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
        ({"w": entry(0, 16, [2])}, "does not fill its 16 bytes"),
        ({"w": entry(0, 8, [-2])}, "does not fill"),
        ({"w": entry(0, 8.0, [2])}, "damaged"),
        ({"w": entry(8, 16, [2])}, "hole or an overlap"),
        ({"w": entry(0, 8, [2]), "v": entry(4, 12, [2])}, "hole or an overlap"),
        ({"w": entry(0, 8, [16], "F4")}, "'F4'"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, said):
    assert said in refusal(write(tmp_path / "m.safetensors", header, b"\0" * 16))


def test_any_flipped_header_byte_is_refused_or_harmless(tmp_path):
    """No damage ends in a traceback, and no accepted file reads past its end."""
    path = tmp_path / "m.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, ml_dtypes.bfloat16)}, path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    refused = 0
    for at in range(8 + length):
        for flip in (1, 16, 128):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            try:
                for one in read_header(path).values():
                    assert read_entry(one).shape == one.shape
            except InputError as err:
                assert "\n" not in str(err)
                refused += 1
    assert refused > length  # most flips, of three a byte, are noticed


def test_a_file_that_changes_between_header_and_read_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": np.ones(64, np.float32)}, path)
    one = read_header(path)["w"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match="61 of the 64 values"):
        read_entry(one)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_entry(one)


def test_chunks_cover_the_range_once(tmp_path):
    content = np.random.default_rng(1).bytes((8 << 20) + 77)
    (tmp_path / "f").write_bytes(content)
    chunks = list(read_chunks(tmp_path / "f", 5, len(content) - 10))
    assert [len(chunk) for chunk in chunks] == [8 << 20, 67]
    assert b"".join(chunks) == content[5:-5]
