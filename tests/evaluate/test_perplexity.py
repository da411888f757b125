"""Perplexity and divergence against float64 numpy, whatever the batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.progress import Silent
from lqec_jax.evaluate import perplexity as module
from lqec_jax.evaluate.perplexity import divergence, perplexity, score_hidden, summarize
from tests.train.tiny import VOCAB, plain_fns

D, WINDOWS, LENGTH = 32, 5, 12
FNS = plain_fns()
SHARPNESS = 3  # puts logits far enough apart that a model prefers something
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (WINDOWS, LENGTH)).astype(np.int32)


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    kernel, head = draw((2, D, D), 1) / D**0.5, SHARPNESS * draw((D, VOCAB), 2) / D**0.5
    return {"embed": draw((VOCAB, D), 3), "blocks": ({"mix": {"kernel": kernel}},), "head": head}


@pytest.fixture(scope="module")
def student(params):
    embed = params["embed"] + 0.3 * draw((VOCAB, D), 4)
    return {**params, "embed": embed, "head": params["head"] / 2}


def log_probs(params):
    """Returns log p(x[t+1]) over the vocabulary in float64, [n, t - 1, vocab]."""
    logits = jax.jit(lambda p: FNS.head(p, FNS.hidden(p, TOKENS)[1]))(params)
    logits = np.asarray(logits, np.float64)[:, :-1]
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


class Recorder(Silent):
    """Keeps what it was told."""

    def __init__(self):
        self.told = []

    def begin(self, task, total, done=0):
        self.told.append((task, total))

    def advance(self, done, message=""):
        self.told.append(done)


def split(monkeypatch, windows):
    """Lets a batch hold so many windows; a vocabulary counts as 1024 at least."""
    monkeypatch.setattr(module, "BATCH_ELEMENTS", int(windows * LENGTH * 1024))


def numbers(score):
    return {name: value for name, value in vars(score).items() if name != "protocol"}


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(params):
    score = perplexity(FNS, {**params, "head": jnp.zeros((D, VOCAB))}, TOKENS)
    assert score.ppl == pytest.approx(VOCAB, rel=1e-5)
    assert score.nll == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert score.high - score.low < 1e-4


def test_perplexity_is_of_tokens_after_the_first_and_its_interval_of_window_means(params):
    lp = log_probs(params)
    nll = -np.take_along_axis(lp, TOKENS[:, 1:, None], axis=-1)[..., 0]
    means = nll.mean(axis=1)
    error = 1.959964 * np.std(means, ddof=1) / np.sqrt(WINDOWS)
    score = perplexity(FNS, params, TOKENS)
    assert score.nll == pytest.approx(nll.mean(), rel=1e-6)
    assert score.ppl == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert score.low == pytest.approx(np.exp(nll.mean() - error), rel=1e-5)
    assert score.high == pytest.approx(np.exp(nll.mean() + error), rel=1e-5)
    assert score.low < score.ppl < score.high
    assert (score.tokens, score.windows) == (WINDOWS * (LENGTH - 1), WINDOWS)


@pytest.mark.parametrize("windows, steps", [(0.5, [1, 2, 3, 4, 5]), (2, [2, 4, 5])])
def test_how_windows_are_batched_changes_no_number(monkeypatch, params, student, windows, steps):
    whole = perplexity(FNS, params, TOKENS), divergence((FNS, params), (FNS, student), TOKENS)
    split(monkeypatch, windows)
    recorder = Recorder()
    cut = (
        perplexity(FNS, params, TOKENS, reporter=recorder),
        divergence((FNS, params), (FNS, student), TOKENS, reporter=recorder),
    )
    assert recorder.told == [("perplexity", 5), *steps, ("divergence", 5), *steps]
    for a, b in zip(whole, cut, strict=True):
        assert numbers(a) == pytest.approx(numbers(b), rel=1e-6)


def test_the_last_hidden_state_scores_as_the_whole_model(monkeypatch, params, tmp_path):
    split(monkeypatch, 2)
    pre_norm = np.asarray(jax.jit(FNS.hidden)(params, TOKENS)[0])
    stored = np.memmap(tmp_path / "h", np.float32, "w+", shape=pre_norm.shape)
    stored[:] = pre_norm
    blockless = {name: value for name, value in params.items() if name != "blocks"}
    score = score_hidden(FNS, blockless, stored, TOKENS, "text")
    whole = perplexity(FNS, params, TOKENS, "text")
    assert numbers(score) == pytest.approx(numbers(whole), rel=1e-6)
    assert score.protocol == whole.protocol


def test_losses_become_a_perplexity_by_its_formula():
    nll = np.float32([[1, 2, 3], [2, 2, 5], [0, 1, 2], [4, 4, 4]])
    score = summarize(nll, "text")
    means = np.array([2, 3, 1, 4])
    error = 1.959964 * means.std(ddof=1) / 2
    assert score.nll == means.mean() and score.ppl == pytest.approx(np.exp(2.5), rel=1e-12)
    assert (score.low, score.high) == pytest.approx(
        (np.exp(2.5 - error), np.exp(2.5 + error)), rel=1e-12
    )
    assert (score.tokens, score.windows, score.protocol) == (12, 4, "text/4")


def test_one_window_has_no_interval_and_a_broken_model_no_finite_perplexity():
    one = summarize(np.float32([[1, 3]]), "text")
    assert one.low == one.ppl == one.high == pytest.approx(np.exp(2))
    assert summarize(np.full((2, 3), 1e4, np.float32), "text").ppl == math.inf


def test_a_model_does_not_diverge_from_itself(params):
    same = divergence((FNS, params), (FNS, params), TOKENS)
    assert (same.kl, same.top1, same.tokens) == (0, 1, WINDOWS * (LENGTH - 1))


def test_divergence_is_of_the_teachers_distribution(params, student):
    p, q = log_probs(params), log_probs(student)
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    back = (np.exp(q) * (q - p)).sum(axis=-1).mean()
    top1 = (p.argmax(axis=-1) == q.argmax(axis=-1)).mean()
    assert 0.05 < kl and abs(kl - back) > 0.01 * kl and 0.2 < top1 < 0.98
    came = divergence((FNS, params), (FNS, student), TOKENS)
    assert came.kl == pytest.approx(kl, rel=1e-5)
    assert came.top1 == pytest.approx(top1, rel=1e-6)


def test_the_protocol_carries_the_length(params, student):
    assert perplexity(FNS, params, TOKENS).protocol == f"tokens/{LENGTH}"
    came = divergence((FNS, params), (FNS, student), TOKENS[:, :8], "wikitext")
    assert (came.protocol, came.tokens) == ("wikitext/8", WINDOWS * 7)
