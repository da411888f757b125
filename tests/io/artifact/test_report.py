"""A report read back: what a run writes is taken, what no run writes is refused by name."""

import json

import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.artifact.report import REPORT, read_report

WHOLE = {
    "recipe": "rtn(bits=2)",
    "seed": 0,
    "bits_per_weight": 2.25,
    "stages": [{"name": "teacher", "ppl": None, "protocol": "calib-val", "tokens": 5}],
    "linears": [{"path": "blocks/0/attn/q", "relative_error": 0.1, "bits_per_weight": 2.25}],
    "fits": [{"method": "rilq", "history": [], "best_update": 0, "layer": 1}],
    "environment": {"versions": {"jax": "1"}},
}


def write(folder, report):
    (folder / REPORT).write_text(json.dumps(report))
    return folder


def test_what_a_run_writes_comes_back_and_a_missing_one_is_empty(tmp_path):
    assert read_report(tmp_path) == {}
    assert read_report(write(tmp_path, WHOLE)) == WHOLE
    assert read_report(write(tmp_path, {})) == {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stages": {}}, "stages is '{}'"),
        ({"stages": [3]}, "stages[0] is damaged"),
        ({"stages": [{"ppl": "low"}]}, "stages[0].ppl is 'low'"),
        ({"linears": [{}]}, "linears[0] has no path"),
        ({"linears": [{**WHOLE["linears"][0], "path": 3}]}, "linears[0].path is '3'"),
        ({"fits": [{**WHOLE["fits"][0], "best_update": None}]}, "fits[0].best_update is 'None'"),
        ({"seconds": "long"}, "seconds is 'long'"),
        ({"bits_per_weight": True}, "bits_per_weight is 'True'"),
        ({"environment": {"versions": 3}}, "environment.versions is damaged"),
        ({"recipe": "x" * 99 + "\n", "seed": []}, "seed is '[]'"),
    ],
)
def test_what_no_run_writes_is_refused_by_name(tmp_path, change, named):
    with pytest.raises(InputError) as said:
        read_report(write(tmp_path, WHOLE | change))
    assert named in str(said.value) and REPORT in str(said.value)
    assert "move it away" in str(said.value)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1', "\x00"])
def test_what_is_no_object_is_refused(tmp_path, text):
    (tmp_path / REPORT).write_text(text)
    with pytest.raises(InputError, match=REPORT):
        read_report(tmp_path)
