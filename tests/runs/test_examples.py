"""Fine-tuning as a verb: how long it is, and whose rows are looked at."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.examples import Rows, prepare_tuning
from tests.io.packed_models import make_model

TOKENIZER = SimpleNamespace(
    bos_id=1, eos_id=2, encode=lambda text: [3 + ord(c) % 50 for c in text], files=lambda: []
)


@pytest.fixture
def model():
    return replace(make_model(), tokenizer=TOKENIZER)


def write(path, count, text="abc"):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(count)))
    return path


def prepare(model, rows, epochs=None, **settings):
    return prepare_tuning(model, rows, epochs=epochs, seed=0, settings=settings)


def test_epochs_become_updates_with_twenty_looks(model, tmp_path):
    rows = Rows(write(tmp_path / "rows.jsonl", 200))
    arguments = prepare(model, rows).step.arguments
    assert (arguments["updates"], arguments["eval_every"]) == (68, 3)  # 3 · 180 / 8
    assert prepare(model, rows, epochs=0.5, batch=9).step.arguments["updates"] == 10
    arguments = prepare(model, rows, updates=7).step.arguments
    assert (arguments["updates"], arguments["eval_every"]) == (7, 25)
    slim = prepare(model, rows, preset="slim").step.arguments
    assert (slim["updates"], slim["batch"], slim["optimizer"]) == (469, 64, "adafactor")
    assert prepare(model, rows, epochs=1, eval_every=2).step.arguments["eval_every"] == 2


def test_scales_and_zeros_are_asked_for_as_scales_are(model, tmp_path):
    rows = Rows(write(tmp_path / "rows.jsonl", 10))
    counts = {train: prepare(model, rows, train=train).step.count for train in
              ("scales", "scales+zeros")}  # fmt: skip
    leaf = model.params["blocks"][0]["attn"]["q"]["kernel"]
    assert counts["scales+zeros"](leaf) == 2 * counts["scales"](leaf) > 0
    with pytest.raises(InputError, match="finetune: train='zeros'; one of 'adapters', 'scales', "):
        prepare(model, rows, train="zeros")


def test_rows_to_look_at_are_the_last_or_a_files_own(model, tmp_path):
    rows = write(tmp_path / "rows.jsonl", 10)
    job = prepare(model, Rows(rows, val_ratio=0.3))
    assert (job.train, len(job.tokens)) == (7, 10)
    np.testing.assert_allclose(job.weights.sum(axis=1), 1, rtol=1e-6)
    job = prepare(model, Rows(rows, val=write(tmp_path / "val.jsonl", 2, "abcdefgh")))
    assert (job.train, job.tokens.shape) == (10, (12, 10)) and job.weights.shape == (12, 9)
    assert job.weights[0, 4:].sum() == 0
    assert "10 rows to train on, 2 to look at, 40 tokens to learn" in job.data_in_words
    with pytest.raises(InputError, match="has one row with something to learn; two or more"):
        prepare(model, Rows(write(tmp_path / "one.jsonl", 1)))


def test_rows_with_ends_of_their_own_are_counted_and_said(model, tmp_path):
    ends = replace(model, tokenizer=SimpleNamespace(
        bos_id=1, eos_id=2, encode=lambda text: [ord(c) % 60 for c in text], files=lambda: []
    ))  # fmt: skip
    rows, val = (
        write(tmp_path / "rows.jsonl", 4, "\x01ab"),
        write(tmp_path / "val.jsonl", 2, "a\x02"),
    )
    job = prepare(ends, Rows(rows))
    assert job.facts["own_ends_rows"] == 4
    assert "4 rows bring their own BOS or EOS, none gets a second" in job.data_in_words
    assert prepare(ends, Rows(rows, val=val)).facts["own_ends_rows"] == 6
    assert "own BOS" not in prepare(model, Rows(rows)).data_in_words


def test_what_decides_the_result_is_in_the_fingerprint(model, tmp_path):
    rows = Rows(write(tmp_path / "rows.jsonl", 4))
    one = prepare(model, rows).fingerprint
    assert one == prepare(model, rows).fingerprint
    assert one["finetune"] != prepare(model, rows, lr=0.1).fingerprint["finetune"]
    other = prepare(replace(make_model(ranks=(1, 2)), tokenizer=TOKENIZER), rows).fingerprint
    assert [name for name in one if one[name] != other[name]] == ["model"]
    longer = prepare(model, Rows(write(tmp_path / "longer.jsonl", 4, "abcd"))).fingerprint
    assert [name for name in one if one[name] != longer[name]] == ["examples"]


def report_linears(model, error):
    return {"linears": [
        {"path": f"blocks/{layer}/{path}", "bits_per_weight": 1.0, "relative_error": error,
         "steps": []}
        for layer in range(model.config.layers) for path in model.fns.linears
    ]}  # fmt: skip


def test_a_trained_weight_has_no_error_that_was_measured_before(model, tmp_path):
    model = replace(model, report=report_linears(model, 0.25))
    rows = write(tmp_path / "rows.jsonl", 8)
    settings = {"updates": 2, "batch": 4, "eval_every": 1, "lr": 0.01}
    tuned = lqec.finetune(model, rows, **settings)
    (fit,) = tuned.report["fits"]
    assert fit["best_update"] > 0 and fit["data"]["file"] == "rows.jsonl"
    assert fit["data"]["examples"] == prepare(model, Rows(rows), **settings).fingerprint["examples"]
    for linear in tuned.report["linears"]:
        assert linear["relative_error"] is None and linear["relative_error_before"] == 0.25
        assert linear["bits_per_weight"] > 2
    assert str(parse_recipe(tuned.recipe.partition(" | ")[2])) in tuned.recipe
    # Once more: what was measured last is still the compression's.
    again = lqec.finetune(tuned, rows, **settings).report
    assert {linear["relative_error_before"] for linear in again["linears"]} == {0.25}
    assert [fit["data"]["file"] for fit in again["fits"]] == ["rows.jsonl"] * 2


def test_a_training_that_gains_nothing_leaves_what_was_measured(model, tmp_path):
    model = replace(model, report=report_linears(model, 0.25))
    tuned = lqec.finetune(model, write(tmp_path / "rows.jsonl", 8), updates=1, batch=4, lr=1e-30)
    assert tuned.report["fits"][0]["best_update"] == 0
    for linear in tuned.report["linears"]:
        assert linear["relative_error"] == 0.25 and "relative_error_before" not in linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rang": 4}, "no setting 'rang'; did you mean 'rank'"),
        ({"epochs": 1, "updates": 3}, "epochs and updates both"),
        ({"epochs": -1.0}, "a number >= 0"),
        ({"epochs": 0}, "epochs=0 trains nothing"),
        ({"updates": 0}, "updates=0"),
        ({"val_ratio": 0}, "val_ratio=0; a fraction between 0 and 1"),
        ({"val_ratio": 1.0}, "val_ratio=1.0; a fraction between 0 and 1"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_settings_are_checked_before_anything_is_trained(model, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        lqec.finetune(model, write(tmp_path / "rows.jsonl", 4), **settings)
