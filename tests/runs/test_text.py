"""Texts become windows: in order, checked, and under the protocol that made them."""

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.runs.text import make_windows, name_protocol, read_text, read_windows
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint, write_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lqec.load(write_checkpoint(tmp_path_factory.mktemp("text") / "dense"))


def read(model, calib, held_out=None, windows=10):
    return read_text(model.config, model.tokenizer, calib, held_out,
                     seqlen=SEQLEN, windows=windows, val_ratio=0.2)  # fmt: skip


def test_windows_are_split_in_order(model):
    text = read(model, make_tokens(10))
    windows = make_tokens(10).reshape(10, SEQLEN)
    np.testing.assert_array_equal(text.train, windows[:8])
    np.testing.assert_array_equal(text.val, windows[8:])
    np.testing.assert_array_equal(text.score, windows[8:])
    assert text.protocol == "calib-val" and text.seqlen == SEQLEN


def test_another_text_is_the_last_of_the_windows_and_the_score(model):
    text = read(model, make_tokens(10), make_tokens(3, seed=1))
    np.testing.assert_array_equal(text.score, make_tokens(3, seed=1).reshape(3, SEQLEN))
    np.testing.assert_array_equal(text.windows[-3:], text.score)
    assert len(text.windows) == 13 and text.protocol == "tokens"


def test_windows_of_another_length_are_refused(model):
    with pytest.raises(InputError, match=r"integers \[n\] or \[n, 32\]"):
        make_windows(model.config, np.zeros((2, 16), np.int32), SEQLEN)
    with pytest.raises(InputError, match="integers"):
        make_windows(model.config, np.zeros(64), SEQLEN)


def test_ids_from_a_file_follow_no_protocol(model, tmp_path):
    path = write_tokens(tmp_path / "text.npy", 3)
    windows, protocol = read_windows(model, path, SEQLEN, 2)
    np.testing.assert_array_equal(windows, make_tokens(3)[: 2 * SEQLEN].reshape(2, SEQLEN))
    assert protocol == "tokens"
    assert name_protocol("a.txt", "gptq") == "gptq"
    assert name_protocol(make_tokens(1), "gptq") == "tokens"
