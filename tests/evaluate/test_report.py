"""report.json: its fields, its weighting of bits, and that any JSON reader can read it."""

import json
import math

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.evaluate.report import (
    PACKAGES,
    build_report,
    check_report,
    make_finite,
    peak_rss_mb,
    reset_peak_rss,
)
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint

FIELDS = {
    "base", "recipe", "seed", "bits_per_weight", "stages", "linears", "fits", "skipped",
    "peak_rss_mb", "seconds", "environment",
}  # fmt: skip


def make_linear(d_in, d_out, bits, error=0.1):
    return {"path": f"{d_in}x{d_out}", "d_in": d_in, "d_out": d_out, "bits_per_weight": bits,
            "relative_error": error, "steps": []}  # fmt: skip


def make_state(**changes):
    linears = {"a": make_linear(10, 10, 2.0), "b": make_linear(10, 30, 4.0)}
    stages = [{"name": "teacher", "seconds": 1.5}, {"name": "rtn", "seconds": 2.25}]
    return {"linears": linears, "stages": stages, "fits": []} | changes


def build(**changes):
    return build_report(make_state(**changes), recipe="rtn()", seed=3, dtype="float32")


def test_a_report_has_its_fields_and_what_it_was_given():
    report = build()
    assert set(report) == FIELDS
    assert (report["recipe"], report["seed"], report["seconds"]) == ("rtn()", 3, 3.75)
    assert report["linears"] == list(make_state()["linears"].values())
    assert report["stages"] == make_state()["stages"]
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_bits_are_weighted_by_the_weights_they_stand_for():
    assert build()["bits_per_weight"] == pytest.approx((100 * 2 + 300 * 4) / 400)


def test_numbers_that_json_cannot_say_become_none():
    state = make_state(
        linears={"a": make_linear(4, 4, 2.0, error=math.nan)},
        fits=[{"history": [{"train_loss": math.inf, "val_loss": 1.0}]}],
    )
    report = build_report(state, recipe="rtn()", seed=0, dtype="float32")
    assert report["linears"][0]["relative_error"] is None
    assert report["fits"] == [{"history": [{"train_loss": None, "val_loss": 1.0}]}]
    assert make_finite((1, -math.inf, "nan", True)) == [1, None, "nan", True]


def test_what_was_left_alone_is_listed_with_a_reason():
    skipped = build()["skipped"]
    assert {entry["path"] for entry in skipped} == {"embed", "norm", "head"}
    assert all(set(entry) == {"path", "reason"} and entry["reason"] for entry in skipped)


def test_the_environment_names_versions_devices_and_dtype():
    environment = build()["environment"]
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["versions"]["numpy"] == np.__version__
    assert set(environment["versions"]) == set(PACKAGES)
    assert environment["backend"] == "cpu" and len(environment["devices"]) == jax.device_count()
    assert environment["compute_dtype"] == "float32"


def test_peak_memory_is_in_megabytes_and_never_falls():
    before = peak_rss_mb()
    held = np.ones(2 * 10**7)  # 160 MB, touched
    after = peak_rss_mb()
    del held
    assert 50 < before <= after <= peak_rss_mb() < 1e6


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a real run of a quantizer and a model step; all linears are [32, 32]."""
    sizes = {"num_hidden_layers": 1, "intermediate_size": 32, "num_key_value_heads": 4}
    folder = write_checkpoint(tmp_path_factory.mktemp("report") / "model", **sizes)
    recipe = "rtn(bits=2, group_size=32) | rilq(rank=2, updates=4, batch=4, eval_every=2)"
    model = lqec.compress(folder, recipe, make_tokens(8), seqlen=SEQLEN, windows=8)
    return model.report


def test_a_run_reports_its_stages_from_the_teacher_on(report):
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "rtn", "rilq"]
    for stage in report["stages"]:
        assert {"name", "ppl", "nll", "tokens", "protocol", "seconds"} <= set(stage)
        assert stage["ppl"] == pytest.approx(math.exp(stage["nll"]))
        assert stage["protocol"].endswith(f"/{SEQLEN}")
    assert report["seconds"] == sum(stage["seconds"] for stage in report["stages"]) > 0


def test_a_run_reports_every_linear_and_fit(report):
    assert len(report["linears"]) == 7
    for linear in report["linears"]:
        wanted = {"path", "d_in", "d_out", "bits_per_weight", "relative_error", "steps"}
        assert wanted <= set(linear)
        assert 0 < linear["relative_error"] < 1
        (step,) = linear["steps"]
        assert {"method", "objective", "before", "after", "notes"} <= set(step)
        # 2-bit codes, a float16 scale and a 2-bit zero a group, and float16 factors of rank 2.
        assert (linear["d_in"], linear["d_out"]) == (32, 32)
        assert linear["bits_per_weight"] == 2 + (16 + 2) / 32 + 2 * 16 * (32 + 32) / (32 * 32)
    assert report["bits_per_weight"] == report["linears"][0]["bits_per_weight"]
    (fit,) = report["fits"]
    assert fit["method"] == "rilq" and fit["best_update"] in {0, 2, 4}
    assert [point["update"] for point in fit["history"]] == [0, 2, 4]
    assert all({"update", "train_loss", "val_loss"} <= set(point) for point in fit["history"])
    json.dumps(report, allow_nan=False)


def test_the_peak_of_a_part_is_measured_where_the_kernel_can():
    held = np.ones(3 * 10**7)  # 240 MB, touched
    before = peak_rss_mb()
    del held
    if not reset_peak_rss():
        pytest.skip("only Linux forgets the most memory a process has held")
    assert peak_rss_mb() < before - 200
    held = np.ones(10**7)
    assert peak_rss_mb() < before - 100
    del held


@pytest.mark.parametrize(
    "damaged",
    [{"linears": 5}, {"linears": [5]}, {"linears": [{"path": 1}]}, {"fits": {}}, {"fits": ["x"]},
     {"stages": None}, {"base": []}, {"seconds": "12"}, {"seconds": None}],
)  # fmt: skip
def test_a_report_that_cannot_be_gone_on_with_is_refused_by_field(damaged):
    check_report({}, "here")
    check_report({"linears": [{"path": "a"}], "fits": [{}], "seconds": 1}, "here")
    (name,) = damaged
    with pytest.raises(InputError, match=r"here: .*restore the file, or remove it") as said:
        check_report(damaged, "here")
    assert name.rstrip("s") in str(said.value)
