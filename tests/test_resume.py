"""A run killed with SIGKILL and continued with --resume ends in the very bytes of an unbroken one.

The killed process runs `python -m lqec_jax` after patching one function to kill it; the product has
no hook for this.
"""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.errors import InputError
from tests.golden.tiny_checkpoint import SEQLEN, hash_folder, write_checkpoint, write_tokens

# The clip search reads the student's stream, so a stream that was not kept would change the codes.
RECIPE = (
    "rtn(bits=2, group_size=32, clip_search='output') | "
    "rilq(rank=2, updates=40, batch=4, eval_every=5, patience=0, lr=0.003)"
)
WEIGHTS = "model.safetensors"

KILLED = """
import os, runpy, signal, sys
from lqec_jax import driver
from lqec_jax.io.run import Run

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, hit):
    inner = getattr(owner, name)
    def patched(*arguments, **named):
        if hit(*arguments, **named):
            kill()
        return inner(*arguments, **named)
    setattr(owner, name, patched)

{patch}
runpy.run_module("lqec_jax", run_name="__main__", alter_sys=True)
"""

MOMENTS = {
    # The teacher's stream has passed block 3, the student's has not.
    "in block 3": "before(driver.Driver, '_advance', lambda self, name, layer, block: "
    "(name, layer) == ('student', 3))",
    "block 3 saved, not committed": "before(Run, 'commit', lambda run, **c: c.get('blocks') == 4)",
    "in update 30": "before(driver._Session, 'progress', lambda self, done, *_: done == 30)",
    "artifact written, not renamed": "before(Run, 'finish', lambda run, artifact: True)",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its text, and `whole`: the unbroken run."""
    folder = tmp_path_factory.mktemp("resume")
    write_checkpoint(folder / "model")
    write_tokens(folder / "calib.npy", 12)
    assert main([*command(folder, "whole"), "--quiet"]) == 0
    return folder


def command(folder, out, recipe=RECIPE, calib="calib.npy"):
    words = ["compress", folder / "model", folder / out, "--recipe", recipe,
             "--calib", folder / calib, "--seqlen", SEQLEN, "--windows", 12]  # fmt: skip
    return [str(word) for word in words]


def run_until_killed(folder, out, moment):
    script = KILLED.format(patch=MOMENTS[moment])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        # How XLA splits a sum over threads, and so its last bits, depends on the devices there are.
        "JAX_NUM_CPU_DEVICES": str(jax.local_device_count()),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *command(folder, out)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / out).exists()
    assert (folder / f"{out}.partial" / "state.json").is_file()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_in_the_same_bytes(moment, folder, capfd):
    out = moment.replace(" ", "-").replace(",", "")
    run_until_killed(folder, out, moment)
    assert main([*command(folder, out), "--resume"]) == 0
    assert hash_folder(folder / out)[WEIGHTS] == hash_folder(folder / "whole")[WEIGHTS]
    assert not (folder / f"{out}.partial").exists()
    check_taken_up(moment, capfd.readouterr().err.splitlines())
    numbers = [lqec.load(folder / name).report for name in (out, "whole")]
    assert numbers[0]["fits"] == numbers[1]["fits"]
    assert [s["ppl"] for s in numbers[0]["stages"]] == [s["ppl"] for s in numbers[1]["stages"]]


def check_taken_up(moment, lines):
    """Checks by its progress that the second run began where the first was, not at the start."""
    if moment == "artifact written, not renamed":
        assert lines == ["calibration: 10 windows of 32 tokens, 2 more for validation"]
    elif moment == "in update 30":
        began = next(line for line in lines if line.startswith("rilq: "))
        # Checkpoints are written in the background: the last one or two may not be whole.
        assert began in {f"rilq: {done}/40" for done in (15, 20, 25)}
        assert not any(line.startswith("rtn: ") for line in lines)
    else:
        assert "rtn: 3/5" in lines and "rtn: 0/5" not in lines


def test_a_run_of_other_settings_is_refused_by_name_and_kept(folder, capfd):
    run_until_killed(folder, "kept", "in block 3")
    write_tokens(folder / "other.npy", 12, seed=9)
    before = hash_folder(folder / "kept.partial")
    changes = {
        "seed": [*command(folder, "kept"), "--seed", "1"],
        "recipe": command(folder, "kept", recipe="rtn(bits=3, group_size=32)"),
        "calibration": command(folder, "kept", calib="other.npy"),
        "dtype": [*command(folder, "kept"), "--dtype", "bfloat16"],
        "eval": [*command(folder, "kept"), "--eval", str(folder / "other.npy")],
    }
    for name, arguments in changes.items():
        assert main([*arguments, "--resume"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "was begun with other settings" in err
        assert f"settings: {name} was " in err
        assert hash_folder(folder / "kept.partial") == before
    both = [*command(folder, "kept", recipe="rtn(bits=3, group_size=32)"), "--seed", "1"]
    assert main([*both, "--resume"]) == 2
    err = capfd.readouterr().err
    assert "recipe was " in err and "; seed was 0, is 1;" in err
    assert main(command(folder, "kept")) == 2
    assert "holds an unfinished run" in capfd.readouterr().err
    assert hash_folder(folder / "kept.partial") == before


def test_there_must_be_something_to_resume(folder):
    tokens = np.load(folder / "calib.npy")
    with pytest.raises(InputError, match="there is no unfinished run at .*nothing.partial"):
        lqec.compress(folder / "model", RECIPE, tokens, seqlen=SEQLEN, out=folder / "nothing",
                      resume=True)  # fmt: skip
    assert not (folder / "nothing.partial").exists()
