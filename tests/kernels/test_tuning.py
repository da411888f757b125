"""Configurations: the rule's properties, what is measured wins and is remembered, by device."""

import dataclasses
import json

import pytest

from lqec_kernels import tuning
from lqec_kernels.tuning import Config, Problem, autotune, cache_file, choose, choose_by_rule

SHAPES = [(4096, 4096), (4096, 11008), (8192, 28672), (300, 7)]
HERE = Problem("rows", 3, 4096, 11008, 2, "Some GPU")


@pytest.mark.parametrize("kind", ["rows", "tiles"])
@pytest.mark.parametrize("m", [1, 16, 48, 500])
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_every_configuration_can_be_a_kernels(kind, m, d_in, d_out):
    problem = Problem(kind, m, d_in, d_out, 4, "any")
    candidates = tuning.list_candidates(problem)
    assert candidates[0] == choose_by_rule(problem)
    assert len(set(candidates)) == len(candidates) >= 10
    for config in candidates:
        for size in (config.block_m, config.block_n, config.num_warps):
            assert size & (size - 1) == 0 < size
        assert config.block_m >= 8
        assert 1 <= config.splits <= -(-d_in // 256)
        if kind == "rows":  # one program has all of them
            assert config.block_m >= m
        else:
            assert config.splits == 1


def test_the_rule_splits_inputs_until_the_device_is_full_once():
    splits = [choose_by_rule(HERE._replace(d_in=d_in, d_out=n)).splits for d_in, n in SHAPES]
    assert splits == [16, 6, 2, 2]
    for d_out in range(1024, 32768, 256):
        config = choose_by_rule(HERE._replace(d_in=16384, d_out=d_out))
        programs = config.splits * -(-d_out // config.block_n)
        assert 0.75 * tuning.PROGRAMS <= programs <= 1.25 * tuning.PROGRAMS


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 48])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_few_rows_are_never_given_the_four_warps_of_the_other_instructions(m, bits):
    few = m <= 16
    problem = HERE._replace(m=m, bits=bits)
    assert choose_by_rule(problem).block_n == (128 if few and bits < 8 else 64)
    for config in tuning.list_candidates(problem):
        assert (config.num_warps % 4 > 0) == few


def time_by_columns(run) -> float:
    return abs(run().block_n - 100)


def run_of(config: Config):
    return lambda: config


def test_the_fastest_is_chosen_and_remembered(tmp_path):
    candidates = [Config(8, 64), Config(8, 128, splits=2), Config(8, 256)]
    assert choose(HERE, tmp_path) == choose_by_rule(HERE)
    options = {"candidates": candidates, "measure": time_by_columns, "folder": tmp_path}
    best = autotune(HERE, run_of, **options)
    assert best == candidates[1] == choose(HERE, tmp_path)
    # Rows up to the same power of two share it; other sizes, bits and devices do not.
    assert choose(HERE._replace(m=4), tmp_path) == best
    for other in ({"m": 5}, {"bits": 4}, {"d_in": 8192}, {"device": "Another"}, {"kind": "tiles"}):
        problem = HERE._replace(**other)
        assert choose(problem, tmp_path) == choose_by_rule(problem)
    second = HERE._replace(bits=4)
    autotune(second, run_of, **{**options, "candidates": candidates[2:]})
    assert (choose(HERE, tmp_path), choose(second, tmp_path)) == (best, candidates[2])
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


def test_a_configuration_that_cannot_run_is_passed_over(tmp_path):
    def make_run(config: Config):
        if config.block_n > 64:
            raise RuntimeError("out of registers\nand more")
        return lambda: config

    options = {"measure": time_by_columns, "folder": tmp_path}
    candidates = [Config(8, 64), Config(8, 128)]
    assert autotune(HERE, make_run, candidates=candidates, **options) == candidates[0]
    with pytest.raises(
        RuntimeError, match=r"no configuration runs for rows 4x.*: out of registers$"
    ):
        autotune(HERE, make_run, candidates=candidates[1:], **options)


def test_a_cache_that_is_no_json_is_said_and_replaced(tmp_path, caplog):
    file = cache_file(HERE.device, tmp_path)
    file.write_text("{")
    assert choose(HERE, tmp_path) == choose_by_rule(HERE)
    assert "is no JSON" in caplog.text
    best = autotune(HERE, run_of, candidates=[Config(8, 64)], measure=time_by_columns,
                    folder=tmp_path)  # fmt: skip
    assert json.loads(file.read_text()) == {HERE.key: dataclasses.asdict(best)}


def test_the_cache_lies_in_the_users_folder_one_file_a_device_and_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = cache_file("NVIDIA H200")
    assert file.parent == tmp_path / "lqec_jax"
    assert file.name.startswith(f"triton-NVIDIA-H200-jax{tuning.jax.__version__}-triton")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file("x").parent == tmp_path / ".cache" / "lqec_jax"


def test_the_packages_table_comes_before_the_rule_and_after_the_user(tmp_path, monkeypatch):
    measured = Config(8, 32, splits=5)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({HERE.device: {HERE.key: dataclasses.asdict(measured)}}))
    monkeypatch.setattr(tuning, "TABLE", table)
    tuning._read_table.cache_clear()
    assert choose(HERE, tmp_path) == measured
    autotune(HERE, run_of, candidates=[Config(8, 64)], measure=time_by_columns, folder=tmp_path)
    assert choose(HERE, tmp_path) == Config(8, 64)
    tuning._read_table.cache_clear()


def test_the_packages_table_can_be_read():
    for device, known in json.loads(tuning.TABLE.read_text()).items():
        assert device and all(Config(**fields) for fields in known.values())


def test_a_run_is_timed_by_the_median_after_the_first(monkeypatch):
    clock = iter([0.0, 5.0, 5.0, 5.1, 6.0, 6.2, 7.0, 7.3, 8.0, 8.4])
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(clock))
    runs = []
    seconds = tuning.measure_seconds(lambda: runs.append(1))
    assert len(runs) == 1 + tuning.FEWEST and seconds == pytest.approx(0.3)
