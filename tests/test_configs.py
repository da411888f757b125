"""Every config keeps its own promises: it is read, it fits, and a small one reaches its number."""

import json
import re
import shlex
from pathlib import Path

import pytest

import lqec_jax as lqec
from lqec_jax.cli import main
from lqec_jax.cli.config import CompressConfig, resolve
from lqec_jax.recipe import parse_recipe
from tests.planning.shapes import LLAMA_7B

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))
# What is compressed in other configs, by `claim.model`; a config of another model adds its shapes.
SHAPES = {"meta-llama/Llama-2-7b-hf": LLAMA_7B}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> CompressConfig:
    return resolve({}, path)


def find_model(path: Path) -> str:
    """Returns the model that a config's command compresses."""
    return shlex.split(read(path).claim.command)[2]


def trains(path: Path) -> bool:
    return any(step.scope != "linear" for step in parse_recipe(read(path).recipe).steps)


SMALL = [path for path in CONFIGS if find_model(path) == "demo"]
LARGE = [path for path in CONFIGS if path not in SMALL]


def test_there_are_configs_to_run_and_configs_to_plan():
    assert len(SMALL) >= 3 and len(LARGE) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_a_config_is_a_claim(path):
    claim = read(path).claim
    assert all(vars(claim).values()), "a claim says everything"
    program, verb, model, out, *options = shlex.split(claim.command)
    assert (program, verb, out, options) == ("lqec", "compress", "OUT", ["--config", name(path)])
    assert claim.model.partition(",")[0] == model
    assert path in LARGE or re.search(r"perplexity \d+\.\d+", claim.ours), "a number, to be reached"


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_the_command_line_reads_it(path, tmp_path, capfd):
    # It is read, and its recipe checked, before the model is looked for.
    command = ["compress", str(tmp_path / "none"), str(tmp_path / "out"), "--config", str(path)]
    assert main(command) == 2
    assert capfd.readouterr().err.startswith(f"error: no folder {tmp_path / 'none'}")
    assert main([*command, "--set", "recipe=rtn(bit=2)"]) == 2
    assert "bit" in capfd.readouterr().err


@pytest.mark.parametrize("path", LARGE, ids=name)
def test_a_large_one_fits_where_it_says(path, tmp_path):
    config = read(path)
    assert config.claim.model in SHAPES, "put the shapes of its model into SHAPES"
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[config.claim.model]))
    facts = lqec.plan(tmp_path, config.recipe, seqlen=config.seqlen, windows=config.windows)
    memory = re.search(r"with (\d+) GB", config.claim.hardware)
    if memory:
        peaks = {machine["device_peak_bytes"] for machine in facts["machines"]}
        assert max(peaks) < int(memory.group(1)) * 1e9
    assert any(machine["fits"] for machine in facts["machines"])


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "path",
    # What RILQ repairs of this model is asserted of the demo too, which CI runs from the wheel.
    [pytest.param(p, marks=pytest.mark.slow) if trains(p) else p for p in SMALL],
    ids=name,
)
def test_a_small_one_reaches_its_number(path, tmp_path):
    config = read(path)
    command = shlex.split(config.claim.command)[1:]
    command[2], command[-1] = str(tmp_path / "out"), str(path)
    assert main([*command, "--quiet"]) == 0
    stage = json.loads((tmp_path / "out" / "report.json").read_text())["stages"][-1]
    promised = float(re.search(r"perplexity (\d+\.\d+)", config.claim.ours).group(1))
    assert stage["ppl"] == pytest.approx(promised, rel=0.03)
    assert stage["protocol"] in config.claim.text
