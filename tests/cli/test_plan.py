"""`lqec plan` prints what the plan says, and writes it as JSON."""

import json

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from tests.golden.tiny_checkpoint import RAW
from tests.planning.shapes import LLAMA_7B

RECIPE = "rtn(bits=2, group_size=64) | rilq(rank=64)"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path


def test_it_prints_sizes_and_machines(folder, capfd):
    assert main(["plan", str(folder), "--recipe", RECIPE]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for words in ("32 x [4096, 11008]", "2.6763 bits per weight", "exactly", "Colab T4", "H200",
                  "OUT.partial"):  # fmt: skip
        assert words in out, words
    assert "INT2.1" not in out
    assert list(folder.iterdir()) == [folder / "config.json"]


def test_a_paper_s_accounting_is_added_where_it_is_asked_for(folder, capfd):
    command = ["plan", str(folder), "--recipe", RECIPE]
    assert main([*command, "--paper", "int2.1"]) == 0
    out = capfd.readouterr().out
    for words in ("x 1.071 (x 1.057 without", "x 1.05)", "4.93 GB and 5.6 times",
                  "2.81 GB, 5.0 times less than the 13.97 GB"):  # fmt: skip
        assert words in out, words
    assert main([*command, "--paper", "int2.1", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["int21"]["rank"] == 32
    assert main([*command, "--paper", "rilq"]) == 2
    assert "paper='rilq'; one of 'int2.1' was wanted" in capfd.readouterr().err


def test_sizes_of_a_small_model_are_no_zeros(tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    recipe = "rtn(bits=3, group_size=32) | rilq(rank=2)"
    assert main(["plan", str(tmp_path), "--recipe", recipe, "--seqlen", "32"]) == 0
    out = capfd.readouterr().out
    assert " 0.00 " not in out and " 0 bytes" not in out
    assert "kB" in out


def test_json_is_the_python_answer(folder, capfd):
    assert main(["plan", str(folder), "--recipe", RECIPE, "--windows", "64", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts == lqec.plan(str(folder), RECIPE, windows=64)


def test_bad_input_is_one_line(folder, capfd):
    assert main(["plan", str(folder / "missing"), "--recipe", RECIPE]) == 2
    assert main(["plan", str(folder), "--recipe", "rtn(bit=2)"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 2
