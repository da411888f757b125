"""`lqec plan` prints what the plan says, and writes it as JSON."""

import json

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from tests.planning.shapes import LLAMA_7B

RECIPE = "rtn(bits=2, group_size=64) | rilq(rank=64)"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return tmp_path


def test_it_prints_sizes_machines_and_the_paper_s_accounting(folder, capfd):
    assert main(["plan", str(folder), "--recipe", RECIPE]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    for words in ("32 x [4096, 11008]", "2.6763 bits per weight", "exactly", "Colab T4", "H200",
                  "x 1.071 (x 1.057 without", "x 1.05)", "OUT.partial", "4.93 GB and 5.6 times",
                  "2.81 GB, 5.0 times less than the 13.97 GB"):  # fmt: skip
        assert words in out, words
    assert list(folder.iterdir()) == [folder / "config.json"]


def test_json_is_the_python_answer(folder, capfd):
    assert main(["plan", str(folder), "--recipe", RECIPE, "--windows", "64", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts == lqec.plan(str(folder), RECIPE, windows=64)


def test_bad_input_is_one_line(folder, capfd):
    assert main(["plan", str(folder / "missing"), "--recipe", RECIPE]) == 2
    assert main(["plan", str(folder), "--recipe", "rtn(bit=2)"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 2
