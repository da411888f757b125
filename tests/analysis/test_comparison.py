"""Recipes side by side: grids, rows that equal the verbs, nothing lost or replaced."""

import csv
import json
import shutil

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax import api
from lqec_jax.analysis import comparison
from lqec_jax.analysis.comparison import COLUMNS, PAGE, RESULTS, ROWS, TABLE, list_entries
from lqec_jax.cli import main
from lqec_jax.errors import InputError
from lqec_jax.evaluate.page import TEACHER
from lqec_jax.io.artifact.artifact import is_artifact
from lqec_jax.runs.folder import read_state
from tests.golden.tiny_checkpoint import SEQLEN, hash_folder, write_checkpoint, write_tokens
from tests.test_resume import kill

RECIPES = ("rtn(bits=2, group_size=32)", "rtn(bits=2, group_size=32) | svd(rank=2)")
WEIGHTS = "model.safetensors"


def texts_of(*arguments, **grids):
    return [entry.text for entry in list_entries(*arguments, **grids)]


def refusal(call, *arguments, **named):
    with pytest.raises(InputError) as said:
        call(*arguments, **named)
    assert "\n" not in str(said.value)
    return str(said.value)


# ---- grids


def test_a_grid_takes_the_place_of_what_a_recipe_writes():
    assert texts_of(["rtn(bits=2) | svd(rank=4)"], bits=[2, 3], ranks=[4, 0.5]) == [
        "rtn(bits=2) | svd(rank=4)",
        "rtn(bits=2) | svd(rank=0.5)",
        "rtn(bits=3) | svd(rank=4)",
        "rtn(bits=3) | svd(rank=0.5)",
    ]
    both = "rtn(bits=2) | svd(rank=4) | rilq(rank=4)"
    assert texts_of([both], ranks=[8]) == ["rtn(bits=2) | svd(rank=8) | rilq(rank=8)"]


def test_a_recipe_that_writes_no_such_argument_is_one_row():
    assert texts_of(["rtn(bits=2)", "rtn(bits=2) | svd(rank=4)"], ranks=[2, 8]) == [
        "rtn(bits=2)",
        "rtn(bits=2) | svd(rank=2)",
        "rtn(bits=2) | svd(rank=8)",
    ]


def test_no_row_is_made_twice_however_it_is_written():
    entries = list_entries(["rtn(bits=2)", "rtn( group_size=64,bits=2 )"], seeds=[0, 5])
    assert [(entry.text, entry.seed) for entry in entries] == [
        ("rtn(group_size=64, bits=2)", 0), ("rtn(group_size=64, bits=2)", 5)]  # fmt: skip
    assert len({entry.name for entry in entries}) == 2
    (alone,) = list_entries(["rtn(bits=2)"], seeds=[5])
    assert alone.name == entries[1].name  # whatever stands beside it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "a list of recipes was wanted"),
        (("rtn()",), "a list of recipes was wanted"),
        ((["rtn()"], [2]), "no recipe writes bits="),
        ((["rtn(bits=2)"], [], [4]), "no recipe writes rank="),
        ((["svd(rank=2) | svd(rank=4)"], [], [8]), "writes rank= as 2 and as 4"),
        ((["rtn(bits=2)"], [9]), "bits=9"),
        ((["rtn(bits=2)"], [], [], []), "no seed"),
        ((["rtn(bits=2)"], [], [], [-1]), "seed=-1"),
        ((["rtm(bits=2)"],), "did you mean 'rtn'"),
    ],
)
def test_what_cannot_be_a_row_is_refused(arguments, said):
    assert said in refusal(list_entries, *arguments)


# ---- a run


