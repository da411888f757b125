"""What is on record of a run's files, and that no other byte is believed."""

import hashlib

import ml_dtypes
import numpy as np
import pytest

from lqec_jax.core.disk import map_array
from lqec_jax.errors import InputError
from lqec_jax.runs.record import (
    StreamWriter,
    check_file,
    check_size,
    describe_file,
    read_parts,
    sum_piece,
)

SHAPE = (5, 8, 3)  # five windows, of which two walk together


@pytest.fixture
def stream(tmp_path):
    """A stream that is filled, and its record."""
    values = np.random.RandomState(0).standard_normal(SHAPE).astype(ml_dtypes.bfloat16)
    writer = StreamWriter(map_array(tmp_path / "s.bin", values.dtype, SHAPE))
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        writer.put(rows, values[rows])
    return tmp_path / "s.bin", values, writer.finish()


def sum_by_hand(piece):
    """Sums a piece of less than a MiB as the module says, in integers of any length."""
    whole = len(piece) // 8 * 8
    words = [int.from_bytes(piece[at : at + 8], "little") for at in range(0, whole, 8)]
    sums = (sum(words), sum((2 * i + 1) * word for i, word in enumerate(words)),
            int.from_bytes(piece[whole:], "little"), len(piece))  # fmt: skip
    kept = b"".join((value % 2**64).to_bytes(8, "little") for value in sums)
    return hashlib.sha256(kept).hexdigest()


def refusal(path, record):
    with pytest.raises(InputError) as said:
        check_file(path.parent, path.name, record)
    assert "--overwrite" in str(said.value) and "s.bin" in str(said.value)
    return str(said.value)


def test_a_stream_is_hashed_as_it_is_written(stream):
    path, values, record = stream
    pieces = [values[rows].tobytes() for rows in (slice(0, 2), slice(2, 4), slice(4, 5))]
    assert path.read_bytes() == b"".join(pieces)
    assert record["sums"] == [sum_by_hand(piece) for piece in pieces]
    assert (record["bytes"], record["cut"]) == (values.nbytes, len(pieces[0]))
    check_file(path.parent, path.name, record)


def test_every_bit_of_a_stream_counts(stream):
    path, values, record = stream
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        piece = place // record["cut"] * record["cut"]
        assert f"from byte {piece} on" in refusal(path, record)


def test_a_stream_that_is_short_long_emptied_or_missing_is_refused(stream):
    path, values, record = stream
    data = path.read_bytes()
    for changed in (data[:-1], data + b"\0", b""):
        path.write_bytes(changed)
        assert f"has {len(changed)} bytes, the run wrote {len(data)}" in refusal(path, record)
    path.unlink()
    assert "is missing" in refusal(path, record)


def test_pieces_in_another_order_are_another_stream(stream):
    path, values, record = stream
    path.write_bytes(np.concatenate([values[2:4], values[:2], values[4:]]).tobytes())
    assert "from byte 0 on" in refusal(path, record)


def test_a_file_is_its_bytes(tmp_path):
    path = tmp_path / "s.bin"
    path.write_bytes(b"abc")
    record = describe_file(path)
    assert record == {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    check_file(tmp_path, "s.bin", record)
    path.write_bytes(b"abd")
    assert "is not as the run wrote it" in refusal(path, record)


def test_a_size_alone_can_be_checked(tmp_path):
    (tmp_path / "s.bin").write_bytes(b"abc")
    check_size(tmp_path, "s.bin", 3)
    with pytest.raises(InputError, match="s.bin has 3 bytes, the run wrote 4"):
        check_size(tmp_path, "s.bin", 4)


def test_a_stream_that_nobody_resumes_is_not_hashed(tmp_path):
    writer = StreamWriter(map_array(tmp_path / "s.bin", np.float32, (2, 2)), hashed=False)
    writer.put(slice(0, 2), np.ones((2, 2)))
    assert writer.finish()["sums"] == []
    np.testing.assert_array_equal(np.fromfile(tmp_path / "s.bin", np.float32), np.ones(4))


@pytest.mark.parametrize("size", [1, 7, 8, 1000, (1 << 20) + 5])
def test_a_sum_sees_neither_how_it_was_read_nor_less_than_all(tmp_path, size):
    data = np.random.RandomState(size).bytes(size)
    (tmp_path / "a").write_bytes(data)
    came = sum_piece(read_parts(tmp_path / "a", 0, size))
    assert came == sum_piece([memoryview(data)]) != sum_piece([memoryview(data + b"\0")])
    if size < 1 << 20:
        assert came == sum_by_hand(data)
    for place in {0, size // 2, size - 1}:
        changed = bytearray(data)
        changed[place] ^= 128
        assert sum_piece([memoryview(bytes(changed))]) != came
