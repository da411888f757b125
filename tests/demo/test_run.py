"""`lqec.demo`: the embedded model is what its record says, collapses at 2 bits, and is repaired."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.demo import model_path
from lqec_jax.demo import run as demo_module
from lqec_jax.demo.run import Settings, run_demo
from lqec_jax.demo.train import CONFIG, score
from lqec_jax.demo.train import Settings as TrainSettings
from lqec_jax.errors import InputError
from lqec_jax.io.tensor_file import read_header

ROOT = Path(__file__).parents[2]
SHORT = Settings(updates=8, windows=2, held_out=8)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of few updates, its texts replaced by who wrote them: its folder and its result."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "SEQLEN", 64)
        patch.setattr(
            demo_module,
            "generate",
            lambda model, prompt, *, seed, **_: f"{prompt} {model.recipe} {seed}",
        )
        return out, run_demo(out, seed=5, settings=SHORT)


def rows_of(result):
    return {row["name"]: row for row in result["rows"]}


def test_the_shipped_model_scores_what_its_record_says():
    recorded = json.loads((model_path() / "training.json").read_text())["held_out"]
    came = score(model_path())
    assert came["nll"] == pytest.approx(recorded["nll"], abs=1e-3)
    assert came["protocol"] == recorded["protocol"]
    assert came["tokens"] == recorded["tokens"] >= 20_000


@pytest.mark.parity
def test_transformers_reads_the_shipped_model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    ours = lqec.load("demo", "float32")
    text = (model_path() / "heldout.jsonl").read_text()[100:400]
    assert tokenizer(text, add_special_tokens=False).input_ids == ours.tokenizer.encode(text)
    tokens = np.array([ours.tokenizer.encode(text, bos=True)])
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(lqec.logits(ours, tokens), wanted, atol=1e-4)


def test_what_is_shipped_is_small_and_is_packaged():
    files = sorted(model_path().iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "training.json", "calib.jsonl",
            "heldout.jsonl"} <= {path.name for path in files}  # fmt: skip
    assert sum(path.stat().st_size for path in files) < 5_000_000
    weights = read_header(model_path() / "model.safetensors").values()
    assert 1_000_000 < sum(tensor.size for tensor in weights) <= 2_000_000
    packaging = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "model/*" in packaging["package-data"]["lqec_jax.demo"]


def test_the_record_is_of_the_settings_in_the_script():
    recorded = json.loads((model_path() / "training.json").read_text())
    settings = recorded["settings"]
    for name in ("vocab_size", "d_model", "d_ff", "layers", "heads", "max_length", "tied_head"):
        assert settings["config"][name] == getattr(CONFIG, name)
    for name in ("updates", "batch", "lr", "weight_decay", "seed"):
        assert settings[name] == getattr(TrainSettings(), name)
    # Forty minutes on two cores.
    assert recorded["cpu_seconds"] < 2 * 40 * 60 and recorded["python"]
    assert recorded["curve"][-1]["update"] == settings["updates"]


def test_two_bits_collapse_and_rilq_repairs(demo):
    rows = rows_of(demo[1])
    assert list(rows) == ["teacher", "rtn", "svd", "rilq"]
    assert rows["rtn"]["ppl"] >= 1.5 * rows["teacher"]["ppl"]
    assert rows["rilq"]["ppl"] < rows["rtn"]["ppl"]
    assert (rows["teacher"]["gap_closed"], rows["rtn"]["gap_closed"]) == (1.0, 0.0)
    assert 0 < rows["rilq"]["gap_closed"] < 1
    assert rows["teacher"]["bits_per_weight"] == 16
    assert 2 < rows["rtn"]["bits_per_weight"] < rows["svd"]["bits_per_weight"] < 8
    assert rows["svd"]["bits_per_weight"] == pytest.approx(rows["rilq"]["bits_per_weight"])
    assert len({row["protocol"] for row in rows.values()}) == 1


def test_every_row_is_asked_to_continue_the_same_prompt(demo):
    prompt, rows = demo[1]["prompt"], rows_of(demo[1])
    assert rows["teacher"]["text"] == f"{prompt}  5"
    for name in ("rtn", "svd", "rilq"):
        text = rows[name]["text"]
        assert text.startswith(f"{prompt} rtn(bits=2, group_size=64,") and text.endswith(" 5")
        assert f"{name}(" in text


def test_the_folder_holds_numbers_a_picture_and_the_model(demo):
    out, result = demo
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png", "rilq"]
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(result))
    small = lqec.load(out / "rilq")
    assert [name for name in ("rtn", "svd", "rilq") if name in small.recipe] == ["rtn", "rilq"]
    assert small.report["seed"] == result["seed"] == 5
    assert not [path for path in out.parent.iterdir() if path != out]


def test_an_earlier_demo_is_kept_unless_told_and_anything_else_always(demo, tmp_path):
    with pytest.raises(InputError, match="exists.*--overwrite"):
        run_demo(demo[0], settings=SHORT)
    for name in ("file", "folder"):
        other = tmp_path / name
        other.mkdir() if name == "folder" else other.write_text("mine")
        with pytest.raises(InputError, match="exists and is no folder of a demo"):
            run_demo(other, overwrite=True, settings=SHORT)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_name_demo_is_the_embedded_model_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lqec.load("demo").folder == model_path()
    (tmp_path / "demo").mkdir()
    with pytest.raises(InputError, match="config.json"):
        lqec.load("demo")


@pytest.mark.slow
def test_the_demo_closes_most_of_the_gap_and_another_seed_changes_rilq_alone(tmp_path):
    first, other = (rows_of(run_demo(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    for rows in (first, other):
        assert rows["rtn"]["ppl"] >= 1.5 * rows["teacher"]["ppl"]
        assert rows["rilq"]["gap_closed"] >= 0.7
        assert rows["rilq"]["gap_closed"] > rows["svd"]["gap_closed"]
        assert len({row["text"] for row in rows.values()}) == 4
    assert first["rilq"]["ppl"] != other["rilq"]["ppl"]
    for name in ("teacher", "rtn", "svd"):
        assert first[name]["ppl"] == other[name]["ppl"]
