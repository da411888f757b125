"""What is checked before a run, and what identifies it."""

import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.prepare import make_windows, open_source, prepare, resolve_dtype
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint

RECIPE = "rtn(bits=2, group_size=16)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("prepare") / "dense")


def job(folder, recipe=RECIPE, tokens=None, **options):
    tokens = make_tokens(10) if tokens is None else tokens
    return prepare(folder, recipe, tokens, **({"seqlen": SEQLEN, "windows": 10} | options))


def test_windows_are_split_in_order(folder):
    text = job(folder).text
    windows = make_tokens(10).reshape(10, SEQLEN)
    np.testing.assert_array_equal(text.train, windows[:8])
    np.testing.assert_array_equal(text.val, windows[8:])
    np.testing.assert_array_equal(text.score, windows[8:])
    assert text.protocol == "calib-val"


def test_a_short_text_is_used_and_said(folder):
    prepared = job(folder, windows=50)
    assert len(prepared.text.windows) == 10
    assert "the text holds no more of the 50 asked for" in prepared.text_in_words


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"seed": 1}, "seed"),
        ({"recipe": "rtn(bits=3, group_size=16)"}, "recipe"),
        ({"tokens": make_tokens(10, seed=1)}, "calibration"),
        ({"val_ratio": 0.5}, "calibration"),
        ({"eval": make_tokens(2)}, "eval"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_the_fingerprint_changes_with_what_decides_the_result(folder, changes, field):
    before, after = job(folder).fingerprint, job(folder, **changes).fingerprint
    assert [name for name in before if before[name] != after[name]] == [field]


def test_the_fingerprint_changes_with_the_model(folder, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    assert open_source(folder)[0].fingerprint != open_source(other)[0].fingerprint


def test_defaults_written_out_are_the_same_run(folder):
    short, long = job(folder), job(folder, recipe=str(job(folder).recipe))
    assert short.fingerprint == long.fingerprint


def test_windows_of_another_length_are_refused(folder):
    config = open_source(folder)[0].config
    with pytest.raises(InputError, match=r"integers \[n\] or \[n, 32\]"):
        make_windows(config, np.zeros((2, 16), np.int32), SEQLEN)
    with pytest.raises(InputError, match="integers"):
        make_windows(config, np.zeros(64), SEQLEN)


def test_dtypes_by_name():
    assert np.dtype(resolve_dtype("auto")) == np.float32  # the tests run on a CPU
    with pytest.raises(InputError, match="one of auto, float32, bfloat16"):
        resolve_dtype("float8")
