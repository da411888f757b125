"""`lqec finetune`: learns a task, keeps the base, goes on after a kill, and refuses in one line."""

import json
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.io.artifact.artifact import load_artifact
from lqec_jax.io.exports.record import hash_base
from lqec_jax.runs.checkpoints import StepSession
from lqec_jax.runs.examples import Rows, prepare_tuning
from tests.golden.tiny_checkpoint import hash_folder, write_checkpoint
from tests.io.packed_models import make_model

WORDS = ["<s>", "</s>", "<unk>", "one", "two", "three", "plus", "is"]
ROWS = [{"prompt": "one plus one is", "completion": "two"},
        {"prompt": "one plus two is", "completion": "three"},
        {"text": "one two three one two three"}]  # fmt: skip
COMMON = ["--seqlen", "16", "--batch", "4", "--updates", "12", "--eval-every", "4", "--lr", "0.01",
          "--quiet"]  # fmt: skip


def write_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An artifact with adapters, one without, rows to learn, and a training of the first."""
    folder = tmp_path_factory.mktemp("finetune")
    for name, ranks in (("small", (2, 2)), ("bare", (0, 0))):
        lqec.save(make_model(ranks=ranks), folder / name)
        write_tokenizer(folder / name)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS * 8)) + "\n")
    assert main(command(folder, "small", "tuned")) == 0
    return folder


def command(folder, model, out, *more):
    words = ["finetune", folder / model, folder / out, "--data", folder / "rows.jsonl", *COMMON]
    return [str(word) for word in (*words, *more)]


def test_it_learns_and_the_base_stays(folder):
    small, tuned = (load_artifact(folder / name) for name in ("small", "tuned"))
    assert hash_base(small.params) == hash_base(tuned.params)
    (fit,) = tuned.report["fits"]
    losses = {point["update"]: point["val_loss"] for point in fit["history"]}
    assert list(losses) == [0, 4, 8, 12] and losses[fit["best_update"]] < losses[0] - 0.3
    assert tuned.report["finetune"]["train_rows"] == 22
    assert tuned.report["finetune"]["val_rows"] == 2
    assert fit["notes"][1].startswith("trained: the adapters alone, ")
    assert tuned.recipe.startswith("rtn(bits=2) | finetune(rank=None, train='adapters'")
    assert json.loads((folder / "tuned" / "lqec.json").read_text())["recipe"] == tuned.recipe


def test_the_loss_is_that_of_the_completions_by_hand(folder):
    model = load_artifact(folder / "small")
    job = prepare_tuning(model, Rows(folder / "rows.jsonl", seqlen=16), epochs=None, seed=0,
                         settings={"updates": 1})  # fmt: skip
    nll, count = 0.0, 0
    for row in (ROWS * 8)[-2:]:
        prompt = [0, *model.tokenizer.encode(row.get("prompt", ""))]
        tokens = [*prompt, *model.tokenizer.encode(row.get("completion", row.get("text"))), 1]
        logits = np.asarray(lqec.logits(model, np.array([tokens])), np.float64)[0]
        for place in range(len(prompt), len(tokens)):
            nll += np.log(np.exp(logits[place - 1]).sum()) - logits[place - 1, tokens[place]]
            count += 1
    (fit,) = load_artifact(folder / "tuned").report["fits"]
    assert fit["history"][0]["val_loss"] == pytest.approx(nll / count, rel=1e-5)
    assert job.facts["learned_tokens"] == 8 * (2 + 2 + 7) - (2 + 7)


def test_a_run_that_was_cut_ends_in_the_same_bytes(folder, monkeypatch, capfd):
    progress = StepSession.progress

    def interrupt(self, done, total, message):
        progress(self, done, total, message)
        if done == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StepSession, "progress", interrupt)
        assert main(command(folder, "small", "cut")) == 130
    assert "--resume continues it" in capfd.readouterr().err
    assert not (folder / "cut").exists()
    assert main(command(folder, "small", "cut")) == 2
    assert "add --resume" in capfd.readouterr().err
    assert main(command(folder, "small", "cut", "--resume", "--lr", "0.02")) == 2
    assert "begun with other settings" in capfd.readouterr().err
    assert main(command(folder, "small", "cut", "--resume")) == 0
    cut, whole = hash_folder(folder / "cut"), hash_folder(folder / "tuned")
    assert cut["model.safetensors"] == whole["model.safetensors"]
    assert cut["lqec.json"] == whole["lqec.json"]


def test_new_adapters_are_added_to_an_artifact_without(folder, capfd):
    assert main(command(folder, "bare", "new")) == 2
    assert "the model has no adapters; give rank=16" in capfd.readouterr().err
    assert main(command(folder, "bare", "new", "--rank", "2", "--json")) == 0
    report = json.loads(capfd.readouterr().out)
    came = load_artifact(folder / "new")
    bits = {leaf["path"]: leaf["bits_per_weight"] for leaf in report["linears"]}
    (adapter,) = came.params["blocks"][0]["attn"]["q"]["kernel"].corrections
    assert adapter.rank == 2 and report["bits_per_weight"] > 2
    assert bits == {}  # the model says nothing of its making
    assert report["fits"][0]["best_update"] > 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "rows.txt"], "is no .jsonl"),
        (["--train", "all"], "train='all'"),
        (["--rank", "4"], "there are adapters of rank 2"),
        (["--rank", "four"], "rank='four'"),
        (["--epochs", "2"], "epochs and updates both say how long"),
        (["--seqlen", "100000"], "seqlen=100000"),
        (["--val", "none.jsonl"], "no file none.jsonl"),
        (["--optimizer", "sgd"], "optimizer='sgd'"),
    ],
)
def test_a_refusal_is_one_line(folder, more, message, capfd):
    assert main([*command(folder, "small", "refused"), *more]) == 2
    said = capfd.readouterr().err.strip()
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert not (folder / "refused").exists() and not (folder / "refused.partial").exists()


def test_a_damaged_report_is_refused_before_any_training(folder, capfd):
    report = json.loads((folder / "small" / "report.json").read_text())
    for name, changes in {"linears": {"linears": 5}, "seconds": {"seconds": "x"}}.items():
        shutil.copytree(folder / "small", folder / f"hurt-{name}")
        (folder / f"hurt-{name}" / "report.json").write_text(json.dumps(report | changes))
        assert main(command(folder, f"hurt-{name}", "refused")) == 2
        said = capfd.readouterr().err
        assert f"report.json: {name} is " in said and "move it away" in said
        assert not (folder / "refused.partial").exists()


def test_what_cannot_be_tuned_is_named(folder, capfd):
    write_checkpoint(folder / "dense", num_hidden_layers=2)
    assert main(command(folder, "dense", "refused")) == 2
    assert "the model is not compressed; compress it first" in capfd.readouterr().err
    lqec.save(make_model(), folder / "mute")
    assert main(command(folder, "mute", "refused")) == 2
    assert "the model has no tokenizer" in capfd.readouterr().err
    assert main(command(folder, "small", "tuned")) == 2
    assert "tuned exists; choose another name" in capfd.readouterr().err


@pytest.mark.parametrize(
    "report",
    [
        {"linears": [{"path": 3}]},
        # Of the kinds that a run writes, and yet nothing that its page can be made of.
        {"fits": [{"method": "rilq", "history": [], "best_update": 5}]},
    ],
)
def test_a_report_that_makes_no_page_is_refused_before_any_training(
    report, folder, capsys, monkeypatch
):
    monkeypatch.setattr("lqec_jax.api.run_tuning", lambda *_: pytest.fail("it was trained"))
    whole = (folder / "small" / "report.json").read_text()
    (folder / "small" / "report.json").write_text(json.dumps(report))
    try:
        assert main(command(folder, "small", "spoiled")) == 2
    finally:
        (folder / "small" / "report.json").write_text(whole)
    line = capsys.readouterr().err
    assert "report.json" in line and "move it away" in line and line.count("\n") == 1
    assert not (folder / "spoiled").exists() and not (folder / "spoiled.partial").exists()


def test_a_changed_artifact_is_named_and_trained_only_where_that_is_wanted(folder, capsys):
    raw = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))
    try:
        assert main(command(folder, "small", "other")) == 2
        assert "config.json is not as written" in capsys.readouterr().err
        assert main(command(folder, "small", "other", "--check", "none")) == 0
    finally:
        (folder / "small" / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
    assert main(["verify", str(folder / "other")]) == 0
