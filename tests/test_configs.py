"""Every config is read by the real command line; every tiny one is run and reaches its number."""

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
TINY = sorted(ROOT.glob("configs/tiny/*.yaml"))
LARGE = sorted(ROOT.glob("configs/7b/*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> CompressConfig:
    return resolve({}, path)


def test_there_is_a_tiny_and_a_large_one_of_each_recipe():
    def methods(paths: list[Path]) -> set[str]:
        steps = [parse_recipe(read(path).recipe).steps for path in paths]
        return {" | ".join(step.name for step in chain) for chain in steps}

    assert methods(TINY) == methods(LARGE) == {"rtn | svd", "rtn | rilq", "rtn | svd | rilq"}


@pytest.mark.parametrize("path", TINY + LARGE, ids=name)
def test_a_config_is_a_claim(path):
    claim = read(path).claim
    assert all(vars(claim).values()), "a claim says everything"
    assert shlex.split(claim.command)[-2:] == ["--config", name(path)]
    assert "not run" not in claim.ours or path in LARGE


@pytest.mark.parametrize("path", TINY + LARGE, ids=name)
def test_the_command_line_reads_it(path, tmp_path, capfd):
    # It is read, and its recipe checked, before the model is looked for.
    command = ["compress", str(tmp_path / "none"), str(tmp_path / "out"), "--config", str(path)]
    assert main(command) == 2
    assert capfd.readouterr().err.startswith(f"error: no folder {tmp_path / 'none'}")
    assert main([*command, "--set", "recipe=rtn(bit=2)"]) == 2
    assert "bit" in capfd.readouterr().err


@pytest.mark.parametrize("path", LARGE, ids=name)
def test_a_large_one_fits_where_it_says(path, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    config = read(path)
    facts = lqec.plan(tmp_path, config.recipe, seqlen=config.seqlen, windows=config.windows)
    memory = re.search(r"with (\d+) GB", config.claim.hardware)
    if memory:
        peaks = {machine["device_peak_bytes"] for machine in facts["machines"]}
        assert max(peaks) < int(memory.group(1)) * 1e9
    assert facts["machines"][0]["fits"]


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "path",
    # What RILQ repairs of this model is asserted of the demo too, which CI runs from the wheel.
    [pytest.param(p, marks=pytest.mark.slow) if "rilq" in p.stem else p for p in TINY],
    ids=lambda path: name(path),
)
def test_a_tiny_one_reaches_its_number(path, tmp_path):
    config = read(path)
    command = shlex.split(config.claim.command)[1:]
    command[2], command[-1] = str(tmp_path / "out"), str(path)
    assert main([*command, "--quiet"]) == 0
    stage = json.loads((tmp_path / "out" / "report.json").read_text())["stages"][-1]
    promised = float(re.search(r"perplexity (\d+\.\d+)", config.claim.ours).group(1))
    assert stage["ppl"] == pytest.approx(promised, rel=0.03)
    assert stage["protocol"] in config.claim.text
