"""An artifact against its own digests: all of it is read, and every fault is in one message."""

import json

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.io.artifact.artifact import META
from lqec_jax.io.tensor_file import SINGLE, read_header
from lqec_jax.io.verify.artifact import verify_artifact
from tests.io.packed_models import make_model


@pytest.fixture
def folder(tmp_path):
    return lqec.save(make_model(), tmp_path / "out")


def flip(path, place):
    raw = bytearray(path.read_bytes())
    raw[place] ^= 16
    path.write_bytes(raw)


def test_a_whole_one_says_what_was_compared(folder):
    found = verify_artifact(folder)
    entries = read_header(folder / SINGLE)
    assert (found.folder, found.format, found.tensors) == (folder, "artifact", len(entries))
    assert found.bytes == sum(entry.bytes for entry in entries.values())
    assert found.files == (META, "config.json")


def test_all_that_is_wrong_is_in_one_message(folder):
    flip(folder / SINGLE, -1)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    meta = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(meta | {"seed": 7}))
    with pytest.raises(CheckFailed) as said:
        verify_artifact(folder)
    for words in ("lqec.json was edited", "config.json is not as written",
                  "1 tensor is not as written"):  # fmt: skip
        assert words in str(said.value)


def test_what_cannot_be_read_is_a_failed_check(folder):
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-3])
    with pytest.raises(CheckFailed, match="not copied in full"):
        verify_artifact(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckFailed, match="has neither"):
        verify_artifact(folder)


def test_the_maker_in_a_header_is_compared(folder):
    raw = (folder / SINGLE).read_bytes()
    assert raw.count(b'"format":"lqec"') == 1
    (folder / SINGLE).write_bytes(raw.replace(b'"format":"lqec"', b'"format":"lqeb"'))
    with pytest.raises(CheckFailed, match="the header of model.safetensors"):
        verify_artifact(folder)


def test_the_command_says_it_and_fails_with_3(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert f"{folder}: " in out and "lqec.json, config.json are as they were written" in out
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "artifact"
    assert main(["verify", str(folder), "--against", "demo"]) == 2
    assert "leave out --against" in capsys.readouterr().err
    flip(folder / SINGLE, -1)
    assert main(["verify", str(folder)]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "is not as written" in err


def test_against_is_of_exports_alone(folder):
    with pytest.raises(InputError, match="compared with its own digests"):
        lqec.verify(folder, "demo")
