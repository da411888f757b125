"""A run that fails at any of its writes ends, once resumed, in the bytes of an unbroken one.

Every write of a tiny run is a case, of which a sample is run by default; --slow runs all of them.
"""

import errno
import os

import pytest

from lqec_jax.cli import main
from lqec_jax.runs.folder import partial_folder
from lqec_jax.runs.state import STATE
from tests.faults.disk import Disk, Killed
from tests.golden.tiny_checkpoint import RTN, hash_folder, write_checkpoint, write_tokens

RECIPES = {
    # The clip search reads the student's stream, so that a stream which was not kept would show.
    "rtn": "rtn(bits=3, group_size=32, clip_search='output')",
    "rilq": f"{RTN} | rilq(rank=2, updates=8, batch=4, eval_every=4, patience=0)",
}
KEPT = ("model.safetensors", "lqec.json", "config.json")
# (recipe, writes of its run): were one more or less, a case would be missing or never fail.
WRITES = {"rtn": 33, "rilq": 40}
SAMPLE = {"rtn": (1, 8, 19, 26, 33), "rilq": (12, 24, 31, 37)}
CASES = [
    pytest.param(name, n, marks=() if n in SAMPLE[name] else pytest.mark.slow, id=f"{name}-{n}")
    for name, count in WRITES.items()
    for n in range(1, count + 1)
]


def kill():
    raise Killed


def fill():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the model and the text, and of each recipe what an unbroken run makes."""
    folder = tmp_path_factory.mktemp("faults")
    write_checkpoint(folder / "model", num_hidden_layers=2)
    write_tokens(folder / "calib.npy", 8)
    made = {}
    for name in RECIPES:
        counting = Disk()
        with pytest.MonkeyPatch.context() as patch:
            counting.under(patch)
            assert main(command(folder, name, folder / name)) == 0
        made[name] = counting.count, read_kept(folder / name)
    return folder, made


def command(folder, name, out):
    return ["compress", str(folder / "model"), str(out), "--recipe", RECIPES[name], "--calib",
            str(folder / "calib.npy"), "--seqlen", "32", "--windows", "8", "--quiet"]  # fmt: skip


def read_kept(out):
    hashes = hash_folder(out)
    return {name: hashes[name] for name in KEPT}


def begin_or_resume(folder, name, out):
    begun = (partial_folder(out) / STATE).is_file()
    return main([*command(folder, name, out), *(["--resume"] if begun else [])])


def break_run(folder, name, out, n, fail):
    """Runs until write n fails; returns what main returned, None where it was killed."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(n, fail).under(patch)
        try:
            return main(command(folder, name, out))
        except Killed:
            return None


def test_the_cases_are_all_writes_of_a_run(whole):
    assert {name: count for name, (count, _) in whole[1].items()} == WRITES


@pytest.mark.parametrize(("name", "n"), CASES)
def test_a_kill_at_a_write_changes_no_byte(whole, tmp_path, name, n):
    folder, made = whole
    assert break_run(folder, name, tmp_path / "out", n, kill) is None
    assert not (tmp_path / "out").exists()
    assert begin_or_resume(folder, name, tmp_path / "out") == 0
    assert read_kept(tmp_path / "out") == made[name][1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("name", "n"), CASES)
def test_a_full_disk_at_a_write_is_one_line_and_changes_no_byte(whole, tmp_path, name, n, capfd):
    folder, made = whole
    capfd.readouterr()
    assert break_run(folder, name, tmp_path / "out", n, fill) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and os.strerror(errno.ENOSPC) in said and "--resume" in said
    assert begin_or_resume(folder, name, tmp_path / "out") == 0
    assert read_kept(tmp_path / "out") == made[name][1]
