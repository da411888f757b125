"""The analysis of ranks: which runs it is, what it measures of them, and that it goes on."""

import json
import shutil

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax import api
from lqec_jax.analysis.ranks import PAGE, RESULTS, SCOPES, analyze_ranks, list_runs
from lqec_jax.errors import InputError
from lqec_jax.evaluate.discrepancy import discrepancy
from lqec_jax.recipe import parse_recipe
from tests.golden.tiny_checkpoint import SEQLEN, write_checkpoint, write_tokens

BASE = "rtn(bits=2, group_size=32)"


def test_every_scope_is_a_recipe_that_trains_without_the_next_token():
    runs = list_runs(BASE, [2, 4], SCOPES, updates=7)
    assert [run[:2] for run in runs[:3]] == [("", None), ("weight", 2), ("weight", 4)]
    assert len(runs) == 1 + 2 * len(SCOPES)
    for scope, rank, recipe in runs[1:]:
        step = parse_recipe(recipe).steps[-1]
        assert step.arguments["rank"] == rank
        if scope == "weight":
            assert step.name == "svd"
            continue
        assert step.arguments["scope"] == scope and step.arguments["token_weight"] == 0.0
        assert (step.arguments["updates"], step.arguments["patience"]) == (7, 0)
        assert step.scope == ("model" if scope == "model" else "block")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("rilq()", [2], SCOPES, None), "trains the whole model"),
        ((BASE, [0], SCOPES, None), "rank=0"),
        (
            (BASE, [2], ["layer"], None),
            "scope='layer'; one of 'weight'",
        ),
        ((BASE, [2], SCOPES, 0), "updates=0"),
    ],
)
def test_what_cannot_be_analyzed_is_refused(arguments, said):
    with pytest.raises(InputError) as caught:
        list_runs(*arguments)
    assert said in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, kept_programs):
    folder = tmp_path_factory.mktemp("ranks")
    write_checkpoint(
        folder / "model", num_hidden_layers=2, num_key_value_heads=4, intermediate_size=32
    )
    write_tokens(folder / "calib.npy", 8)
    write_tokens(folder / "dev.npy", 4, seed=1)
    return folder


def analyze(folder, **more):
    arguments = {
        "base": BASE,
        "ranks": [1, 8],
        "scopes": ["weight"],
        "seqlen": SEQLEN,
        "windows": 8,
    } | more
    return analyze_ranks(
        model=str(folder / "model"), calib=str(folder / "calib.npy"),
        text=str(folder / "dev.npy"), out=folder / "out", **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def analysis(folder):
    return analyze(folder)


def test_a_row_says_what_its_model_does(folder, analysis):
    bare, low, high = analysis["rows"]
    assert [row["rank"] for row in analysis["rows"]] == [None, 1, 8]
    assert bare["relative_error"] > low["relative_error"] > high["relative_error"]
    assert bare["train_mse"] > high["train_mse"] > 0
    teacher = lqec.load(folder / "model")
    student = lqec.load(folder / "out" / "runs" / high["artifact"])
    windows = np.load(folder / "dev.npy").reshape(-1, SEQLEN)
    found = discrepancy((teacher.fns, teacher.params), (student.fns, student.params), windows)
    assert high["held_out_mse"] == pytest.approx(found.post_norm)
    assert high["held_out_by_block"] == pytest.approx(found.by_block)
    assert high["ppl"] == pytest.approx(lqec.perplexity(student, windows, SEQLEN).ppl)
    assert len(analysis["spectra"]) == 2 * 7
    assert np.mean([row["relative_error"] for row in analysis["spectra"]]) == pytest.approx(
        bare["relative_error"], rel=1e-3
    )


def test_it_goes_on_without_measuring_twice(folder, analysis, monkeypatch):
    out = folder / "out"
    before = json.loads((out / RESULTS).read_text())
    page = (out / PAGE).read_text()
    assert page.rstrip().endswith("</html>") and page.count("<svg") == 7
    with pytest.raises(InputError, match="holds a comparison; add --resume"):
        analyze(folder)
    shutil.copyfile(out / RESULTS, folder / "kept.json")
    monkeypatch.setattr(api, "compress", None)
    assert analyze(folder, resume=True)["rows"] == analysis["rows"]
    assert json.loads((out / RESULTS).read_text()) == before
    (out / PAGE).unlink()
    analyze(folder, resume=True)
    assert (out / PAGE).read_text() == page


def test_another_base_or_seed_in_the_same_folder_is_measured_anew(folder, analysis):
    """Runs last: what stood in the folder gives way to it."""
    other = "rtn(bits=3, group_size=32)"
    anew = analyze(folder, base=other, ranks=[1], seed=1, resume=True)
    assert anew["base"] == other and len(anew["rows"]) == 2
    mean = np.mean([row["relative_error"] for row in anew["spectra"]])
    assert mean == pytest.approx(anew["rows"][0]["relative_error"], rel=1e-3)
    assert mean < analysis["rows"][0]["relative_error"]
    seeds = analyze(folder, base=other, ranks=[1], seed=2, resume=True)
    assert seeds["rows"][0]["artifact"] != anew["rows"][0]["artifact"]
