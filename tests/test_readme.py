"""Every block of code in README.md runs, in order, as a reader would run it: at fewer updates."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
# The same commands on less: two updates, ten windows, of text and of what is scored.
SMALLER = {
    "rilq(rank=16)": "rilq(rank=16, updates=2, eval_every=1)",
    "--calib demo:calib --seqlen 256": "--calib demo:calib --seqlen 64 --windows 10",
    '"demo:calib", seqlen=256': '"demo:calib", seqlen=64, windows=10',
    '"demo:heldout", seqlen=256': '"demo:heldout", seqlen=64, windows=8',
    "windows, seqlen=256": "windows, seqlen=64",
    "--text demo:heldout --seqlen 256": "--text demo:heldout --seqlen 64 --windows 8",
    'generate(small, "Return a list of")': 'generate(small, "Return a list of", max_new_tokens=8)',
    '--prompt "Return a list of"': '--prompt "Return a list of" --max-new-tokens 8',
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


def make_smaller(code: str) -> str:
    for whole, less in SMALLER.items():
        code = code.replace(whole, less)
    return code


def run(command: list[str], folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_abridgement_is_still_needed():
    code = "\n".join(blocks("bash") + blocks("python"))
    assert [whole for whole in SMALLER if whole not in code] == []


def test_the_python_blocks_run(tmp_path):
    code = make_smaller("\n".join(blocks("python")))
    assert code.count("import lqec_jax as lqec") == 1
    out = run([sys.executable, "-c", code], tmp_path)
    assert float(out.splitlines()[0]) > 1
    assert (tmp_path / "small-peft" / "adapter_config.json").is_file()


def test_the_commands_run(tmp_path):
    installs, tests, verbs = blocks("bash")
    # The first two blocks install, and run the demo and these tests: `.ci/run` does all of it.
    assert (installs, tests) == (
        "pip install .\nlqec demo\n",
        "pip install -e '.[dev]'\npytest -n 2\n",
    )
    out = run(["bash", "-ec", make_smaller(verbs)], tmp_path)
    assert "bits per weight" in out and "perplexity" in out
    assert (tmp_path / "small-hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https?:)[^)]+)\)", README.read_text()))
def test_every_link_leads_somewhere(link):
    assert (README.parent / link).exists()
