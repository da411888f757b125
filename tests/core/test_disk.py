"""Arrays in files: zeros or what was there, and no page that has no place on the disk."""

import errno
import os
import shutil

import numpy as np
import pytest

from lqec_jax.core import disk
from lqec_jax.core.disk import make_array, map_array, reserve


def refuse_space(monkeypatch, number=errno.ENOSPC):
    def refuse(descriptor, offset, size):
        os.ftruncate(descriptor, size // 2)  # some file systems grow the file before they refuse
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)


def test_a_new_array_is_zeros_whatever_was_there(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"\x01" * 1000)
    array = make_array(path, np.float32, (3, 4))
    np.testing.assert_array_equal(array, np.zeros((3, 4)))
    assert path.stat().st_size == 48


def test_a_mapped_array_holds_what_it_held(tmp_path):
    path = tmp_path / "a.bin"
    map_array(path, np.int32, (4,))[:] = 7
    np.testing.assert_array_equal(map_array(path, np.int32, (4,)), [7, 7, 7, 7])
    assert path.stat().st_size == 16


def test_the_file_has_its_blocks_before_anything_is_written(tmp_path):
    map_array(tmp_path / "a.bin", np.uint8, (1 << 20,))
    stat = (tmp_path / "a.bin").stat()
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system reserves nothing")
    assert stat.st_blocks * 512 >= 1 << 20


def test_a_full_disk_is_an_error_that_counts_and_not_a_signal(tmp_path, monkeypatch):
    refuse_space(monkeypatch)
    with pytest.raises(OSError) as said:
        map_array(tmp_path / "a.bin", np.uint8, (4096,))
    assert said.value.errno == errno.ENOSPC and said.value.filename == str(tmp_path / "a.bin")
    assert "4096 bytes are wanted" in said.value.strerror and "are free" in said.value.strerror
    assert (tmp_path / "a.bin").stat().st_size == 0


def test_where_nothing_can_be_reserved_free_space_is_looked_at(tmp_path, monkeypatch):
    refuse_space(monkeypatch, errno.EOPNOTSUPP)
    reserve(tmp_path / "a.bin", 1000)
    assert (tmp_path / "a.bin").stat().st_size == 1000
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="2000 bytes are wanted for this file, 10 are free"):
        reserve(tmp_path / "b.bin", 2000)


def test_another_fault_of_the_disk_is_itself(tmp_path, monkeypatch):
    refuse_space(monkeypatch, errno.EIO)
    with pytest.raises(OSError) as said:
        reserve(tmp_path / "a.bin", 10)
    assert said.value.errno == errno.EIO
