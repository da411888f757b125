"""The verbs as functions: what they return, what they agree on, and what they refuse."""

import dataclasses
import re
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import equal_trees, unstack_blocks
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import load_artifact
from lqec_jax.recipe import parse_recipe
from tests.golden.tiny_checkpoint import RTN, SEQLEN, hash_folder, make_tokens, write_checkpoint

TOKENS = make_tokens(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    write_checkpoint(folder / "model", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return lqec.load(folder / "model")


@pytest.fixture(scope="module")
def small(folder):
    """Streamed from the folder, and kept as an artifact."""
    return lqec.compress(folder / "model", RTN, TOKENS, seqlen=SEQLEN, out=folder / "out")


# ---- load, logits, perplexity, divergence


def test_perplexity_is_that_of_the_logits(model):
    tokens = np.append(TOKENS, [1, 2, 3])  # the remainder is dropped
    windows = TOKENS.reshape(-1, SEQLEN)
    logits = np.asarray(lqec.logits(model, windows), np.float64)[:, :-1]
    assert logits.shape == (6, SEQLEN - 1, 64)
    top = logits.max(axis=-1, keepdims=True)
    log_sum = top[..., 0] + np.log(np.exp(logits - top).sum(axis=-1))
    label = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    nll = (log_sum - label).mean()
    score = lqec.perplexity(model, tokens, seqlen=SEQLEN)
    assert score.nll == pytest.approx(nll, rel=1e-6)
    assert score.ppl == pytest.approx(np.exp(nll), rel=1e-5)
    assert (score.tokens, score.windows) == (6 * (SEQLEN - 1), 6)
    assert lqec.perplexity(model, windows, seqlen=SEQLEN) == score


def test_a_repacked_model_answers_the_same_and_is_not_for_disk(small, folder):
    repacked = lqec.repack(small)
    assert jax.tree.structure(repacked.params) != jax.tree.structure(small.params)
    windows = TOKENS.reshape(-1, SEQLEN)
    np.testing.assert_allclose(
        lqec.logits(repacked, windows), lqec.logits(small, windows), atol=1e-5
    )
    for write in (lqec.save, lqec.export):
        with pytest.raises(InputError, match="repacked for products"):
            write(repacked, folder / "repacked")


def test_perplexity_says_how_far_it_is(model):
    said = []

    class Reporter:
        def begin(self, task, total, done=0):
            said.append((task, total, done))

        def advance(self, done, message=""):
            said.append(done)

        def say(self, line):
            said.append(line)

    lqec.perplexity(model, TOKENS, seqlen=SEQLEN, reporter=Reporter())
    assert said == [("perplexity", 6, 0), 6]


def test_divergence_is_of_the_student_from_its_teacher(model, small):
    windows = TOKENS.reshape(-1, SEQLEN)
    log_p, log_q = (
        np.asarray(jax.nn.log_softmax(lqec.logits(m, windows)))[:, :-1] for m in (model, small)
    )
    found = lqec.divergence(small, model, TOKENS, seqlen=SEQLEN)
    assert found.kl == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-4)
    assert found.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert found.protocol == "tokens/32" and found.tokens == 6 * (SEQLEN - 1)
    itself = lqec.divergence(model, model, TOKENS, seqlen=SEQLEN)
    assert itself.kl == pytest.approx(0.0, abs=1e-6) and itself.top1 == 1.0


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros(8, int), "int64 [8]; integers [batch, time] were wanted"),
        (np.zeros((1, 8)), "float64 [1, 8]; integers"),
        (np.full((1, 8), 64), "outside the model's vocabulary of 64"),
        (np.full((1, 8), -1), "outside the model's vocabulary of 64"),
    ],
)
def test_logits_refuse_what_are_no_tokens(tokens, message, model):
    with pytest.raises(InputError, match=re.escape(message)):
        lqec.logits(model, tokens)


def test_perplexity_refuses_too_little_and_too_long(model):
    with pytest.raises(InputError, match="31 tokens do not fill one window of 32"):
        lqec.perplexity(model, TOKENS[:31], seqlen=SEQLEN)
    with pytest.raises(InputError, match="seqlen=2048; an integer from 2 to 64 was wanted"):
        lqec.perplexity(model, TOKENS)


# ---- compress, save


def test_a_model_in_memory_and_its_folder_compress_to_the_same(model, small):
    again = lqec.compress(model, RTN, TOKENS, seqlen=SEQLEN)
    assert equal_trees(again.params, small.params)
    stages = [[{**stage, "seconds": 0} for stage in m.report["stages"]] for m in (again, small)]
    assert stages[0] == stages[1]
    assert again.recipe == small.recipe == str(parse_recipe(RTN))


def test_the_model_returned_is_the_model_on_disk(folder, small):
    loaded = lqec.load(folder / "out")
    assert equal_trees(loaded.params, small.params)
    assert loaded.report == small.report and loaded.recipe == small.recipe
    assert loaded.fingerprint == small.fingerprint != ""
    windows = TOKENS.reshape(-1, SEQLEN)
    assert bool(jnp.array_equal(lqec.logits(loaded, windows), lqec.logits(small, windows)))


