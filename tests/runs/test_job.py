"""What is checked before a run, and what identifies it."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import set_at
from lqec_jax.errors import InputError
from lqec_jax.io.tensor_file import read_entry
from lqec_jax.runs.job import (
    make_windows,
    open_source,
    prepare,
    read_text,
    read_windows,
    resolve_dtype,
)
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint, write_tokens

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


def test_documents_with_a_bos_of_their_own_are_said(folder, tmp_path):
    text = tmp_path / "a.jsonl"
    rows = [{"text": mark + "ab" * 20} for mark in ("\x01", "", "\x01")]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = open_source(folder)[0].config

    def read(bos_id):
        words = SimpleNamespace(bos_id=bos_id, encode=lambda text: [ord(c) % 60 for c in text])
        return read_text(config, words, text, text, SEQLEN, 3, 0.5)

    note = f"{text}: 2 of 3 documents bring their own BOS; none gets a second"
    assert read(1).notes == (note, note) and read(2).notes == ()
    prepared = dataclasses.replace(job(folder), text=read(1))
    assert prepared.text_in_words.endswith(f"; {note}; {note}")


def test_few_tokens_and_a_chain_that_is_seldom_meant_are_said_before_work(folder):
    twice = "rtn(group_size=16) | loftq(rank=2, quantizer=gptq(group_size=16))"
    said = job(folder, recipe=twice, windows=2).text.notes
    assert said[0].startswith("recipe: loftq makes a base of its own")
    assert said[1].startswith("statistics: of 32 tokens for ") and len(said) == 2
    assert job(folder, recipe="rtn(bits=2, group_size=16)", windows=2).text.notes == ()


def test_a_chain_that_is_good_for_nothing_is_refused(folder):
    with pytest.raises(InputError, match="no step before svd changes a weight"):
        job(folder, recipe="svd(rank=2) | rtn(bits=2, group_size=16)")


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


def test_a_path_its_ids_and_its_windows_are_one_text(folder, tmp_path):
    path = write_tokens(tmp_path / "calib.npy", 10)
    windows = make_tokens(10).reshape(10, SEQLEN)
    prints = [job(folder, tokens=tokens).fingerprint for tokens in (path, windows, make_tokens(10))]
    assert prints[0] == prints[1] == prints[2]


def test_sizes_are_known_from_shapes_alone(folder):
    leaves = job(folder, "rtn(bits=3, group_size=16) | rilq(rank=0.25)").leaves
    up, k = leaves["mlp/up"], leaves["attn/k"]
    assert (up.d_in, up.d_out, up.corrections[0].rank) == (32, 64, 8)
    assert (k.d_in, k.d_out, k.corrections[0].rank) == (32, 16, 4)
    assert isinstance(up.base.codes, jax.ShapeDtypeStruct)


def test_opening_reads_no_block(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        "lqec_jax.io.sources.hf.read_entry",
        lambda entry: read.append(entry.shape) or read_entry(entry),
    )
    source, checkpoint = open_source(folder)
    assert sorted(read) == [(32,), (64, 32), (64, 32)]  # norm, embedding, head
    block = source.block(1)
    assert len(read) == 3 + 9
    stored = checkpoint.read("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_array_equal(block["mlp"]["down"]["kernel"], stored.T)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seqlen": 2.0}, "seqlen=2.0; an integer from 2 to 64 was wanted"),
        ({"seqlen": True}, "seqlen=True; an integer from 2 to 64 was wanted"),
        ({"seqlen": 65}, "seqlen=65; an integer from 2 to 64 was wanted"),
        ({"windows": "9"}, "windows='9'; an integer >= 1 was wanted"),
        ({"seed": -1}, "seed=-1; an integer from 0 to 4294967295 was wanted"),
        ({"seed": 0.5}, "seed=0.5; an integer"),
        ({"tokens": np.zeros((2, 2, 32), int)}, "int64 [2, 2, 32]; integers"),
        ({"tokens": np.full(99, 64)}, "token 0 is id 64, outside the model's vocabulary of 64"),
        ({"eval": np.zeros(31, int)}, "31 tokens do not fill one window of 32"),
        ({"recipe": "rtn(bits=2, group_size=24)"}, "(at every block's attn/q)"),
    ],
)
def test_what_cannot_be_used_is_refused(folder, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        job(folder, **changes)


def test_the_largest_seed_is_a_seed_of_its_own():
    keys = [jax.random.key_data(jax.random.key(seed)).tolist() for seed in (0, 1, 2**32 - 1)]
    assert len(set(map(tuple, keys))) == 3


def test_a_model_in_memory_is_checked_too(folder):
    model = lqec.load(folder)
    assert prepare(model, RECIPE, make_tokens(6), seqlen=SEQLEN, dtype="bfloat16").dtype == (
        jnp.float32  # the model's own
    )
    broken = set_at(model.params, "norm/scale", model.params["norm"]["scale"].at[3].set(jnp.nan))
    with pytest.raises(InputError, match="hold NaN or Inf"):
        prepare(dataclasses.replace(model, params=broken), RECIPE, make_tokens(6), seqlen=SEQLEN)
    with pytest.raises(InputError, match="compressed already"):
        prepare(dataclasses.replace(model, recipe="rtn()"), RECIPE, make_tokens(6), seqlen=SEQLEN)
    with pytest.raises(InputError, match="no calibration text"):
        prepare(model, RECIPE)


def test_ids_from_a_file_follow_no_protocol(folder, tmp_path):
    path = write_tokens(tmp_path / "text.npy", 3)
    windows, protocol = read_windows(lqec.load(folder), path, SEQLEN, 2)
    np.testing.assert_array_equal(windows, make_tokens(3)[: 2 * SEQLEN].reshape(2, SEQLEN))
    assert protocol == "tokens"
