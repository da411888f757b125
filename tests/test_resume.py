"""A run killed with SIGKILL and continued with --resume ends in the very bytes of an unbroken one.

The killed process runs `python -m lqec_jax` after patching one function to kill it; the product has
no hook for this.
"""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.core.tree import unstack_blocks
from lqec_jax.errors import InputError
from lqec_jax.runs.folder import Run, read_state
from tests.golden.tiny_checkpoint import (
    RILQ,
    RTN,
    SEQLEN,
    hash_folder,
    write_checkpoint,
    write_tokens,
)

# The clip search reads the student's stream, so a stream that was not kept would change the codes.
STREAMED = "rtn(bits=3, group_size=32, clip_search='output')"
TRAINED = f"{STREAMED} | {RILQ}"
BLOCKWISE = "apiq(bits=3, group_size=32, rank=1, epochs=1, batch=4) | svd(rank=1)"
SHORT = "updates=12, batch=4, eval_every=4, patience=0"
TUNED = f"{RTN} | lrec(rank=2, logits='streamed', {SHORT}) | finetune({SHORT})"
WEIGHTS = "model.safetensors"

KILLED = """
import os, runpy, signal, sys
from lqec_jax.runs import driver
from lqec_jax.runs import streams
from lqec_jax.runs.folder import Run

def kill_before(owner, name, hit):
    inner = getattr(owner, name)
    def patched(*arguments, **named):
        if hit(*arguments, **named):
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments, **named)
    setattr(owner, name, patched)

kill_before({patch})
runpy.run_module("lqec_jax", run_name="__main__", alter_sys=True)
"""

# The teacher's stream has passed block 3, the student's has not.
IN_BLOCK = "streams.Streams, 'advance', lambda _, name, layer, __: (name, layer) == ('student', 3)"
BEFORE_COMMIT = "Run, 'commit', lambda _, **changes: changes.get('blocks') == 4"
# In the second block, whose training has begun.
IN_BLOCK_STEP = "driver.Driver, '_show_block', lambda _, layer, done, *__: (layer, done) == (1, 2)"
IN_UPDATE = "driver.StepSession, 'progress', lambda _, done, *__: done == 30"
IN_LREC, IN_FINETUNE = (
    "driver.StepSession, 'progress', lambda session, done, *__: "
    f"(session._step.name, done) == ({name!r}, 7)"
    for name in ("lrec", "finetune")
)
BEFORE_WHOLE = "Run, 'commit', lambda _, **changes: changes.get('artifact')"
BEFORE_RENAME = "Run, 'finish', lambda *_: True"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a text, and the unbroken runs `streamed` and `trained`."""
    folder = tmp_path_factory.mktemp("resume")
    write_checkpoint(folder / "model")
    write_tokens(folder / "calib.npy", 12)
    assert main([*command(folder, "streamed", STREAMED), "--quiet"]) == 0
    assert main([*command(folder, "trained", TRAINED), "--quiet"]) == 0
    return folder


def command(folder, out, recipe, calib="calib.npy"):
    words = ["compress", folder / "model", folder / out, "--recipe", recipe,
             "--calib", folder / calib, "--seqlen", SEQLEN, "--windows", 12]  # fmt: skip
    return [str(word) for word in words]


def kill(arguments, patch):
    """Runs a command in a process of its own, which must die at the patched call."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        # How XLA splits a sum over threads, and so its last bits, may depend on the devices.
        "JAX_NUM_CPU_DEVICES": str(jax.local_device_count()),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
    }
    script = KILLED.format(patch=patch)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stderr.splitlines()


def first_of(task, lines):
    return next((line for line in lines if line.startswith(f"{task}: ")), None)


