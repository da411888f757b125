"""One writer an output: whom it keeps out, what it says, and that a death gives it back."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lqec_jax.errors import InputError
from lqec_jax.io import lock
from lqec_jax.io.lock import hold, one_writer

HOLDER = """
import sys, time
from pathlib import Path
from lqec_jax.io.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def holder(tmp_path):
    """Another process that holds `out`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")],
                               stdout=subprocess.PIPE, text=True, env=environment)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_it_and_a_death_frees_it(holder, tmp_path):
    with pytest.raises(InputError) as said, hold(tmp_path / "out"):
        pass
    assert "\n" not in str(said.value)
    assert f"out is being written by process {holder.pid} on " in str(said.value)
    assert " since 2" in str(said.value)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert names(tmp_path) == [".out.lock"]
    with hold(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


def test_a_second_thread_is_kept_out_too_and_another_output_is_free(tmp_path):
    with hold(tmp_path / "out"):
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), hold(tmp_path / "out"):
            pass
        with hold(tmp_path / "other"):
            assert names(tmp_path) == [".other.lock", ".out.lock"]
    assert names(tmp_path) == []


def test_many_at_once_are_one_after_the_other(tmp_path):
    inside, worst, refused = [], [], []

    def work():
        for _ in range(50):
            try:
                with hold(tmp_path / "out"):
                    inside.append(1)
                    worst.append(len(inside))
                    inside.pop()
            except InputError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) == 1 and len(worst) + len(refused) == 200


def test_folders_that_were_made_for_the_lock_alone_go_with_it(tmp_path):
    deep = tmp_path / "a" / "b" / "out"
    with pytest.raises(RuntimeError), hold(deep):
        assert names(deep.parent) == [".out.lock"]
        raise RuntimeError
    assert names(tmp_path) == []
    with hold(deep):
        deep.mkdir()
    assert names(deep.parent) == ["out"]


def test_no_output_and_no_locks_keep_nobody_out(tmp_path, monkeypatch):
    with hold(None), hold(None):
        pass
    monkeypatch.setattr(lock, "fcntl", None)  # as on Windows
    with hold(tmp_path / "out"), hold(tmp_path / "out"):
        assert names(tmp_path) == []


def test_a_verb_holds_its_out_however_it_is_given(tmp_path):
    @one_writer
    def verb(model, *, out=None):
        """What it does."""
        return names(tmp_path)

    assert verb("m", out=str(tmp_path / "x")) == [".x.lock"]
    assert verb("m") == [] and verb.__doc__ == "What it does."


@pytest.mark.parametrize(
    "verb", ["api.compress", "api.finetune", "api.save", "api.export",
             "analysis.comparison.compare", "analysis.ranks.analyze_ranks", "demo.run.run_demo"],
)  # fmt: skip
def test_every_verb_that_writes_a_folder_is_kept_out_before_it_reads(verb, tmp_path):
    import importlib
    import inspect

    module, _, name = f"lqec_jax.{verb}".rpartition(".")
    call = getattr(importlib.import_module(module), name)
    required = [p.name for p in inspect.signature(call).parameters.values()
                if p.default is p.empty and p.kind is not p.VAR_KEYWORD]  # fmt: skip
    given = dict.fromkeys(required, Path("there-is-no-such-model")) | {"out": tmp_path / "out"}
    with hold(tmp_path / "out"), pytest.raises(InputError, match="out is being written by process"):
        call(**given)
