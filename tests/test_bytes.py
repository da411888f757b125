"""A compression counts its bytes: what is read of the checkpoint, what is written of the result."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.io import files, tensor_file
from lqec_jax.io.artifact import artifact
from lqec_jax.io.sources import source
from lqec_jax.io.tensor_file import read_header
from tests.golden.tiny_checkpoint import RTN, SEQLEN, make_tokens, write_checkpoint

SHORT = "rilq(rank=2, updates=2, batch=4, eval_every=2)"
RECIPES = {
    "rtn": RTN,
    "rtn | rilq": f"{RTN} | {SHORT}",
    "gptq | rilq": f"gptq(bits=3, group_size=32) | {SHORT}",
    "rtn | svd | rilq": f"{RTN} | svd(rank=2) | {SHORT}",
}
WEIGHTS = "model.safetensors"

# Of safetensors files of two blocks, at most so many bytes say what is in them.
HEADERS = 2 * 4096


class CountingFile:
    """A file that says how many bytes of it were asked for."""

    def __init__(self, file, say):
        self.file, self.say = file, say

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def read(self, *size):
        content = self.file.read(*size)
        self.say(len(content))
        return content


class Meter:
    """Counts bytes of safetensors by where they lie: `dense`, `run` or `artifact`.

    Attributes:
      read: bytes of whole files, headers included.
      written: bytes of blocks' arrays.
      before: the same as `read`, when the artifact began to be read back.
    """

    def __init__(self, monkeypatch):
        self.read, self.written, self.before = Counter(), Counter(), None
        fromfile, opened = np.fromfile, Path.open
        save, load = files.save_file, artifact.load_artifact

        def count_array(path, dtype, count, offset):
            array = fromfile(path, dtype, count, offset=offset)
            self.note(path, array.nbytes)
            return array

        def count_file(path, mode="r", *rest, **named):
            file = opened(path, mode, *rest, **named)
            counted = path.suffix == ".safetensors" and mode == "rb"
            return CountingFile(file, lambda size: self.note(path, size)) if counted else file

        def count_saved(arrays, path, **named):
            own = path.parent.name.startswith("phase-")
            blocks = [a for name, a in arrays.items() if own or name.startswith("blocks.")]
            self.written[self.place(path)] += sum(a.nbytes for a in blocks)
            save(arrays, path, **named)

        def look(*arguments):
            self.before = Counter(self.read)
            return load(*arguments)

        monkeypatch.setattr(np, "fromfile", count_array)
        monkeypatch.setattr(Path, "open", count_file)
        monkeypatch.setattr(files, "save_file", count_saved)
        monkeypatch.setattr(artifact, "load_artifact", look)

    def note(self, path, size):
        self.read[self.place(Path(path))] += size

    def place(self, path):
        rooms = {"model": "dense", "artifact": "artifact"}
        return rooms.get(path.parent.name, "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_checkpoint(folder / "model", num_hidden_layers=2)
    return folder


def compress(folder, name, monkeypatch, out=None):
    """Returns what was counted, the checkpoint's bytes and those of the result's blocks."""
    meter = Meter(monkeypatch)
    out = folder / name.replace(" | ", "-") if out is None else out
    lqec.compress(folder / "model", RECIPES[name], make_tokens(10), seqlen=SEQLEN, out=out,
                  overwrite=True)  # fmt: skip
    monkeypatch.undo()
    entries = read_header(out / WEIGHTS)
    blocks = sum(entry.bytes for key, entry in entries.items() if key.startswith("blocks."))
    return meter, (folder / "model" / WEIGHTS).stat().st_size, blocks, out


@pytest.mark.parametrize("name", RECIPES)
def test_dense_bytes_are_read_twice_and_packed_ones_written_twice(folder, name, monkeypatch):
    meter, dense, blocks, out = compress(folder, name, monkeypatch)
    # Once to be hashed and looked at, once to be compressed.
    assert 2 * dense - meter.read["dense"] == 0
    # A streamed phase into the run's folder, the result into the artifact; no more.
    assert 0 < meter.written["run"] <= blocks == meter.written["artifact"]
    assert set(meter.written) == {"run", "artifact"}
    # A file of the run is read once, for the digest on record; at the end the artifact is twice, to
    # be compared with memory and for its own.
    assert meter.read["run"] == meter.before["run"] <= blocks + HEADERS
    assert meter.before["artifact"] == 0
    assert meter.read["artifact"] == 2 * (out / WEIGHTS).stat().st_size


@pytest.mark.parametrize(("name", "times"), [("rtn", 0), ("rtn | rilq", 1)])
def test_blocks_of_a_large_model_are_read_again_for_the_report_of_a_training(
    folder, name, times, monkeypatch
):
    monkeypatch.setattr(source, "KEPT_BYTES", 0)
    entries = read_header(folder / "model" / WEIGHTS)
    inside = sum(entry.bytes for key, entry in entries.items() if key.startswith("model.layers."))
    meter, dense, *_ = compress(folder, name, monkeypatch, folder / f"large {times}")
    assert meter.read["dense"] == 2 * dense + times * inside


def test_a_run_without_a_name_writes_no_block(folder, monkeypatch):
    meter = Meter(monkeypatch)
    monkeypatch.setattr(files, "save_file", lambda *_, **__: pytest.fail("a block was written"))
    lqec.compress(folder / "model", RECIPES["rtn | rilq"], make_tokens(10), seqlen=SEQLEN)
    assert meter.read["run"] == 0 and meter.before is None


def test_the_meter_counts(tmp_path, monkeypatch):
    meter = Meter(monkeypatch)
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / WEIGHTS
    files.write_tensors(path, {"blocks.a": np.ones(10, np.float32), "norm": np.ones(3)})
    assert meter.written == {"dense": 40}
    (entry, _) = tensor_file.read_header(path).values()
    header = meter.read["dense"]
    tensor_file.read_entry(entry)
    list(tensor_file.read_chunks(path, 0, 17))
    assert header > 8 and meter.read["dense"] == header + entry.bytes + 17
