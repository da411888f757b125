"""Files are whole or absent: what a failure leaves, and what is left beside them."""

import errno
import os
import re
import signal
import stat
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lqec_jax.errors import InputError
from lqec_jax.io import files
from lqec_jax.io.files import (
    check_writable,
    read_json,
    replace_folder,
    staged_file,
    staged_folder,
    write_json,
    write_tensors,
    write_text,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from lqec_jax.io import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
{body}
"""
IN_FOLDER = """
with files.staged_folder(out, replace=True) as folder:
    (folder / "a").write_text("half")
    die()
"""
IN_FILE = """
with files.staged_file(out / "a") as file:
    file.write_text("half")
    die()
"""
# The old folder has left its place, the new one has not come there.
BETWEEN_RENAMES = """
rename, calls = os.replace, []
def replace(*paths):
    if calls:
        die()
    calls.append(paths)
    rename(*paths)
files.os.replace = replace
with files.staged_folder(out, replace=True) as folder:
    (folder / "a").write_text("new")
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill_in(body, out):
    script = KILLED.format(body=body)
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def old(tmp_path):
    """A folder `out` that holds a file, `a`, of the text "old"."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    return tmp_path / "out"


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


# ---- one file


def test_a_text_is_utf8_and_an_exception_half_way_leaves_the_old_one_alone(old):
    write_text(old / "a", "é\n")
    assert (old / "a").read_bytes() == b"\xc3\xa9\n"
    with pytest.raises(RuntimeError, match="half way"), staged_file(old / "a") as file:
        file.write_text("half")
        raise RuntimeError("half way")
    assert (old / "a").read_text("utf-8") == "é\n" and names(old) == ["a"]


def test_a_kill_within_a_file_leaves_the_old_one_and_a_name_that_the_next_call_removes(old):
    kill_in(IN_FILE, old)
    assert (old / "a").read_text() == "old" and len(names(old)) == 2
    left = names(old)[1]
    assert re.fullmatch(r"a\.[0-9a-f]{8}-\d+\.tmp", left)
    # Another host's, a living process's and a user's are not ours to remove.
    others = [f"a.00000000-{left.split('-')[1]}", f"{left.split('-')[0]}-{os.getppid()}.tmp",
              "a.tmp"]  # fmt: skip
    for name in others:
        (old / name).write_text("theirs")
    write_text(old / "a", "new")
    assert (old / "a").read_text() == "new" and names(old) == sorted(["a", *others])


def test_no_two_processes_write_under_one_name(old, monkeypatch):
    with staged_file(old / "a") as mine:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with staged_file(old / "a") as theirs:
            assert mine != theirs
            theirs.write_text("theirs")
        mine.write_text("mine")
    assert (old / "a").read_text() == "mine" and names(old) == ["a"]


def test_a_full_disk_under_safetensors_is_an_error_of_the_disk(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", refuse)
    with pytest.raises(OSError) as said:
        write_tensors(tmp_path / "a", {"x": np.zeros(1)})
    assert said.value.errno == errno.ENOSPC and said.value.filename == str(tmp_path / "a")
    assert names(tmp_path) == []


# ---- a folder


@pytest.mark.parametrize("replace", [False, True])
def test_a_staged_folder_has_its_name_only_when_it_is_whole(replace, tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out, replace=replace) as folder:
        (folder / "a").write_text("new")
        assert not out.exists() and folder.parent == out.parent
    assert names(out.parent) == ["out"] and (out / "a").read_text() == "new"
    assert stat.S_IMODE(out.stat().st_mode) == 0o755


def test_a_folder_gives_way_only_where_that_is_said(old):
    with staged_folder(old, replace=True) as folder:
        (folder / "b").write_text("new")
        assert names(old) == ["a"]
    assert names(old) == ["b"] and names(old.parent) == ["out"]
    with pytest.raises(OSError, match="not empty"), staged_folder(old) as folder:
        (folder / "c").write_text("newer")
    assert names(old) == ["b"] and names(old.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_half_way_leaves_the_old_folder_and_nothing_else(error, old):
    for replace in (True, False):
        with pytest.raises(error), staged_folder(old, replace=replace) as folder:
            (folder / "a").write_text("half")
            raise error
        assert (old / "a").read_text() == "old" and names(old.parent) == ["out"]


def test_a_kill_half_way_leaves_a_partial_folder_that_the_next_run_removes(old):
    kill_in(IN_FOLDER, old)
    assert (old / "a").read_text() == "old" and names(old) == ["a"]
    left, _ = names(old.parent)
    assert left.startswith(".out-") and left.endswith(".partial")
    # What only looks alike is somebody's.
    for name in (".out-mine.partial", ".outer-abcdefgh.partial", "out.partial"):
        (old.parent / name).mkdir()
    with staged_folder(old, replace=True) as folder:
        assert not (old.parent / left).exists()
        (folder / "a").write_text("new")
    assert names(old.parent) == [".out-mine.partial", ".outer-abcdefgh.partial", "out",
                                 "out.partial"]  # fmt: skip
    assert (old / "a").read_text() == "new"


def test_a_kill_between_the_renames_loses_neither_folder_and_the_next_run_removes_both(old):
    kill_in(BETWEEN_RENAMES, old)
    new, aside = sorted(names(old.parent), key=lambda name: name.endswith(".old"))
    assert (old.parent / new / "a").read_text() == "new"
    assert (old.parent / aside / "out" / "a").read_text() == "old"
    with staged_folder(old, replace=True) as folder:
        (folder / "a").write_text("newer")
        assert names(old.parent) == sorted([aside, folder.name])  # until there is another
    assert names(old.parent) == ["out"] and (old / "a").read_text() == "newer"


def test_what_another_writes_now_is_left_alone(tmp_path):
    out = tmp_path / "[out]*"  # a name is no pattern
    with staged_folder(out, replace=True) as first:
        (first / "a").write_text("first")
        with staged_folder(out, replace=True) as second:
            (second / "a").write_text("second")
            assert names(tmp_path) == sorted([first.name, second.name])
        assert (out / "a").read_text() == "second"
    assert names(tmp_path) == [out.name] and (out / "a").read_text() == "first"


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (check_writable, lambda out: staged_folder(out).__enter__()):
        with pytest.raises(InputError, match="file is no folder that you may write to"):
            call(tmp_path / "file" / "deep" / "out")
    assert names(tmp_path) == ["file"]


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


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_read_json_returns_the_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "é"}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": "é"}]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b": [2,\n', "line 3: not JSON"),
        (b'{"a": 1\n "b": 2}', "line 2: not JSON"),
        (b"", "line 1: not JSON"),
        (b"[1, 2]", "line 1: holds a list, wanted an object"),
        (b'{"a":\n"\xff"}', "line 2: not UTF-8"),
    ],
)
def test_read_json_names_file_and_line(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = refusal(read_json, path)
    assert said in message and str(path) in message


def test_read_json_missing_or_a_folder(tmp_path):
    assert "is missing" in refusal(read_json, tmp_path / "no.json")
    assert "cannot be read" in refusal(read_json, tmp_path)