# Of the second row, the first block is committed and the second is not.
IN_SECOND_ROW = """Run, 'commit', lambda run, **changes: (
    changes.get('blocks') == 2 and 'svd' in run.state['fingerprint']['recipe'])"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kept_programs):
    """A model, two texts; `out`, a comparison killed in its second row and resumed; `whole`."""
    folder = tmp_path_factory.mktemp("compare")
    # One shape of linears, so that a step is one program.
    write_checkpoint(
        folder / "model", num_hidden_layers=2, num_key_value_heads=4, intermediate_size=32
    )
    write_tokens(folder / "calib.npy", 8)
    write_tokens(folder / "dev.npy", 7, seed=1)
    kill(command(folder), IN_SECOND_ROW)
    shutil.copytree(folder / "out", folder / "killed")
    assert main(command(folder, "--resume")) == 0
    assert main(command(folder, out="whole")) == 0
    return folder


def command(folder, *more, recipes=RECIPES, out="out"):
    chosen = [word for recipe in recipes for word in ("--recipe", recipe)]
    words = ["compare", folder / "model", *chosen, "--calib", folder / "calib.npy",
             "--text", folder / "dev.npy", "--seqlen", SEQLEN, "--windows", 8,
             "--text-windows", 6, "--out", folder / out, "--quiet", *more]  # fmt: skip
    return [str(word) for word in words]


def read_rows(folder, out="out"):
    return json.loads((folder / out / RESULTS).read_text())["rows"]


def test_a_kill_leaves_whole_files_the_rows_before_it_and_a_run_to_go_on_with(folder):
    killed = folder / "killed"
    rows = read_rows(folder, "killed")
    assert [row["recipe"] for row in rows] == [TEACHER, RECIPES[0]]
    with (killed / TABLE).open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    assert (killed / PAGE).read_text().rstrip().endswith("</html>")
    assert not list(killed.rglob("*.tmp"))
    # Beside them lies the killed row's lock, which nobody holds any more.
    partial, finished = sorted(
        (path for path in (killed / ROWS).iterdir() if not path.name.startswith(".")),
        key=lambda path: path.suffix != ".partial",
    )
    assert str(finished.relative_to(killed)) == rows[1]["artifact"] and is_artifact(finished)
    assert partial.name.startswith("rtn-svd-") and not is_artifact(partial)
    assert read_state(partial)["blocks"] == 1


def test_a_comparison_goes_on_within_a_row_and_keeps_those_before_it(folder):
    killed, out = hash_folder(folder / "killed"), hash_folder(folder / "out")
    finished = {name for name in killed if name.startswith(read_rows(folder)[1]["artifact"])}
    assert len(finished) >= 5 and all(out[name] == killed[name] for name in finished)
    assert read_rows(folder)[:2] == read_rows(folder, "killed")
    assert sorted(path.name for path in (folder / "out" / ROWS).iterdir()) == sorted(
        path.name for path in (folder / "whole" / ROWS).iterdir()
    )


def test_a_killed_and_resumed_comparison_gives_an_unbroken_ones_numbers(folder):
    def numbers(out):
        measured = ("seconds", "peak_rss_mb")
        rows = read_rows(folder, out)
        return [{name: row[name] for name in row if name not in measured} for row in rows]

    assert numbers("out") == numbers("whole")
    assert [row["recipe"] for row in numbers("out")] == [TEACHER, *RECIPES]
    for row in numbers("out")[1:]:
        out, whole = (folder / name / row["artifact"] / WEIGHTS for name in ("out", "whole"))
        assert out.read_bytes() == whole.read_bytes()


def test_a_table_and_a_page_that_a_kill_left_behind_are_made_again(folder, monkeypatch):
    before = hash_folder(folder / "out")
    for name in (TABLE, PAGE):
        shutil.copyfile(folder / "killed" / name, folder / "out" / name)
    monkeypatch.setattr(api, "compress", None)
    assert main(command(folder, "--resume")) == 0
    assert hash_folder(folder / "out") == before


def test_a_row_says_what_the_verbs_say(folder):
    teacher, windows = lqec.load(folder / "model"), np.load(folder / "dev.npy")[: 6 * SEQLEN]
    first, rounded, corrected = read_rows(folder)
    for row, model in (
        (first, teacher),
        (corrected, lqec.load(folder / "out" / corrected["artifact"])),
    ):
        score = lqec.perplexity(model, windows, SEQLEN)
        distance = lqec.divergence(model, teacher, windows, SEQLEN)
        expected = (score.ppl, score.low, distance.kl, distance.top1, 6 * (SEQLEN - 1))
        came = tuple(row[name] for name in ("ppl", "low", "kl", "top1", "tokens"))
        assert came == pytest.approx(expected, rel=1e-6)
        assert row["protocol"] == f"tokens/{SEQLEN}"
    assert (first["bits_per_weight"], first["kl"], first["top1"]) == (32, 0, 1)
    assert first["seconds"] is None and first["artifact"] is None
    assert rounded["kl"] > corrected["kl"] > 0
    report = json.loads((folder / "out" / rounded["artifact"] / "report.json").read_text())
    for name in ("bits_per_weight", "seconds"):
        assert rounded[name] == report[name]
    assert rounded["peak_rss_mb"] in (None, report["peak_rss_mb"])


def test_the_table_and_the_page_hold_the_same_rows(folder):
    rows = read_rows(folder)
    with (folder / "out" / TABLE).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [row["recipe"] for row in table] == [row["recipe"] for row in rows]
    assert [float(row["ppl"]) for row in table] == [row["ppl"] for row in rows]
    page = (folder / "out" / PAGE).read_text()
    for row in rows:
        assert f"{row['ppl']:.3f}" in page
    links = [f'href="{row["artifact"]}/report.html"' for row in rows[1:]]
    assert all(link in page for link in links)
    assert (folder / "out" / rows[1]["artifact"] / "report.html").is_file()
    assert "2 ways to compress it" in page and "<svg" in page


def test_a_finished_comparison_is_neither_begun_again_nor_recomputed(folder, capfd, monkeypatch):
    before = hash_folder(folder / "out")
    assert main(command(folder)) == 2
    assert "holds a comparison; add --resume" in capfd.readouterr().err
    monkeypatch.setattr(api, "compress", None)
    assert main(command(folder, "--resume")) == 0
    assert hash_folder(folder / "out") == before


def test_a_comparison_of_something_else_is_refused_by_name(folder, capfd):
    before = hash_folder(folder / "out")
    write_tokens(folder / "other.npy", 7, seed=2)
    for option, name in (("--text", "text"), ("--calib", "calibration")):
        arguments = [*command(folder, "--resume"), option, str(folder / "other.npy")]
        assert main(arguments) == 2
        assert f"was begun with another {name};" in capfd.readouterr().err
    assert hash_folder(folder / "out") == before


def test_every_recipe_is_tried_on_shapes_before_the_first_row(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(api, "compress", None)
    tokens = np.load(folder / "calib.npy")
    said = refusal(lqec.compare, folder / "model", [RECIPES[0], "svd(rank=33)"], calib=tokens,
                   text=tokens, out=tmp_path / "out", seqlen=SEQLEN, windows=8)  # fmt: skip
    assert "rank=33" in said and not (tmp_path / "out").exists()


def test_a_recipe_may_be_added_and_one_that_breaks_down_is_a_row_too(folder, monkeypatch):
    def fail(*_, **__):
        raise FloatingPointError("rtn made blocks/0/attn/q non-finite")

    monkeypatch.setattr(api, "compress", fail)
    shutil.copytree(folder / "out", folder / "more" / "out")
    arguments = command(folder, "--resume", recipes=[*RECIPES, "rtn(bits=4, group_size=32)"])
    assert main([*arguments, "--out", str(folder / "more" / "out")]) == 0
    rows = read_rows(folder / "more")
    assert rows[:3] == read_rows(folder)
    assert (rows[3]["recipe"], rows[3]["ppl"]) == ("rtn(bits=4, group_size=32)", None)
    assert rows[3]["error"] == "rtn made blocks/0/attn/q non-finite"
    assert rows[3]["error"] in (folder / "more" / "out" / PAGE).read_text()


def test_other_peoples_folders_are_left_alone(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("kept")
    named = {"calib": np.zeros(9, int), "text": np.zeros(9, int)}
    said = refusal(lqec.compare, folder / "model", RECIPES, out=tmp_path / "mine", **named)
    assert "exists and is no comparison" in said
    said = refusal(lqec.compare, folder / "model", RECIPES, out=tmp_path / "none", resume=True,
                   **named)  # fmt: skip
    assert "there is no comparison at" in said
    assert hash_folder(tmp_path).keys() == {"mine/letter"}


def test_the_module_does_not_hide_the_verb():
    assert lqec.compare is comparison.compare and lqec.compare is comparison.compare
