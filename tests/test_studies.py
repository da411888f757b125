"""Every study's page is its numbers, and the harness keeps what was measured."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from configs.studies import harness
from configs.studies.harness import Study, open_row, quote, table

ROOT = Path(__file__).parents[1]
STUDIES = sorted(path.parent for path in ROOT.glob("configs/studies/*/study.py"))


def copy_results(folder: Path, to: Path) -> Path:
    """Copies a study's numbers; returns where `--out` finds them."""
    for path in folder.glob("results*.json"):
        shutil.copy(path, to)
    return to / "results.json"


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_a_page_is_made_of_its_numbers(folder, tmp_path, request):
    study = importlib.import_module(f"configs.studies.{folder.name}.study").STUDY
    options = ["--table", "--out", str(copy_results(folder, tmp_path))]
    if "read_reference" in (folder / "study.py").read_text():
        options += ["--shared", str(request.getfixturevalue("shared"))]
    study.run(options)
    assert (tmp_path / "results.md").read_text() == (folder / "results.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        ["configs/studies/rank_study/study.py"],
        ["-m", "configs.studies.rank_study.study"],
    ],
    ids=["script", "module"],
)
def test_a_study_is_a_script_and_a_module(command, tmp_path):
    folder = ROOT / "configs/studies/rank_study"
    out = copy_results(folder, tmp_path)
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, *command, "--table", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.md").read_text() == (folder / "results.md").read_text()
    assert (tmp_path / "figure.svg").is_file()


def test_a_study_lists_the_rows_that_it_has():
    for name in ("finetune_start", "rank_study"):
        study = importlib.import_module(f"configs.studies.{name}.study").STUDY
        arguments = study.read_arguments(["--table"])
        rows = study.read(arguments.out)["rows"]
        keys = list(study.rows(arguments))
        assert all(any(row | key == row for key in keys) for row in rows)
        assert all(any(row | key == row for row in rows) for key in keys)


# The harness


def make_study(folder: Path, **options) -> tuple[Study, list[int]]:
    """Returns a study of squares, and the list of what it was made to measure."""
    measured: list[int] = []

    def measure(key, arguments, results):
        if key["n"] == arguments.kill:
            raise KeyboardInterrupt
        measured.append(key["n"])
        results["last"] = key["n"]
        return {"square": key["n"] ** 2}

    def page(results, arguments):
        return table([("n", "{n}"), ("n²", "{square:.1f}")], results["rows"])

    study = Study(
        "Squares.", str(folder / "study.py"), lambda _: ({"n": n} for n in (1, 2, 3)), measure,
        page, options={"--kill": {"type": int}}, **options,
    )  # fmt: skip
    return study, measured


def test_a_killed_study_goes_on(tmp_path):
    study, measured = make_study(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        study.run(["--kill", "3"])
    assert not (tmp_path / "results.md").exists()
    study.run([])
    assert measured == [1, 2, 3]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["square"] for row in results["rows"]] == [1, 4, 9]
    assert results["last"] == 3
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        "| 1 | 1.0 |", "| 2 | 4.0 |", "| 3 | 9.0 |",
    ]  # fmt: skip
    study.run(["--again"])
    assert measured == [1, 2, 3] * 2
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 3


def test_a_row_says_where_and_when_it_was_measured(tmp_path):
    study, _ = make_study(tmp_path, packages=("numpy",))
    study.run(["--out", str(tmp_path / "mine.json")])
    assert (tmp_path / "mine.md").is_file()
    made = json.loads((tmp_path / "mine.json").read_text())["rows"][0]["environment"]
    assert made["date"] == date.today().isoformat() and made["device"] == "cpu"
    assert made["machine"] and made["jax"] and made["python"] and made["versions"]["numpy"]
    assert open_row({"n": 1, "environment": made})["device"] == "cpu"


def test_a_list_is_its_rows_and_a_tuple_a_list(tmp_path):
    study, measured = make_study(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([{"n": 2, "square": 4}]))
    study.run([])
    assert measured == [1, 3]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0] == {"n": 2, "square": 4}
    again = []
    shapes = Study(
        "Shapes.", str(tmp_path / "s.py"), lambda _: [{"shape": (1, 2)}],
        lambda key, *_: again.append(key["shape"]) or {}, lambda *_: [],
    )  # fmt: skip
    out = ["--out", str(tmp_path / "shapes.json")]
    shapes.run(out)
    shapes.run(out)
    assert again == [[1, 2]]


def test_what_is_split_has_a_file_a_value(tmp_path):
    seen = []
    study = Study(
        "Models.", str(tmp_path / "study.py"), lambda a: [{"of": a.model}], lambda *_: {},
        lambda results, _: seen.append(results) or [], split="model", options={"--model": {}},
    )  # fmt: skip
    for name in ("b", "a"):
        study.run(["--model", name])
    assert list(seen[-1]) == ["a", "b"] and seen[-1]["a"]["rows"][0]["of"] == "a"
    assert (tmp_path / "results-a.json").is_file() and (tmp_path / "results.md").is_file()


def test_what_is_missing_is_said(tmp_path, capsys):
    study, measured = make_study(tmp_path, needs=("shared", "work"))
    with pytest.raises(SystemExit):
        study.run(["--work", "w"])
    assert "give --table, or --shared" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--shared: the page quotes"):
        harness.read_reference(None)
    assert not measured


def test_a_cell_is_empty_where_nothing_was_measured():
    columns = [("", "{a}"), ("b", "{b:.2f}"), ("c", lambda row: row["c"])]
    rows = [{"a": "x | y", "b": None, "c": "1"}, {"a": 2, "c": "", "environment": {"b": 1}}]
    assert table(columns, rows) == [
        "| | b | c |", "|---|---|---|", "| x \\| y |  | 1 |", "| 2 | 1.00 |  |",
    ]  # fmt: skip
    with pytest.raises(KeyError):  # a function must know its row
        table(columns[2:], [{}])
    assert quote("One.\n\nTwo\nlines.\n\n- a\n- b\n", 1, 2) == ["Two lines.", "", "- a\n- b", ""]
