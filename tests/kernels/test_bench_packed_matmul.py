"""The benchmark of the kernels runs end to end at a tiny size, and tells what it did not run."""

import importlib.util
import json
import sys

import pytest

from tests.sources import ROOT

FOLDER = ROOT / "kernels" / "bench" / "packed_matmul"


@pytest.fixture(scope="module")
def bench():
    if not FOLDER.is_dir():
        pytest.skip("benchmarks are not here: an installed package has none")
    spec = importlib.util.spec_from_file_location("packed_matmul_bench", FOLDER / "bench.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))  # as it is where a script is run
        spec.loader.exec_module(module)
    yield module
    del sys.modules["plan"]


@pytest.fixture(scope="module")
def results(bench, tmp_path_factory) -> tuple[dict, str]:
    file = tmp_path_factory.mktemp("bench") / "small.json"
    bench.main(["--small", "--out", str(file)])
    bench.main(["--table", str(file)])
    return json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_every_row_has_seconds_or_a_reason(bench, results):
    rows = results[0]["rows"]
    assert len(rows) == sum(
        len(bench.list_sides(problem, bench.PLANS["small"]))
        for problem in bench.PLANS["small"].problems()
    )
    for row in rows:
        runs = row["side"] in (bench.OURS, bench.IN_SCAN, *bench.PEERS[:2])
        assert (row["seconds"] is not None) == (row["reason"] == "")
        assert row["seconds"] is None or row["seconds"] > 0
        assert not runs or row["seconds"], row
    assert all(rate > 0 for rate in results[0]["ceilings"].values())


def test_the_table_has_a_line_a_problem_and_says_what_was_not_run(bench, results):
    _, table = results
    lines = [line for line in table.splitlines() if line.startswith("| [256, 64]")]
    problems = list(bench.PLANS["small"].problems())
    assert len(lines) == len(problems) + 2  # and what the adapter adds, at either width
    for line, problem in zip(lines[: len(problems)], problems, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [int(cell) for cell in cells[1:4]] == [problem.bits, problem.m, problem.rank]
        assert float(cells[4]) >= 0 and cells[5].endswith("%") and cells[6].endswith("x")
        assert ("not run" in cells) == (problem.rank == 0)  # gemlite on a CPU


def test_without_a_run_all_is_not_run(bench, tmp_path):
    bench.main(["--table", str(tmp_path / "results.json")])
    table = (tmp_path / "results.md").read_text()
    assert "not run, because none was available" in table
    cells = [cell.strip() for line in table.splitlines() if line.startswith("| [8192, 28672]")
             for cell in line.strip("|").split("|")]  # fmt: skip
    assert cells.count("not run") > 100
    assert not any(cell.endswith(("%", "us")) for cell in cells)
    assert (FOLDER / "results.json").exists() or (FOLDER / "results.md").read_text() == table


def test_floors_count_what_must_be_read(bench):
    problem = bench.Problem(8192, 28672, 2, 1)
    weight = 8192 * 28672 / 4 + 128 * 28672 * 4
    assert problem.moved == weight + 2 * (8192 + 28672)
    assert problem.flops == 2 * 8192 * 28672
    adapted = problem._replace(rank=64)
    assert adapted.moved - problem.moved == 2 * 64 * (8192 + 28672)
    ceilings = {"copy_bytes_per_second": 4e12, "matmul_flops_per_second": 8e14,
                "launch_seconds": 1e-6}  # fmt: skip
    floor = problem.moved / 4e12
    seconds = {bench.OURS: 2 * floor, bench.PEERS[0]: 12 * floor}
    told = sys.modules["plan"].compare_with_ceilings(problem, seconds, ceilings)
    assert told[1:] == ["50%", f"{2 * floor / (floor + 1e-6):.2f}x", "6.00x"]
    # Many rows are bound by the matrix units.
    many = problem._replace(m=2048)
    told = sys.modules["plan"].compare_with_ceilings(many, seconds, ceilings)
    assert told[0] == f"{1e6 * many.flops / 8e14:.1f}"
