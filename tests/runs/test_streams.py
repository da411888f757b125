"""Streams on disk: two slots a stream, and what passes from one into the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import walking
from lqec_jax.errors import InputError
from lqec_jax.runs.folder import Run
from lqec_jax.runs.record import check_file
from lqec_jax.runs.streams import Streams
from tests.train.tiny import draw_plain, plain_fns

WINDOWS = np.random.RandomState(0).randint(0, 64, (5, 8)).astype(np.int32)


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(walking, "STREAM_TOKENS", 16)  # two windows together, and one left over
    run = Run.begin(None, {}, resume=False, overwrite=False)
    walked = {"teacher": WINDOWS, "student": WINDOWS[3:]}
    yield Streams(run, plain_fns(), walked, 32, np.float32)
    run.discard()


def test_windows_walk_block_by_block(streams):
    params = draw_plain((2, 3), 32)
    dense = [{"mix": {"kernel": jnp.asarray(b["mix"]["kernel"].dense()[0])}}
             for b in params["blocks"]]  # fmt: skip
    streams.open(params, ("teacher", "student"))
    h = params["embed"][WINDOWS]
    np.testing.assert_array_equal(streams.slot("teacher", 0), h)
    np.testing.assert_array_equal(streams.slot("student", 0), h[3:])
    block = jax.jit(plain_fns().block)
    for layer, weights in enumerate(dense):
        streams.advance("teacher", layer, weights)
        np.testing.assert_array_equal(streams.slot("teacher", layer), h)  # what it began with
        h = np.asarray(block(weights, h)[0])
        np.testing.assert_allclose(streams.slot("teacher", layer + 1), h, rtol=1e-5, atol=1e-6)
    read = list(streams.inputs(0, dense[0], "mix", 1))
    np.testing.assert_array_equal(np.concatenate(read), streams.slot("student", 0)[:1])


def test_rows_cover_every_window_once(streams):
    assert [streams.rows(n) for n in (5, 1, 0)] == [
        [slice(0, 2), slice(2, 4), slice(4, 5)], [slice(0, 1)], []
    ]  # fmt: skip


def test_every_slot_has_its_place_before_there_is_any_work(streams):
    streams.reserve()
    sizes = {p.name: p.stat().st_size for p in (streams.run.folder / "streams").iterdir()}
    teacher, student = 5 * 8 * 32 * 4, 2 * 8 * 32 * 4
    assert sizes == {"teacher-0.bin": teacher, "teacher-1.bin": teacher,
                     "student-0.bin": student, "student-1.bin": student}  # fmt: skip


def test_a_slot_that_is_short_is_refused_and_not_filled_up_with_zeros(streams):
    streams.reserve()
    path = streams.run.folder / "streams" / "teacher-0.bin"
    for data in (b"", b"\0" * 100):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"teacher-0.bin has {len(data)} bytes, the run wrote"):
            streams.slot("teacher", 0)
        assert path.stat().st_size == len(data)


def test_a_run_that_can_be_resumed_has_its_streams_on_record(tmp_path):
    run = Run.begin(tmp_path / "out", {}, resume=False, overwrite=False)
    own = Streams(run, plain_fns(), {"teacher": WINDOWS}, 32, np.float32)
    params = draw_plain((2,), 32)
    own.open(params, ("teacher",))
    assert own.written == {}
    kernel = jnp.asarray(params["blocks"][0]["mix"]["kernel"].dense()[0])
    own.advance("teacher", 0, {"mix": {"kernel": kernel}})
    record = own.written["teacher"]
    assert record["slot"] == 1
    check_file(run.folder, "streams/teacher-1.bin", record)
