"""Perplexity, and the distance between two models, over windows fed alone.

Every window of T tokens is fed by itself and tokens 1 .. T-1 are predicted; the number carries the
protocol that made it, because two protocols cannot be compared.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.train.vocabulary import next_token_nll

# Logits and the like that a batch of windows may hold, in elements.
BATCH_ELEMENTS = 2**25
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, with a 95% interval over windows.

    Attributes:
      ppl: exp(nll).
      nll: nats per predicted token.
      low, high: ppl at nll ∓ 1.96 standard errors of the windows' means; equal to ppl for one
        window.
      tokens: how many were predicted.
      windows: how many were fed.
      protocol: how the text became windows, and their length.
    """

    ppl: float
    nll: float
    low: float
    high: float
    tokens: int
    windows: int
    protocol: str


@dataclass(frozen=True)
class Divergence:
    """How far a student's next-token distribution is from its teacher's.

    Attributes:
      kl: mean KL(teacher || student) per token, nats.
      top1: fraction of tokens at which both rank the same token first.
      tokens: over how many.
    """

    kl: float
    top1: float
    tokens: int
    protocol: str


def perplexity(
    fns: ModelFns,
    params: Params,
    windows: np.ndarray,
    protocol: str = "tokens",
    reporter: Reporter | None = None,
) -> Perplexity:
    """Scores a model on windows of tokens.

    Args:
      windows: int [n, T].
      protocol: how the windows were made; the length is added to it.
    """
    score, reporter = _score_tokens(fns), reporter or Silent()
    reporter.begin("perplexity", len(windows))
    nll = []
    for rows in _batches(len(windows), windows.shape[1], fns):
        nll.append(np.asarray(score(params, windows[rows])))
        reporter.advance(rows.stop)
    return summarize(np.concatenate(nll), protocol)


def score_hidden(fns: ModelFns, params: Params, pre_norm, windows, protocol: str) -> Perplexity:
    """Scores the last block's output, [n, T, d], without running the blocks."""
    score = _score_hidden(fns)
    batches = _batches(len(windows), windows.shape[1], fns)
    outer = {name: value for name, value in params.items() if name != "blocks"}
    nll = [np.asarray(score(outer, np.asarray(pre_norm[rows]), windows[rows])) for rows in batches]
    return summarize(np.concatenate(nll), protocol)


def summarize(nll: np.ndarray, protocol: str) -> Perplexity:
    """Turns per-token losses [n, T - 1] into a perplexity."""
    means = nll.mean(axis=1, dtype=np.float64)
    mean = float(means.mean())
    error = NORMAL_95 * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Perplexity(
        ppl=_exp(mean),
        nll=mean,
        low=_exp(mean - error),
        high=_exp(mean + error),
        tokens=nll.size,
        windows=len(nll),
        protocol=f"{protocol}/{nll.shape[1] + 1}",
    )


def divergence(
    teacher: tuple[ModelFns, Params],
    student: tuple[ModelFns, Params],
    windows: np.ndarray,
    protocol: str = "tokens",
    reporter: Reporter | None = None,
) -> Divergence:
    """Compares two models token by token.

    Both are given as (functions, parameters); logits of a batch of windows are held for both.
    """
    compare, reporter = _compare(teacher[0], student[0]), reporter or Silent()
    reporter.begin("divergence", len(windows))
    kl, agree, count = 0.0, 0.0, 0
    for rows in _batches(len(windows), windows.shape[1], teacher[0]):
        batch_kl, batch_agree = compare(teacher[1], student[1], windows[rows])
        kl, agree = kl + float(batch_kl), agree + float(batch_agree)
        count += windows[rows][:, :-1].size
        reporter.advance(rows.stop)
    return Divergence(kl / count, agree / count, count, f"{protocol}/{windows.shape[1]}")


@lru_cache(maxsize=8)
def _score_tokens(fns: ModelFns):
    return jax.jit(lambda p, tokens: next_token_nll(fns, p, fns.hidden(p, tokens)[1], tokens))


@lru_cache(maxsize=8)
def _score_hidden(fns: ModelFns):
    return jax.jit(lambda p, h, tokens: next_token_nll(fns, p, fns.norm(p, h), tokens))


@lru_cache(maxsize=8)
def _compare(teacher: ModelFns, student: ModelFns):
    def log_probs(fns: ModelFns, params: Params, tokens: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(fns.head(params, fns.hidden(params, tokens)[1][:, :-1]))

    @jax.jit
    def compare(teacher_params, student_params, tokens):
        p, q = (
            log_probs(teacher, teacher_params, tokens),
            log_probs(student, student_params, tokens),
        )
        agree = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
        return jnp.sum(jnp.exp(p) * (p - q)), jnp.sum(agree)

    return compare


def _batches(count: int, length: int, fns: ModelFns) -> Iterator[slice]:
    """Yields slices of windows, equal but for the last, that keep a batch's logits small."""
    size = max(1, BATCH_ELEMENTS // (length * max(fns.vocab_size or 1, 1024)))
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