def test_a_run_killed_four_times_ends_in_the_same_bytes(folder, capfd):
    arguments = command(folder, "killed", TRAINED)
    partial = folder / "killed.partial"
    kill(arguments, IN_BLOCK)
    assert not (partial / "phase-0" / "block-3.safetensors").exists()
    lines = kill([*arguments, "--resume"], IN_UPDATE)
    assert first_of("rtn", lines) == "rtn: 3/5"
    lines = kill([*arguments, "--resume"], BEFORE_WHOLE)
    assert first_of("rtn", lines) is None
    # Checkpoints are written in the background: the last one may not have been whole.
    assert first_of("rilq", lines) in {"rilq: 10/40", "rilq: 20/40"}
    lines = kill([*arguments, "--resume"], BEFORE_RENAME)
    # Its training is at its end already; it is scored again.
    assert first_of("rilq", lines).startswith("rilq: perplexity")
    assert not (folder / "killed").exists()
    assert main([*arguments, "--resume"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["calibration: 10 windows of 32 tokens, 2 more for validation"]
    assert not partial.exists()
    check_equal(folder, "killed", "trained")


def test_a_run_that_kept_its_last_phase_block_by_block_goes_on(folder, monkeypatch):
    """As runs were laid out before the artifact took the last phase's place."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", stop)
        assert main([*command(folder, "older", TRAINED), "--quiet"]) == 130
    partial = folder / "older.partial"
    made = lqec.load(partial / "artifact")
    shutil.rmtree(partial / "artifact")
    run = Run(partial, folder / "older", read_state(partial))
    for layer, block in enumerate(unstack_blocks(made.params["blocks"])):
        run.save_block(1, layer, block)
    del run.state["artifact"]
    run.commit(phase=2, blocks=0)
    assert main([*command(folder, "older", TRAINED), "--quiet", "--resume"]) == 0
    check_equal(folder, "older", "trained")


def test_every_training_of_a_chain_goes_on_where_it_was_killed(folder, capfd):
    assert main([*command(folder, "tuned", TUNED), "--quiet"]) == 0
    arguments = command(folder, "cut short", TUNED)
    kill(arguments, IN_LREC)
    lines = kill([*arguments, "--resume"], IN_FINETUNE)
    assert first_of("lrec", lines) in {"lrec: 0/12", "lrec: 4/12"}
    assert main([*arguments, "--resume"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert first_of("lrec", lines) is None
    assert first_of("finetune", lines) in {"finetune: 0/12", "finetune: 4/12"}
    check_equal(folder, "cut short", "tuned")


def test_a_block_that_was_not_committed_is_made_again(folder, capfd):
    arguments = command(folder, "uncommitted", STREAMED)
    kill(arguments, BEFORE_COMMIT)
    assert (folder / "uncommitted.partial" / "phase-0" / "block-3.safetensors").exists()
    assert main([*arguments, "--resume"]) == 0
    assert first_of("rtn", capfd.readouterr().err.splitlines()) == "rtn: 3/5"
    check_equal(folder, "uncommitted", "streamed")


def test_a_kill_inside_a_block_step_repeats_that_block(folder, capfd):
    assert main([*command(folder, "blockwise", BLOCKWISE), "--quiet"]) == 0
    arguments = command(folder, "cut", BLOCKWISE)
    kill(arguments, IN_BLOCK_STEP)
    done = {path.name for path in (folder / "cut.partial" / "phase-0").glob("*.safetensors")}
    assert done == {"block-0.safetensors"}
    assert main([*arguments, "--resume"]) == 0
    assert first_of("apiq | svd", capfd.readouterr().err.splitlines()) == "apiq | svd: 1/5"
    check_equal(folder, "cut", "blockwise")
    fits = lqec.load(folder / "cut").report["fits"]
    assert [fit["layer"] for fit in fits] == [0, 1, 2, 3, 4]


def check_equal(folder, resumed, whole):
    hashes = [hash_folder(folder / name)[WEIGHTS] for name in (resumed, whole)]
    assert hashes[0] == hashes[1]
    reports = [lqec.load(folder / name).report for name in (resumed, whole)]
    assert reports[0]["fits"] == reports[1]["fits"]
    assert reports[0]["linears"] == reports[1]["linears"]
    numbers = [[(s["name"], s["ppl"], s["high"]) for s in r["stages"]] for r in reports]
    assert numbers[0] == numbers[1]


@pytest.fixture
def unfinished(folder, monkeypatch):
    """The folder of a run that stopped before its fourth block."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        commit = Run.commit
        patch.setattr(Run, "commit", lambda run, **changes: (
            stop() if changes.get("blocks") == 4 else commit(run, **changes)
        ))  # fmt: skip
        assert main([*command(folder, "kept", STREAMED), "--quiet", "--overwrite"]) == 130
    return folder / "kept.partial"


def test_a_run_of_other_settings_is_refused_by_name_and_kept(folder, unfinished, capfd):
    write_tokens(folder / "other.npy", 12, seed=9)
    same, other = command(folder, "kept", STREAMED), str(folder / "other.npy")
    changes = {
        "seed": [*same, "--seed", "1"],
        "recipe": command(folder, "kept", RTN),
        "calibration": command(folder, "kept", STREAMED, "other.npy"),
        "dtype": [*same, "--dtype", "bfloat16"],
        "eval": [*same, "--eval", other],
        "mesh": [*same, "--mesh", "data=1"],
    }
    before = hash_folder(unfinished)
    capfd.readouterr()
    for name, arguments in changes.items():
        assert main([*arguments, "--resume"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert f"was begun with other settings: {name} was " in err
        assert hash_folder(unfinished) == before
    assert main([*changes["recipe"], "--seed", "1", "--resume"]) == 2
    err = capfd.readouterr().err
    assert "settings: recipe was " in err and "; seed was 0, is 1;" in err


def test_a_run_is_neither_lost_nor_continued_unasked(folder, unfinished, capfd):
    before = hash_folder(unfinished)
    assert main(command(folder, "kept", STREAMED)) == 2
    assert "holds an unfinished run; add --resume" in capfd.readouterr().err
    assert hash_folder(unfinished) == before
    assert main([*command(folder, "kept", STREAMED), "--overwrite"]) == 0
    assert first_of("rtn", capfd.readouterr().err.splitlines()) == "rtn: 0/5"
    check_equal(folder, "kept", "streamed")
    assert not unfinished.exists()


def test_there_must_be_something_to_resume(folder):
    tokens = np.load(folder / "calib.npy")
    with pytest.raises(InputError, match="there is no unfinished run at .*nothing.partial"):
        lqec.compress(folder / "model", STREAMED, tokens, seqlen=SEQLEN, out=folder / "nothing",
                      resume=True)  # fmt: skip
    assert not (folder / "nothing.partial").exists()
