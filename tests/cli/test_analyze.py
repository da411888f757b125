"""`lqec analyze rank`: what its options become, and what it prints."""

import json

import pytest

from lqec_jax.analysis import ranks as module
from lqec_jax.cli import main
from tests.evaluate.test_rank_page import ANALYSIS

REQUIRED = ["analyze", "rank", "m", "--calib", "c", "--text", "t", "--out", "o"]


@pytest.fixture
def asked(monkeypatch):
    asked = {}

    def analyze_ranks(**named):
        asked.update(named)
        return ANALYSIS

    monkeypatch.setattr(module, "analyze_ranks", analyze_ranks)
    return asked


def test_options_become_arguments(asked):
    more = ["--base", "nf(bits=2)", "--ranks", "1,8", "--scopes", "weight, model", "--updates", "9",
            "--seed", "3", "--seqlen", "64", "--windows", "8", "--text-windows", "2", "--resume",
            "--quiet"]  # fmt: skip
    assert main([*REQUIRED, *more]) == 0
    wanted = {"model": "m", "base": "nf(bits=2)", "ranks": [1, 8], "scopes": ["weight", "model"],
              "updates": 9, "seed": 3, "seqlen": 64, "windows": 8, "text_windows": 2,
              "resume": True, "calib": "c", "text": "t"}  # fmt: skip
    assert {name: asked[name] for name in wanted} == wanted


def test_it_prints_kinds_rows_and_spreads(asked, capfd):
    assert main(REQUIRED) == 0
    assert asked["updates"] is None and asked["ranks"] == [2, 4, 8, 16, 32]
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["q", "32", "x", "64", "0.1000", "8.0", "4.5", "20.0"] in lines
    assert ["weight", "8", "2.500", "9.000", "0.2500", "0.1250", "2.5000", "3.7500", "12"] in lines
    assert any(line[:1] == ["model:"] for line in lines)


def test_json_goes_alone_to_standard_output(asked, capfd):
    assert main([*REQUIRED, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["base"] == "rtn(bits=2)"


def test_ranks_are_whole_numbers(capfd):
    assert main([*REQUIRED, "--ranks", "2,0.5"]) == 2
    assert "--ranks '2,0.5'; whole numbers" in capfd.readouterr().err
