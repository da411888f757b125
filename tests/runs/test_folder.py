"""An unfinished run: what it keeps, whom it lets continue, and that a refusal touches nothing."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import META
from lqec_jax.runs.folder import (
    NO_DIGESTS,
    REMADE,
    STATE,
    Run,
    check_run,
    partial_folder,
    read_state,
)
from lqec_jax.runs.record import StreamWriter
from lqec_kernels.formats import Affine, CompressedLinear, LowRank
from tests.golden.tiny_checkpoint import hash_folder

SETTINGS = {"recipe": "rtn(bits=2)", "seed": 0, "windows": [10, 2], "held_out": None}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def begin(out, settings=SETTINGS, *, resume=False, overwrite=False):
    return Run.begin(out, settings, resume=resume, overwrite=overwrite)


def refusal(call, *arguments, **named):
    """Returns the one line of a refusal."""
    with pytest.raises(InputError) as said:
        call(*arguments, **named)
    assert "\n" not in str(said.value)
    return str(said.value)


def write_old_artifact(out):
    out.mkdir()
    (out / META).write_text("{}")
    (out / "weights").write_text("old")


def test_a_new_run_is_on_disk_before_any_work(out):
    run = begin(out)
    assert run.folder == partial_folder(out) == out.with_name("out.partial")
    assert read_state(run.folder) == {"fingerprint": SETTINGS, "phase": 0, "blocks": 0}
    assert not out.exists()


def test_what_was_committed_is_there_when_the_run_is_taken_up(out):
    run = begin(out)
    run.commit(blocks=3, linears={"blocks/0/q": {"bits_per_weight": 2.5}})
    run.commit(phase=1, blocks=0)
    state = begin(out, resume=True).state
    assert state == run.state
    assert (state["phase"], state["blocks"]) == (1, 0)
    assert state["linears"] == {"blocks/0/q": {"bits_per_weight": 2.5}}
    assert sorted(path.name for path in run.folder.iterdir()) == [STATE]


def test_other_settings_are_named_and_nothing_changes(out):
    begin(out).commit(blocks=1)
    before = hash_folder(out.parent)
    other = SETTINGS | {"seed": 1, "held_out": "abc", "new": 5}
    said = refusal(begin, out, other, resume=True)
    assert "was begun with other settings" in said
    assert "seed was 0, is 1; held_out was None, is 'abc'; new was None, is 5" in said
    assert "recipe" not in said and "windows" not in said
    assert hash_folder(out.parent) == before


def test_an_unfinished_run_is_neither_continued_nor_replaced_unasked(out):
    begin(out).commit(blocks=1)
    before = hash_folder(out.parent)
    said = refusal(begin, out)
    assert "--resume" in said and "--overwrite" in said and str(partial_folder(out)) in said
    assert hash_folder(out.parent) == before


def test_overwrite_begins_again_with_nothing_of_before(out):
    old = begin(out)
    old.stream("student", 0, (2, 3), np.float32)[:] = 1
    old.commit(blocks=4)
    run = begin(out, SETTINGS | {"seed": 1}, overwrite=True)
    assert run.state == {"fingerprint": SETTINGS | {"seed": 1}, "phase": 0, "blocks": 0}
    assert list(hash_folder(run.folder)) == [STATE]


def test_there_must_be_something_to_resume(out):
    assert "there is no unfinished run at" in refusal(begin, out, resume=True)
    assert not partial_folder(out).exists()


def test_a_folder_that_is_no_run_is_left_alone_even_by_overwrite(out):
    partial_folder(out).mkdir()
    (partial_folder(out) / "mine").write_text("kept")
    before = hash_folder(out.parent)
    for overwrite in (False, True):
        assert "is no unfinished run" in refusal(begin, out, overwrite=overwrite)
    assert hash_folder(out.parent) == before


def test_a_kill_in_the_first_instant_stops_no_later_run(out):
    partial_folder(out).mkdir()
    (partial_folder(out) / f"{STATE}.0123abcd-7.tmp").write_text('{"fing')
    check_run(out, resume=False, overwrite=False)
    assert list(hash_folder(begin(out).folder)) == [STATE]


def test_a_finished_artifact_is_replaced_only_when_asked(out):
    write_old_artifact(out)
    assert "--overwrite" in refusal(begin, out)
    assert not partial_folder(out).exists()
    begin(out, overwrite=True)
    assert (out / "weights").read_text() == "old"


@pytest.mark.parametrize("text", ['{"phase": 0', '{"fingerprint": {}, "phase": "0", "blocks": 1}'])
def test_a_damaged_state_is_refused_in_one_line(out, text):
    folder = begin(out).folder
    (folder / STATE).write_text(text)
    said = refusal(begin, out, resume=True)
    assert STATE in said and "damaged" in said


def test_streams_keep_their_two_slots_apart_and_across_runs(out):
    run, shape = begin(out), (3, 4, 5)
    rng = np.random.default_rng(0)
    written = {}
    for name in ("teacher", "student"):
        for slot in (0, 1):
            written[name, slot] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
            stream = run.stream(name, slot, shape, jnp.bfloat16)
            stream[:] = written[name, slot]
            stream.flush()
    again = begin(out, resume=True)
    for (name, slot), values in written.items():
        stream = again.read_stream(name, slot, shape, jnp.bfloat16)
        assert stream.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(stream), values)
    assert (run.folder / "streams" / "teacher-1.bin").stat().st_size == 2 * 3 * 4 * 5


def test_a_block_comes_back_bit_for_bit(out):
    run = begin(out)
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (4, 32), np.uint32)
    scales, a, b = (rng.random(shape).astype(np.float16) for shape in ((2, 32), (64, 2), (2, 32)))
    leaf = CompressedLinear(Affine(words, scales, None, 2, 32, 64), (LowRank(a, b),))
    tree = {"attn": {"q": {"kernel": leaf}}, "norm": {"scale": np.ones(4, ml_dtypes.bfloat16)}}
    run.save_block(1, 7, tree)
    run.save_block(1, 8, {"norm": {"scale": np.zeros(4, np.float32)}})
    came = begin(out, resume=True).load_block(1, 7)
    assert jax.tree.structure(came) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(tree), strict=True):
        assert isinstance(a, jax.Array) and a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_leaves_the_artifact_alone(out):
    write_old_artifact(out)
    run = begin(out, overwrite=True)
    made = run.folder / "artifact"
    made.mkdir()
    (made / "weights").write_text("new")
    run.finish(made)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert list(hash_folder(out)) == ["weights"]
    assert (out / "weights").read_text() == "new"


def test_an_artifact_waits_for_its_name_once_it_is_whole(out):
    run = begin(out)
    folder = run.begin_artifact()
    (folder / "weights").write_text("half of it")
    assert run.artifact is None and begin(out, resume=True).artifact is None
    folder = begin(out, resume=True).begin_artifact()
    assert list(folder.iterdir()) == [] and oct(folder.stat().st_mode)[-3:] == "755"
    (folder / "weights").write_text("new")
    run.commit(artifact=True)
    again = begin(out, resume=True)
    assert again.artifact == run.artifact == folder
    again.finish(again.artifact)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "weights").read_text() == "new" and again.artifact is None


def test_a_run_without_a_name_works_in_a_folder_of_its_own():
    runs = [Run.begin(None, SETTINGS, resume=False, overwrite=False) for _ in range(2)]
    assert runs[0].folder != runs[1].folder
    for run in runs:
        run.commit(blocks=1)
        assert read_state(run.folder)["blocks"] == 1
        run.discard()
        assert not run.folder.exists()


# ---- what is read again is what was written


@pytest.fixture
def begun(out):
    """A run in its second phase with one of two blocks behind it, and everything on record."""
    run = begin(out)
    tree = {"norm": {"scale": np.arange(4, dtype=np.float32)}}
    for phase, layer in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the last is not committed
        run.save_block(phase, layer, jax.tree.map(lambda x, n=10 * phase + layer: x + n, tree))
    run.save_outer(0, {"embed": np.ones((2, 2), np.float32)})
    run.save_arrays("fisher/block-0.safetensors", {"q": np.ones(3, np.float32)})
    writer = StreamWriter(run.stream("student", 1, (4, 2, 3), np.float32))
    for rows in (slice(0, 2), slice(2, 4)):
        writer.put(rows, np.full((2, 2, 3), rows.start, np.float32))
    run.commit(phase=1, blocks=1, streams={"student": {"slot": 1, **writer.finish()}})
    return run.folder


READ_AGAIN = [
    "phase-0/block-0.safetensors", "phase-0/block-1.json", "phase-1/block-0.safetensors",
    "phase-0/outer.safetensors", "fisher/block-0.safetensors", "streams/student-1.bin",
]  # fmt: skip


@pytest.mark.parametrize("name", READ_AGAIN)
def test_no_file_of_a_run_is_believed_unseen(begun, out, name):
    path = begun / name
    data = path.read_bytes()
    begin(out, resume=True)
    flipped = bytearray(data)
    flipped[-2] ^= 4
    for changed in (bytes(flipped), data[:-1], b"", None):
        path.unlink(missing_ok=True)
        if changed is not None:
            path.write_bytes(changed)
        before = hash_folder(out.parent)
        said = refusal(begin, out, resume=True)
        assert name in said and str(begun) in said and "--overwrite" in said
        assert hash_folder(out.parent) == before
    path.write_bytes(data)
    assert begin(out, resume=True).notes == ()


def test_swapped_blocks_are_refused(begun, out):
    first, second = (begun / "phase-0" / f"block-{n}.safetensors" for n in (0, 1))
    data = first.read_bytes(), second.read_bytes()
    first.write_bytes(data[1])
    second.write_bytes(data[0])
    assert "block-0.safetensors is not as the run wrote it" in refusal(begin, out, resume=True)


def test_what_was_not_committed_may_be_anything(begun, out):
    (begun / "phase-1" / "block-1.safetensors").write_bytes(b"half")
    (begun / "streams" / "student-0.bin").write_bytes(b"half")
    before = read_state(begun)
    run = begin(out, resume=True)
    assert run.notes == () and run.artifact is None
    assert {name: run.state[name] for name in ("phase", "blocks")} == {
        name: before[name] for name in ("phase", "blocks")
    }


def test_a_damaged_artifact_that_waits_for_its_name_is_made_again(begun, out):
    run = begin(out, resume=True)
    (run.begin_artifact() / "weights").write_text("new")
    run.commit_artifact()
    assert begin(out, resume=True).artifact is not None
    (begun / "artifact" / "weights").write_text("neu")
    again = begin(out, resume=True)
    assert again.artifact is None and again.notes == (REMADE,)


def test_a_run_of_before_digests_goes_on_and_says_so(begun, out):
    state = read_state(begun)
    del state["files"], state["streams"]
    (begun / STATE).write_text(json.dumps(state))
    run = begin(out, resume=True)
    assert run.notes == (NO_DIGESTS,)
    run.read_stream("student", 1, (4, 2, 3), np.float32)
    (begun / "streams" / "student-1.bin").write_bytes(b"\0" * 40)
    for call in (run.read_stream, begin(out, resume=True).read_stream):
        said = refusal(call, "student", 1, (4, 2, 3), np.float32)
        assert "student-1.bin has 40 bytes, the run wrote 96" in said
    assert "teacher-0.bin is missing" in refusal(run.read_stream, "teacher", 0, (1,), np.float32)