def test_what_reads_back_otherwise_is_given_no_name(folder, small, monkeypatch):
    def damage(*arguments):
        model = load_artifact(*arguments)
        norm = jax.tree.map(lambda array: array.at[0].add(1), model.params["norm"])
        return dataclasses.replace(model, params={**model.params, "norm": norm})

    run = partial(lqec.compress, folder / "model", RTN, TOKENS, seqlen=SEQLEN, out=folder / "bad")
    with monkeypatch.context() as patch:
        patch.setattr("lqec_jax.io.artifact.artifact.load_artifact", damage)
        with pytest.raises(OSError, match="what was read back is not what was written"):
            run()
    assert not (folder / "bad").exists()
    assert equal_trees(run(resume=True).params, small.params)
    assert hash_folder(folder / "bad")["lqec.json"] == hash_folder(folder / "out")["lqec.json"]


def test_a_run_without_a_name_leaves_nothing_behind(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lqec.compress(model, RTN, TOKENS, seqlen=SEQLEN)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("lqec_jax.runs.driver.Driver.compress", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lqec.compress(model, RTN, TOKENS, seqlen=SEQLEN)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_before_everything_is_checked(folder):
    before = hash_folder(folder)
    for options in ({"seqlen": 99}, {"windows": 1}, {"dtype": "int4"}, {"resume": True}):
        with pytest.raises(InputError):
            lqec.compress(folder / "model", RTN, TOKENS, out=folder / "never",
                          **{"seqlen": SEQLEN, **options})  # fmt: skip
    with pytest.raises(InputError, match="is compressed already"):
        lqec.compress(folder / "out", RTN, TOKENS, seqlen=SEQLEN, out=folder / "never")
    assert hash_folder(folder) == before and not (folder / "never.partial").exists()


def test_saving_is_refused_where_something_is(small, folder, tmp_path):
    with pytest.raises(InputError, match="add --overwrite"):
        lqec.save(small, folder / "out")
    assert lqec.save(small, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert hash_folder(tmp_path / "a" / "b") == hash_folder(folder / "out")
    lqec.save(small, tmp_path / "a" / "b", overwrite=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


# ---- quantize


def test_one_matrix_compresses_as_it_does_in_its_model(model, small):
    dense = unstack_blocks(model.params["blocks"])[1]["mlp"]["down"]["kernel"]
    inside = unstack_blocks(small.params["blocks"])[1]["mlp"]["down"]["kernel"]
    assert equal_trees(lqec.quantize(dense, RTN), inside)


def test_a_matrix_with_inputs_uses_them():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 8)).astype(np.float32)
    x = rng.standard_normal((500, 64)) * np.geomspace(0.01, 10, 64)
    blind = lqec.quantize(w, "rtn(bits=2, group_size=32, clip_search='weight')")
    seeing = lqec.quantize(w, "rtn(bits=2, group_size=32, clip_search='output')", x=x)

    def output_error(leaf):
        return np.square(x @ (w - np.asarray(leaf.dense()))).sum()

    assert output_error(seeing) < 0.8 * output_error(blind)


def test_bits_count_all_that_is_stored():
    leaf = lqec.quantize(np.ones((64, 32)), "rtn(bits=4, group_size=32) | svd(rank=2)")
    scales, zeros = 16 * 2 * 32, 4 * 2 * 32
    factors = 16 * 2 * (64 + 32)
    assert leaf.bits_per_weight == 4 + (scales + zeros + factors) / (64 * 32)


@pytest.mark.parametrize(
    ("w", "recipe", "message"),
    [
        (
            np.ones((32, 4)),
            "rtn(bits=2, group_size=32, clip_search='output')",
            "reads the inputs' rms; give x=",
        ),  # noqa: E501
        (np.ones((32, 4)), "rtn(bits=2) | rilq(rank=2)", "rilq needs a whole model; use compress"),
        (np.ones(32), "rtn(bits=2)", "w has shape [32]; [d_in, d_out] was wanted"),
        (np.full((32, 4), np.nan), "rtn(bits=2)", "holds NaN or Inf"),
        (np.ones((32, 4)), "rtn(bits=2, group_size=24)", "not divisible by group_size=24"),
    ],
)
def test_quantize_refuses_what_it_cannot_do(w, recipe, message):
    with pytest.raises(InputError, match=re.escape(message)):
        lqec.quantize(w, recipe)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((9, 31)), "x has shape [9, 31]; [tokens, 32] was wanted for w [32, 4]"),
        (np.ones((0, 32)), "x has shape [0, 32]"),
        (np.ones(32), "x has shape [32]"),
        (np.full((9, 32), np.inf), "x holds NaN or Inf"),
    ],
)
def test_quantize_refuses_inputs_that_are_not_the_matrix_s(x, message):
    recipe = "rtn(bits=2, group_size=32, clip_search='output')"
    with pytest.raises(InputError, match=re.escape(message)):
        lqec.quantize(np.ones((32, 4)), recipe, x=x)
