"""`lqec compare`: what its options become, and what it prints."""

import json

import pytest

from lqec_jax.analysis import comparison
from lqec_jax.cli import main
from lqec_jax.cli.compare import read_numbers
from lqec_jax.errors import InputError

ROW = {"seed": None, "bits_per_weight": 32.0, "ppl": 2.4586, "low": 2.4, "high": 2.5, "kl": 0.0,
       "top1": 1.0, "seconds": None, "peak_rss_mb": None, "artifact": None,
       "error": None}  # fmt: skip
RESULTS = {
    "protocol": "documents/256",
    "rows": [
        {"recipe": "teacher", **ROW},
        {"recipe": "rtn(bits=2)", **ROW, "seed": 1, "bits_per_weight": 2.5625, "ppl": 11.4727,
         "kl": 1.23456, "top1": 0.4375, "seconds": 12.34, "peak_rss_mb": 612.3},
        {"recipe": "svd(rank=2)", **ROW, "seed": 0, "bits_per_weight": None,
         "error": "svd made a non-finite"},
    ],
}  # fmt: skip
REQUIRED = ["compare", "m", "--recipe", "rtn()", "--calib", "c", "--text", "t", "--out", "o"]


@pytest.fixture
def asked(monkeypatch):
    """What the library was called with."""
    asked = {}

    def compare(model, recipes, **named):
        asked.update(named, model=model, recipes=recipes)
        return RESULTS

    monkeypatch.setattr(comparison, "compare", compare)
    return asked


def test_options_become_arguments(asked):
    more = ["--recipe", "svd()", "--bits", "2,3", "--ranks", "4,0.5", "--seed", "1", "--seed", "2",
            "--seqlen", "64", "--windows", "8", "--text-windows", "3", "--val-ratio", "0.5",
            "--protocol", "gptq", "--dtype", "float32", "--resume", "--quiet"]  # fmt: skip
    assert main([*REQUIRED, *more]) == 0
    assert (asked["model"], asked["recipes"]) == ("m", ["rtn()", "svd()"])
    assert (asked["bits"], asked["ranks"], list(asked["seeds"])) == ([2, 3], [4, 0.5], [1, 2])
    assert (asked["seqlen"], asked["windows"], asked["text_windows"]) == (64, 8, 3)
    assert (asked["val_ratio"], asked["protocol"], asked["dtype"]) == (0.5, "gptq", "float32")
    assert (asked["calib"], asked["text"], str(asked["out"])) == ("c", "t", "o")
    assert asked["resume"] is True


def test_the_table_has_a_row_a_recipe_and_names_its_protocol(asked, capfd):
    assert main(REQUIRED) == 0
    assert (asked["bits"], asked["ranks"], list(asked["seeds"])) == ([], [], [0])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["recipe", "seed", "bits", "documents/256"]
    assert lines[1].split() == ["teacher", "32.000", "2.459", "2.400", "to", "2.500", "0.0000",
                                "100.0%"]  # fmt: skip
    assert lines[2].split() == ["rtn(bits=2)", "1", "2.562", "11.473", "2.400", "to", "2.500",
                                "1.2346", "43.8%", "12.3", "612"]  # fmt: skip
    assert lines[3].split() == ["svd(rank=2)", "0"]
    assert "svd(rank=2): svd made a non-finite" in lines


def test_json_goes_alone_to_standard_output(asked, capfd):
    assert main([*REQUIRED, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == RESULTS


def test_what_is_missing_or_no_number_is_said_in_a_line(capfd):
    assert main(["compare", "m", "--recipe", "rtn()"]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    assert main([*REQUIRED, "--bits", "2;3"]) == 2
    assert "--bits '2;3'; numbers with commas were wanted" in capfd.readouterr().err


def test_numbers_keep_their_kind():
    assert read_numbers("--ranks", None) == []
    assert [type(n) for n in read_numbers("--ranks", "4,0.25")] == [int, float]
    for text in ("", "2,", "a", "2, b"):
        with pytest.raises(InputError, match="numbers with commas"):
            read_numbers("--ranks", text)
