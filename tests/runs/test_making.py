"""The record of how an artifact was made: what decides it, and no place of anyone's files."""

import json
import os

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.runs.job import prepare
from lqec_jax.runs.making import count_threads, describe_making, read_making
from tests.golden.tiny_checkpoint import RTN, SEQLEN, make_tokens, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("making")
    write_checkpoint(folder / "model", num_hidden_layers=2)
    np.save(folder / "calib.npy", make_tokens(6))
    return folder


def test_what_decides_is_said_and_where_it_lay_is_not(folder):
    calib = folder / "calib.npy"
    job = prepare(folder / "model", RTN, calib, seqlen=SEQLEN, windows=5, val_ratio=0.4, seed=3)
    made = describe_making(job, calib=calib, held_out=None, val_ratio=0.4, mesh=None)
    assert made["verb"] == "compress" and made["threads"] == count_threads() > 0
    assert {name: made[name] for name in job.fingerprint} == job.fingerprint
    assert (made["model_name"], made["calib_name"], made["eval_name"]) == (
        "model",
        "calib.npy",
        None,
    )
    assert (made["seqlen"], made["windows"], made["val_ratio"], made["seed"]) == (SEQLEN, 5, 0.4, 3)
    assert str(folder) not in json.dumps(made) and os.sep not in made["calib_name"]
    assert read_making(json.loads(json.dumps(made)), folder) == made


def test_an_artifact_keeps_its_record_when_it_is_saved_again(folder, tmp_path):
    small = lqec.compress(folder / "model", RTN, make_tokens(6), seqlen=SEQLEN)
    assert small.made["calib_name"] is None  # ids from memory
    once = lqec.save(small, tmp_path / "once")
    again = lqec.save(lqec.load(once), tmp_path / "again")
    texts = [(path / "lqec.json").read_text() for path in (once, again)]
    assert texts[0] == texts[1] and json.loads(texts[0])["made"] == small.made


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({}, "does not say how it was made"),
        ({"verb": "finetune", "examples": "abcdef0123456789"}, "digest abcdef012345"),
        ({"verb": "compress"}, "is damaged"),
        ({"verb": "compress", "model_name": 3}, "is damaged"),
        ({"verb": ["compress"]}, "is damaged"),
    ],
)
def test_a_record_that_says_too_little_is_refused(made, why, tmp_path):
    with pytest.raises(InputError, match=why):
        read_making(made, tmp_path)
