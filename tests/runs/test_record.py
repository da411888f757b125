"""What is on record of a run's files, and that no other byte is believed."""

import hashlib

import ml_dtypes
import numpy as np
import pytest

from lqec_jax.core.disk import map_array
from lqec_jax.errors import InputError
from lqec_jax.runs.record import StreamWriter, check_file, check_size, describe_file

SHAPE = (5, 8, 3)  # five windows, of which two walk together


@pytest.fixture
def stream(tmp_path):
    """A stream that is filled, and its record."""
    values = np.random.RandomState(0).standard_normal(SHAPE).astype(ml_dtypes.bfloat16)
    writer = StreamWriter(map_array(tmp_path / "s.bin", values.dtype, SHAPE))
    for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):
        writer.put(rows, values[rows])
    return tmp_path / "s.bin", values, writer.finish()


def refusal(path, record):
    with pytest.raises(InputError) as said:
        check_file(path.parent, path.name, record)
    assert "--overwrite" in str(said.value) and "s.bin" in str(said.value)
    return str(said.value)


def test_a_stream_is_hashed_as_it_is_written(stream):
    path, values, record = stream
    pieces = [values[rows].tobytes() for rows in (slice(0, 2), slice(2, 4), slice(4, 5))]
    assert path.read_bytes() == b"".join(pieces)
    assert record["sha256"] == [hashlib.sha256(piece).hexdigest() for piece in pieces]
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
    assert writer.finish()["sha256"] == []
    np.testing.assert_array_equal(np.fromfile(tmp_path / "s.bin", np.float32), np.ones(4))
