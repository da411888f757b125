"""A run that fails at any of its writes ends, once resumed, in the bytes of an unbroken one.

Every write of a tiny run is a case, of which a sample is run by default; --slow runs all of them.
"""

import errno
import json
import os

import pytest

from lqec_jax.cli import main
from lqec_jax.runs.folder import Run, partial_folder
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
WRITES = {"rtn": 33, "rilq": 39}
SAMPLE = {"rtn": (1, 8, 19, 33), "rilq": (24, 31)}
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


# ---- what lies in OUT.partial is changed between two runs


@pytest.fixture
def unfinished(whole, tmp_path):
    """OUT of a run that was killed before its second block."""
    folder, _ = whole

    def before(run, **changes):
        if changes.get("blocks") == 2:
            raise Killed
        commit(run, **changes)

    commit = Run.commit
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "commit", before)
        main(command(folder, "rtn", tmp_path / "out"))
    return tmp_path / "out"


def rewrite_state(partial, change):
    state = json.loads((partial / STATE).read_text())
    change(state)
    (partial / STATE).write_text(json.dumps(state))


def edit_blocks(partial):
    rewrite_state(partial, lambda state: state.update(blocks=0))


def empty(partial):
    (partial / "streams" / "student-1.bin").write_bytes(b"")


def cut(partial):
    path = partial / "streams" / "student-1.bin"
    path.write_bytes(path.read_bytes()[:-1])


def lose_teacher(partial):
    (partial / "streams" / "teacher-1.bin").unlink()


def swap_streams(partial):
    student, teacher = (partial / "streams" / f"{n}-1.bin" for n in ("student", "teacher"))
    data = student.read_bytes()
    student.write_bytes(teacher.read_bytes())
    teacher.write_bytes(data)


def flip_block(partial):
    path = partial / "phase-0" / "block-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def forget_digests(partial):
    """Makes the run one of an earlier version, whose stream is cut short."""
    rewrite_state(partial, lambda state: [state.pop(n) for n in ("sha256", "files", "streams")])
    cut(partial)


CHANGES = {
    edit_blocks: STATE, empty: "student-1.bin has 0 bytes", cut: "student-1.bin has ",
    lose_teacher: "teacher-1.bin is missing", swap_streams: "not as the run wrote it",
    flip_block: "block-0.safetensors is not as the run wrote it",
    forget_digests: "student-1.bin has",
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_is_refused_by_name(whole, unfinished, change, capfd):
    change(partial_folder(unfinished))
    before = hash_folder(unfinished.parent)
    capfd.readouterr()
    assert begin_or_resume(whole[0], "rtn", unfinished) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and CHANGES[change] in said and "--overwrite" in said
    assert hash_folder(unfinished.parent) == before


def test_a_run_of_before_digests_ends_in_the_same_bytes_and_says_so(whole, unfinished, capfd):
    folder, made = whole
    partial = partial_folder(unfinished)
    rewrite_state(partial, lambda state: [state.pop(n) for n in ("sha256", "files", "streams")])
    arguments = [word for word in command(folder, "rtn", unfinished) if word != "--quiet"]
    assert main([*arguments, "--resume"]) == 0
    assert "kept no digests" in capfd.readouterr().err
    assert read_kept(unfinished) == made["rtn"][1]


def test_a_second_writer_at_any_commit_is_refused_and_changes_no_byte(whole, tmp_path, capfd):
    folder, made = whole
    commit, codes = Run.commit, []

    def meet(run, **changes):
        commit(run, **changes)
        with pytest.MonkeyPatch.context() as other:
            other.setattr(Run, "commit", commit)
            codes.append(main([*command(folder, "rtn", tmp_path / "out"), "--resume"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "commit", meet)
        assert main(command(folder, "rtn", tmp_path / "out")) == 0
    assert len(codes) > 4 and set(codes) == {2}
    assert capfd.readouterr().err.count("is being written by process") == len(codes)
    assert read_kept(tmp_path / "out") == made["rtn"][1]
