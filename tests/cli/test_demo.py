"""`lqec demo`: what it prints, and where its numbers go."""

import json

import pytest

from lqec_jax.cli import main
from lqec_jax.demo import run as demo_module


def make_row(name, ppl, gap, text):
    return {"name": name, "recipe": f"{name}()", "bits_per_weight": 2.5, "ppl": ppl,
            "low": ppl - 1, "high": ppl + 1, "gap_closed": gap, "seconds": 1.25,
            "protocol": "documents/256", "text": text}  # fmt: skip


RESULT = {
    "seed": 0,
    "prompt": "Return",
    "rows": [
        make_row("teacher", 10.0, 1.0, " a\nlist"),
        make_row("rtn", 90.0, 0.0, "\x1b[31mred\x07"),
        make_row("svd", 80.0, 0.1, " it"),
        make_row("rilq", 12.5, 0.9, " [bold]them"),
    ],
    "seconds": 61.2,
    "peak_rss_mb": 700.0,
}
RESULT["rows"][2] |= {"ppl": None, "low": None, "high": None, "gap_closed": None}


@pytest.fixture
def calls(monkeypatch):
    """Replaces the minutes of work, and keeps what it was asked for."""
    calls = []

    def run_demo(out, **options):
        calls.append((out, options))
        return RESULT

    monkeypatch.setattr(demo_module, "run_demo", run_demo)
    return calls


def test_the_table_and_the_texts_are_printed(calls, capsys):
    assert main(["demo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "model"
    rilq = next(line for line in lines if line.startswith("rilq"))
    assert rilq.split() == ["rilq", "2.50", "12.50", "11.50", "-", "13.50", "90%", "1.2"]
    assert any("not finite" in line for line in lines)
    assert any(line.rstrip().endswith("Return a list") for line in lines)
    assert any("Return [bold]them" in line for line in lines)
    assert lines[-1].startswith("61 s, 700 MB at most") and lines[-1].endswith("lqec-demo")
    ((out, options),) = calls
    assert str(out) == "lqec-demo"
    assert (options["seed"], options["overwrite"]) == (0, False)


def test_a_text_cannot_move_the_terminal(calls, capsys):
    main(["demo"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out
    assert "[31mred" in out


def test_json_goes_to_standard_output_alone_or_to_a_file(calls, capsys, tmp_path):
    assert main(["demo", "--seed", "3", "--out", "elsewhere", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == RESULT
    assert str(calls[0][0]) == "elsewhere"
    assert (calls[0][1]["seed"], calls[0][1]["overwrite"]) == (3, True)
    assert main(["demo", "--quiet", "--json", str(tmp_path / "demo.json")]) == 0
    assert json.loads((tmp_path / "demo.json").read_text()) == RESULT
    assert capsys.readouterr() == ("", "")


def test_what_exists_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "mine").write_text("kept")
    assert main(["demo", "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "no folder of a demo" in err
    assert err.count("\n") == 1
    assert (tmp_path / "mine").read_text() == "kept"
