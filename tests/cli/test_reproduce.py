"""`lqec reproduce`: what it prints, and its exit codes."""

import json

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from tests.golden.tiny_checkpoint import RTN, SEQLEN, write_checkpoint, write_tokens
from tests.io.packed_models import make_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    write_tokens(tmp_path / "calib.npy", 4)
    lqec.compress("model", RTN, "calib.npy", seqlen=SEQLEN, out="small")
    return tmp_path


def test_it_says_that_the_bytes_are_the_same_or_where_they_are_not(folder, capsys):
    assert main(["reproduce", "small", "--quiet"]) == 0
    assert "small: reproduced, " in capsys.readouterr().out
    assert main(["reproduce", "small", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unlike"] == []
    meta = json.loads((folder / "small" / "lqec.json").read_text())
    meta["digests"]["tensors"]["norm.scale"] = "0"
    (folder / "small" / "lqec.json").write_text(json.dumps(meta))
    assert main(["reproduce", "small", "--quiet"]) == 3
    assert "first 'norm.scale'; versions and cores are alike" in capsys.readouterr().err


def test_what_is_not_here_is_exit_code_2_and_one_line(folder, capsys):
    (folder / "calib.npy").rename(folder / "gone.npy")
    assert main(["reproduce", "small", "--quiet"]) == 2
    line = capsys.readouterr().err
    assert "'calib.npy' is not here; give --calib" in line and line.count("\n") == 1
    lqec.save(make_model(), folder / "hand")
    assert main(["reproduce", "hand"]) == 2
    assert "does not say how it was made" in capsys.readouterr().err
