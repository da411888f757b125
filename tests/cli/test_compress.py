"""`lqec compress`, end to end: it agrees with Python, with itself, and with what lies on disk."""

import json

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.io.tensor_file import read_header
from lqec_jax.runs.folder import Run
from tests.golden.tiny_checkpoint import (
    RILQ,
    RTN,
    SEQLEN,
    hash_folder,
    write_checkpoint,
    write_tokens,
)

RECIPE = f"{RTN} | {RILQ}"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two texts, and OUT: the model compressed by `RECIPE` with seed 0."""
    folder = tmp_path_factory.mktemp("compress")
    write_checkpoint(folder / "model")
    write_tokens(folder / "calib.npy", 10)
    write_tokens(folder / "held_out.npy", 6, seed=1)
    code = main(command(folder, "out", "--eval", folder / "held_out.npy", "--quiet"))
    assert code == 0
    return folder


def command(folder, out, *more, recipe=RECIPE):
    words = ["compress", folder / "model", folder / out, "--calib", folder / "calib.npy",
             "--seqlen", SEQLEN, "--windows", 10, "--recipe", recipe, *more]  # fmt: skip
    return [str(word) for word in words]


def read_report(folder, out="out"):
    return json.loads((folder / out / "report.json").read_text())


def test_python_and_the_command_line_write_the_same_bytes(folder, tmp_path):
    small = lqec.compress(
        folder / "model",
        RECIPE,
        np.load(folder / "calib.npy"),
        seqlen=SEQLEN,
        windows=10,
        eval=np.load(folder / "held_out.npy"),
        out=tmp_path / "out",
    )
    ours, theirs = hash_folder(tmp_path / "out"), hash_folder(folder / "out")
    assert ours[WEIGHTS] == theirs[WEIGHTS]
    report = read_report(folder)
    stages = [{**stage, "seconds": 0} for stage in small.report["stages"]]
    assert stages == [{**stage, "seconds": 0} for stage in report["stages"]]
    assert small.report["fits"] == report["fits"]
    assert small.report["linears"] == report["linears"]


def test_the_same_command_writes_the_same_bytes_and_another_seed_others(folder):
    held_out = ("--eval", folder / "held_out.npy", "--quiet")
    assert main(command(folder, "again", *held_out)) == 0
    assert main(command(folder, "seed1", *held_out, "--seed", "1")) == 0
    first, again, other = (hash_folder(folder / out) for out in ("out", "again", "seed1"))
    same = set(first) - {"report.json", "report.html"}  # they say how long it took
    assert {name: first[name] for name in same} == {name: again[name] for name in same}
    assert other[WEIGHTS] != first[WEIGHTS]
    assert not list(folder.glob("*.partial"))


def test_eval_of_the_artifact_is_the_last_stage(folder, capfd):
    arguments = ["eval", folder / "out", "--text", folder / "held_out.npy", "--seqlen", SEQLEN]
    assert main([str(word) for word in (*arguments, "--json")]) == 0
    row = json.loads(capfd.readouterr().out)
    stage = read_report(folder)["stages"][-1]
    assert row["ppl"] == pytest.approx(stage["ppl"], rel=1e-6)
    assert [row[n] for n in ("protocol", "tokens", "windows")] == [
        stage[n] for n in ("protocol", "tokens", "windows")
    ]
    assert row["protocol"] == f"tokens/{SEQLEN}"


def test_a_dry_run_foretells_the_bytes_on_disk_and_writes_none(folder, capfd):
    before = hash_folder(folder)
    assert main(command(folder, "new", "--dry-run", "--json")) == 0
    sizes = json.loads(capfd.readouterr().out)
    assert hash_folder(folder) == before
    entries = read_header(folder / "out" / WEIGHTS)
    for linear in sizes["linears"]:
        inside = f".{linear['path'].replace('/', '.')}."
        stored = sum(entry.bytes for name, entry in entries.items() if inside in name)
        assert linear["stored_bytes"] == stored
    assert sizes["stored_bytes"] == sum(row["stored_bytes"] for row in sizes["linears"])
    total = sum(entry.bytes for entry in entries.values())
    assert sizes["stored_bytes"] + sizes["kept_bytes"] == total
    assert sizes["file_bytes"] == (folder / "out" / WEIGHTS).stat().st_size
    assert sizes["bits_per_weight"] == pytest.approx(read_report(folder)["bits_per_weight"])
    assert sizes["bits_per_weight"] == pytest.approx(8 * sizes["stored_bytes"] / (5 * 9216))


def test_a_dry_run_prints_the_same_for_people(folder, capfd):
    assert main(command(folder, "new", "--dry-run")) == 0
    out, err = capfd.readouterr()
    assert "affine(bits=3, group_size=32) + low_rank(rank=2)" in out
    assert "8 windows of 32 tokens, 2 more for validation" in out
    assert "nothing was computed or written" in out
    assert err == ""
    assert not (folder / "new").exists() and not (folder / "new.partial").exists()


def test_a_run_prints_its_stages_and_says_how_far_it_is(folder, capfd):
    assert main(command(folder, "printed", recipe=RTN)) == 0
    out, err = capfd.readouterr()
    stages = read_report(folder, "printed")["stages"]
    assert [stage["name"] for stage in stages] == ["teacher", "rtn"]
    for stage in stages:
        assert f"{stage['ppl']:.4f}" in out
        assert f"{stage['low']:.4f} - {stage['high']:.4f}" in out
    assert "calib-val/32" in out
    assert "3.6042 bits per weight over 35 linears" in out
    assert f"written to {folder / 'printed'}" in out
    lines = err.splitlines()
    assert lines[0] == "calibration: 8 windows of 32 tokens, 2 more for validation"
    assert "rtn: 0/5" in lines and "rtn: 5/5" in lines


def test_json_on_standard_output_is_the_report_and_nothing_else(folder, capfd):
    assert main(command(folder, "json", "--windows", 12, "--json", recipe=RTN)) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == read_report(folder, "json")
    assert "the text holds no more of the 12 asked for" in err
    file = folder / "r.json"
    assert main(command(folder, "quiet", "-q", "--json", file, recipe=RTN)) == 0
    assert capfd.readouterr() == ("", "")
    assert json.loads(file.read_text()) == read_report(folder, "quiet")


def test_an_artifact_is_replaced_only_when_told_to_and_by_the_new_one(folder, capfd):
    backup = folder / "mine.old"
    backup.mkdir()
    (backup / "notes.txt").write_text("not yours")
    assert main(command(folder, "mine", "-q", recipe=RTN)) == 0
    before = hash_folder(folder / "mine")
    assert main(command(folder, "mine", "-q", "--seed", "5", recipe=RTN)) == 2
    assert hash_folder(folder / "mine") == before
    assert main(command(folder, "mine", "-q", "--seed", "5", "--overwrite", recipe=RTN)) == 0
    assert read_report(folder, "mine")["seed"] == 5
    assert (backup / "notes.txt").read_text() == "not yours"
    leftovers = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert leftovers == set()
    assert capfd.readouterr().err.count("\n") == 1


def test_settings_come_from_the_file_then_flags_then_set(folder, capfd):
    config = folder / "c.yaml"
    config.write_text(f"recipe: {RTN}\nseed: 5\nwindows: 4\nseqlen: 16\n")
    arguments = ["compress", folder / "model", folder / "cfg", "--calib", folder / "calib.npy",
                 "--config", config, "--windows", 6, "--set", "seed=7", "-q"]  # fmt: skip
    assert main([str(word) for word in arguments]) == 0
    report = read_report(folder, "cfg")
    assert report["seed"] == 7
    assert report["recipe"].startswith("rtn(bits=3, group_size=32")
    assert report["stages"][0]["protocol"] == "calib-val/16"
    assert report["stages"][0]["tokens"] == 15  # of 6 windows, one is for validation


def test_an_interrupted_run_says_how_to_go_on_and_does(folder, capfd, monkeypatch):
    save_block = Run.save_block

    def save_and_interrupt(run, phase, number, tree):
        save_block(run, phase, number, tree)
        if number == 2:
            raise KeyboardInterrupt  # what Python makes of Ctrl-C; a signal may be ignored

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_block", save_and_interrupt)
        assert main(command(folder, "broken", "-q", recipe=RTN)) == 130
    assert not (folder / "broken").exists()
    err = capfd.readouterr().err
    assert "broken.partial keeps what is finished" in err and "--resume" in err
    assert "Traceback" not in err
    assert main(["inspect", str(folder / "broken")]) == 0
    assert "0 phases, and 2 blocks" in capfd.readouterr().out
    assert main(command(folder, "broken", "-q", "--resume", recipe=RTN)) == 0
    assert main(command(folder, "whole", "-q", recipe=RTN)) == 0
    assert hash_folder(folder / "broken")[WEIGHTS] == hash_folder(folder / "whole")[WEIGHTS]


def test_a_fault_of_ours_is_one_line_with_a_way_to_its_traceback(folder, capfd, monkeypatch):
    def fail(*_):
        raise RuntimeError("the first line\nand the second")

    monkeypatch.setattr(Run, "save_block", fail)
    assert main(command(folder, "fault", "-q")) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "RuntimeError: the first line and the second" in err
    monkeypatch.setenv("LQEC_TRACEBACK", "1")
    assert main(command(folder, "fault", "-q", "--overwrite")) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err and "in fail" in err


def test_a_full_disk_is_not_called_our_fault(folder, capfd, monkeypatch):
    def fill(*_):
        raise OSError(28, "No space left on device", "block-0.safetensors")

    monkeypatch.setattr(Run, "save_block", fill)
    assert main(command(folder, "full", "-q")) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: block-0.safetensors: No space left on device")
    assert "--resume" in err and err.count("\n") == 1
