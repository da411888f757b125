"""`lqec inspect`: what it says is what the headers say, for a model, an artifact and a run."""

import json
import shutil

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.core.tree import get_at, set_at, stack_blocks, unstack_blocks
from lqec_jax.io.tensor_file import read_header
from lqec_jax.runs.folder import Run
from tests.golden.tiny_checkpoint import RTN, SEQLEN, make_tokens, write_checkpoint
from tests.golden.tiny_weights import make_weights

RECIPE = f"{RTN} | svd(rank=3)"
# Bits a weight [32, 64]: codes, a 16-bit scale and a 3-bit zero a group, factors of 16 bits.
UP_BITS = 3 + 16 / 32 + 3 / 32 + 16 * 3 * (32 + 64) / (32 * 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its artifact `out`, and `mixed`: the artifact with one weight of another make."""
    folder = tmp_path_factory.mktemp("inspect")
    write_checkpoint(folder / "model", num_hidden_layers=3)
    small = lqec.compress(folder / "model", RECIPE, make_tokens(4), seqlen=SEQLEN,
                          out=folder / "out")  # fmt: skip
    blocks = unstack_blocks(small.params["blocks"])
    weight = get_at(lqec.load(folder / "model").params["blocks"][0], "attn/q/kernel")[1]
    other = lqec.quantize(weight, "rtn(bits=8, group_size=16)")
    blocks[1] = set_at(blocks[1], "attn/q/kernel", other)
    params = {**small.params, "blocks": stack_blocks(blocks)}
    mixed = lqec.Model(small.config, params, small.raw_config, recipe="by hand")
    lqec.save(mixed, folder / "mixed")
    return folder


def inspect(path, capsys):
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_is_described_from_its_headers(folder, capsys):
    facts = inspect(folder / "model", capsys)
    raw = json.loads((folder / "model" / "config.json").read_text())
    arrays = make_weights(raw, 0)
    assert facts["kind"] == "dense" and facts["family"] == "llama"
    assert facts["parameters"] == sum(array.size for array in arrays.values())
    assert facts["stored_bytes"] == sum(array.nbytes for array in arrays.values())
    rows = {row["path"]: row for row in facts["linears"]}
    assert set(rows) == {"attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"}
    assert rows["attn/k"] == {
        "path": "attn/k", "count": 3, "d_in": 32, "d_out": 16, "format": "dense",
        "bits_per_weight": 32.0, "stored_bytes": 3 * 32 * 16 * 4,
    }  # fmt: skip


def test_an_artifact_is_described_from_its_headers(folder, capsys):
    facts = inspect(folder / "out", capsys)
    entries = read_header(folder / "out" / "model.safetensors")
    assert facts["kind"] == "artifact" and facts["seed"] == 0
    assert facts["stored_bytes"] == sum(entry.bytes for entry in entries.values())
    rows = {row["path"]: row for row in facts["linears"]}
    up = [entry.bytes for name, entry in entries.items() if ".mlp.up." in name]
    assert rows["mlp/up"]["stored_bytes"] == sum(up)
    assert rows["mlp/up"]["bits_per_weight"] == pytest.approx(UP_BITS)
    assert rows["mlp/up"]["format"] == "affine(bits=3, group_size=32) + low_rank(rank=3)"
    report = json.loads((folder / "out" / "report.json").read_text())
    assert facts["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert facts["recipe"] == report["recipe"]
    assert [s["ppl"] for s in facts["stages"]] == [s["ppl"] for s in report["stages"]]


def test_weights_of_two_makes_are_two_rows(folder, capsys):
    facts = inspect(folder / "mixed", capsys)
    rows = [row for row in facts["linears"] if row["path"] == "attn/q"]
    assert [(row["format"], row["count"]) for row in rows] == [
        ("affine(bits=3, group_size=32) + low_rank(rank=3)", 2),
        ("affine(bits=8, group_size=16)", 1),
    ]
    assert rows[1]["bits_per_weight"] == pytest.approx(8 + 16 / 16 + 8 / 16)


def test_tables_say_the_same_to_people(folder, capsys):
    assert main(["inspect", str(folder / "out")]) == 0
    out = capsys.readouterr().out
    assert "llama, 31968 parameters" in out
    assert "3 layers, d_model 32, d_ff 64, 4 heads (2 for keys and values), 64 tokens" in out
    assert f"{UP_BITS:.4f}" in out
    assert "recipe: rtn(bits=3, group_size=32" in out and "teacher" in out
    assert main(["inspect", str(folder / "model")]) == 0
    assert "3 x [32, 64]" in capsys.readouterr().out


def test_an_unfinished_run_is_found_by_either_name(folder, capsys, monkeypatch):
    commit = Run.commit

    def stop(run, **changes):
        commit(run, **changes)
        if changes.get("blocks") == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            lqec.compress(folder / "model", RECIPE, make_tokens(4), seqlen=SEQLEN, seed=3,
                          out=folder / "new")  # fmt: skip
    facts = inspect(folder / "new.partial", capsys)
    assert (facts["kind"], facts["phase"], facts["blocks"]) == ("run", 0, 2)
    assert facts["settings"]["seed"] == 3
    assert facts["settings"]["recipe"].startswith("rtn(bits=3, group_size=32")
    files = (folder / "new.partial").rglob("*")
    assert facts["stored_bytes"] == sum(f.stat().st_size for f in files if f.is_file())
    assert inspect(folder / "new", capsys) == facts
    assert main(["inspect", str(folder / "new")]) == 0
    out = capsys.readouterr().out
    assert "an unfinished run" in out and "2 blocks of the next" in out and "--resume" in out
    shutil.rmtree(folder / "new.partial")


def test_what_was_changed_since_is_shown(folder, tmp_path, capsys):
    assert inspect(folder / "out", capsys)["changed"] == []
    copy = shutil.copytree(folder / "out", tmp_path / "copy")
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))
    assert inspect(copy, capsys)["changed"] == ["config.json is not as written (sha256)"]
    assert main(["inspect", str(copy)]) == 0
    assert "changed since: config.json is not as written (sha256)" in capsys.readouterr().out
    meta = json.loads((copy / "lqec.json").read_text())
    del meta["digests"], meta["made"]
    (copy / "lqec.json").write_text(json.dumps(meta))
    assert inspect(copy, capsys)["changed"] is None
