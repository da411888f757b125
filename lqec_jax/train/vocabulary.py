"""What a head says of hidden states, over a vocabulary that is walked in chunks.

Next-token losses, divergences and a teacher's likeliest tokens, each a running sum over the head's
columns: logits are held `VOCAB_CHUNK` columns at a time, forward and backward.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lqec_jax.core.types import ModelFns, Params

# Vocabulary columns whose logits are held at once; a whole head where it is narrower.
VOCAB_CHUNK = 8192
# Stands for the logarithm of nothing. A finite one keeps every gradient finite: that of
# logaddexp(-inf, -inf) is not a number.
FLOOR = -1e30


class LogProbs(NamedTuple):
    """A teacher's log-probabilities, floating [b, t, vocab], up to a constant of each token."""

    log_probs: jax.Array


class TopK(NamedTuple):
    """A teacher's k likeliest tokens, and how likely the others are together.

    Attributes:
      ids: int32 [b, t, k].
      log_probs: log p of each, float32 [b, t, k].
      rest: log of the mass of all others, float32 [b, t]; `FLOOR` or below where there are none.
    """

    ids: jax.Array
    log_probs: jax.Array
    rest: jax.Array


Teacher = jax.Array | LogProbs | TopK


def kl_terms(
    fns: ModelFns, teacher: Teacher, params: Params, post_norm: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns KL(teacher || student) of every token and the student's next-token losses, in nats.

    Args:
      teacher: post-norm hidden states [b, t, d], read by the student's head, which both share; its
        `LogProbs`; or its `TopK`, by which the KL is that of k + 1 outcomes, a lower bound.
      post_norm: the student's hidden states [b, t, d].
    Returns:
      KL float32 [b, t], and -log q(x[t+1]) float32 [b, t - 1]. No gradient reaches the teacher.
    """
    # What follows the last token is not known: its place is filled, and dropped below.
    labels = jnp.roll(tokens, -1, axis=1)
    terms = _coarse_terms if isinstance(teacher, TopK) else _full_terms
    kl, nll = terms(fns, jax.lax.stop_gradient(teacher), params, post_norm, labels)
    return kl, nll[:, :-1]


class _Full(NamedTuple):
    """What is known of the columns seen so far, each [b, t].

    Attributes:
      student, teacher: log-sum-exp of their logits.
      gap: Σ p (z_p - z_q), p being the teacher's probabilities among the columns seen.
      label: the student's logit of the label.
    """

    student: jax.Array
    teacher: jax.Array
    gap: jax.Array
    label: jax.Array


def _full_terms(fns: ModelFns, teacher, params: Params, post_norm: jax.Array, labels: jax.Array):
    """KL = Σ p (z_p - z_q) - lse(z_p) + lse(z_q), each a running sum over the vocabulary."""

    def teacher_logits(chunk: "_Chunk") -> jax.Array:
        if isinstance(teacher, LogProbs):
            return chunk.cut(teacher.log_probs).astype(chunk.logits.dtype)
        return jax.lax.stop_gradient(fns.head(params, teacher, *chunk.place))

    def visit(seen: _Full, chunk: _Chunk) -> _Full:
        logits = teacher_logits(chunk)
        fresh = chunk.fresh(logits)
        total = jnp.logaddexp(seen.teacher, jax.nn.logsumexp(fresh, axis=-1))
        gap = jnp.sum(jnp.exp(fresh - total[..., None]) * (logits - chunk.logits), axis=-1)
        return _Full(
            student=chunk.add(seen.student),
            teacher=total,
            gap=seen.gap * jnp.exp(seen.teacher - total) + gap,
            label=chunk.pick(labels[..., None], seen.label[..., None])[..., 0],
        )

    zero = jnp.zeros(labels.shape, _sum_dtype(post_norm))
    seen = _walk_vocabulary(fns, params, post_norm, _Full(zero + FLOOR, zero + FLOOR, zero, zero),
                            visit)  # fmt: skip
    return seen.gap - (seen.teacher - seen.student), seen.student - seen.label


class _Coarse(NamedTuple):
    """The student's log-sum-exp over the other columns [b, t], its logits of k tokens [b, t, k],
    and of the label [b, t]."""

    rest: jax.Array
    named: jax.Array
    label: jax.Array


def _coarse_terms(fns: ModelFns, teacher: TopK, params: Params, post_norm, labels: jax.Array):
    """KL of k + 1 outcomes; the student's mass of the others is summed, not what is left of 1."""

    def visit(seen: _Coarse, chunk: _Chunk) -> _Coarse:
        others = chunk.without(chunk.fresh(chunk.logits), teacher.ids)
        return _Coarse(
            rest=jnp.logaddexp(seen.rest, jax.nn.logsumexp(others, axis=-1)),
            named=chunk.pick(teacher.ids, seen.named),
            label=chunk.pick(labels[..., None], seen.label[..., None])[..., 0],
        )

    zero = jnp.zeros(labels.shape, _sum_dtype(post_norm))
    start = _Coarse(zero + FLOOR, jnp.zeros(teacher.ids.shape, zero.dtype), zero)
    seen = _walk_vocabulary(fns, params, post_norm, start, visit)
    total = jnp.logaddexp(seen.rest, jax.nn.logsumexp(seen.named, axis=-1))
    named = teacher.log_probs - (seen.named - total[..., None])
    mass = jnp.exp(teacher.rest)
    rest = jnp.where(mass > 0, teacher.rest - (seen.rest - total), 0.0)
    kl = jnp.sum(jnp.exp(teacher.log_probs) * named, axis=-1) + mass * rest
    return kl, total - seen.label


def find_log_probs(fns: ModelFns, params: Params, post_norm: jax.Array) -> LogProbs:
    """Returns what a head says of hidden states [b, t, d], float32 [b, t, vocab]."""
    return LogProbs(jax.nn.log_softmax(fns.head(params, post_norm)))


def find_top(fns: ModelFns, params: Params, post_norm: jax.Array, k: int) -> TopK:
    """Returns the k likeliest tokens after hidden states [b, t, d]; k at most the vocabulary."""

    def visit(seen: TopK, chunk: _Chunk) -> TopK:
        logits = jnp.concatenate([seen.log_probs, chunk.fresh(chunk.logits)], axis=-1)
        best, places = jax.lax.top_k(logits, k)
        before = jnp.take_along_axis(seen.ids, jnp.minimum(places, k - 1), axis=-1)
        ids = jnp.where(places < k, before, chunk.start + places - k)
        others = jnp.put_along_axis(logits, places, FLOOR, axis=-1, inplace=False)
        rest = jnp.logaddexp(seen.rest, jax.nn.logsumexp(others, axis=-1))
        return TopK(ids, best, rest)

    floor = jnp.full(post_norm.shape[:-1], FLOOR, _sum_dtype(post_norm))
    named = jnp.broadcast_to(floor[..., None], (*floor.shape, k))
    seen = TopK(jnp.zeros(named.shape, jnp.int32), named, floor)
    seen = _walk_vocabulary(fns, params, post_norm, seen, visit)
    total = jnp.logaddexp(seen.rest, jax.nn.logsumexp(seen.log_probs, axis=-1))
    return TopK(seen.ids, seen.log_probs - total[..., None], seen.rest - total)


def next_token_nll(
    fns: ModelFns, params: Params, post_norm: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Returns -log p(x[t+1] | x[..t]) in nats for t < T - 1, float32 [b, t - 1].

    The head is applied to `VOCAB_CHUNK` columns at a time, and again in the backward pass, so no
    [b, t, vocab] array is held for a wide vocabulary.
    """
    hidden, labels = post_norm[:, :-1], tokens[:, 1:]
    if _is_narrow(fns):
        logits = fns.head(params, hidden)
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - label

    def visit(seen: tuple, chunk: _Chunk) -> tuple:
        total, label = seen
        return chunk.add(total), chunk.pick(labels[..., None], label[..., None])[..., 0]

    zero = jnp.zeros(labels.shape, _sum_dtype(hidden))
    total, label = _walk_vocabulary(fns, params, hidden, (zero + FLOOR, zero), visit)
    return total - label


class _Chunk(NamedTuple):
    """The columns [start, start + width) of a head, of which those before `first` were seen.

    Attributes:
      logits: [b, t, width].
      size: how `ModelFns.head` is asked for so many columns; None is all of them.
    """

    logits: jax.Array
    start: Any
    first: Any
    size: int | None

    @property
    def place(self) -> tuple:
        return self.start, self.size

    @property
    def columns(self) -> jax.Array:
        return self.start + jnp.arange(self.logits.shape[-1], dtype=jnp.int32)

    def cut(self, array: jax.Array) -> jax.Array:
        """Returns these columns of [b, t, vocab]."""
        if self.size is None:
            return array
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.size, axis=-1)

    def fresh(self, logits: jax.Array) -> jax.Array:
        """Returns logits of these columns, nothing where they were seen before."""
        return logits if self.size is None else jnp.where(self.columns >= self.first, logits, FLOOR)

    def add(self, total: jax.Array) -> jax.Array:
        """Adds these columns to a log-sum-exp [b, t]."""
        return jnp.logaddexp(total, jax.nn.logsumexp(self.fresh(self.logits), axis=-1))

    def pick(self, ids: jax.Array, before: jax.Array) -> jax.Array:
        """Returns the logits of ids [b, t, k] where they are among the columns, else `before`."""
        width = self.logits.shape[-1]
        inside = (ids >= self.start) & (ids < self.start + width)
        place = jnp.clip(ids - self.start, 0, width - 1)
        return jnp.where(inside, jnp.take_along_axis(self.logits, place, axis=-1), before)

    def without(self, logits: jax.Array, ids: jax.Array) -> jax.Array:
        """Returns logits of these columns, nothing at ids [b, t, k]."""
        width, place = logits.shape[-1], ids - self.start
        beyond = jnp.where(place < 0, width, place)  # a negative place would count from the end
        return jnp.put_along_axis(logits, beyond, FLOOR, axis=-1, inplace=False, mode="drop")


def _walk_vocabulary(fns: ModelFns, params: Params, hidden, seen: Any, visit: Callable) -> Any:
    """Runs seen = visit(seen, chunk) over the head's columns, again in the backward pass.

    The last chunk begins early enough to be whole.
    """
    if _is_narrow(fns):
        return visit(seen, _Chunk(fns.head(params, hidden), 0, 0, None))
    vocab, width = fns.vocab_size, VOCAB_CHUNK

    @jax.checkpoint
    def step(seen, first):
        start = jnp.minimum(first, vocab - width)
        logits = fns.head(params, hidden, start, width)
        return visit(seen, _Chunk(logits, start, first, width)), None

    return jax.lax.scan(step, seen, jnp.arange(0, vocab, width, dtype=jnp.int32))[0]


def _is_narrow(fns: ModelFns) -> bool:
    return fns.vocab_size is None or fns.vocab_size <= VOCAB_CHUNK


def _sum_dtype(hidden: jax.Array) -> Any:
    return jnp.result_type(hidden, jnp.float32)
