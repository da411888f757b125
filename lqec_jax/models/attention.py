"""Causal attention that never holds the whole square of scores, forward or backward.

Queries are taken in chunks, and a chunk multiplies only the keys that lie before its end. What the
backward pass keeps is the output and one log-sum-exp a row; the probabilities are computed again
(Dao et al. 2022, arXiv 2205.14135; here a chunk sees all its keys at once, so there is no running
maximum to correct). The queries of one kv head are rows of one matrix: grouped heads cost no copy
of the keys.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lqec_jax.errors import InputError

# A chunk's scores should stay in a core's cache on CPU (64 rows of 16 heads and 256 keys are 1 MB;
# larger arrays go through fresh pages of memory at each step, which doubled the time of an update);
# accelerators want large matrices.
CPU_CHUNK, CHUNK = 64, 512
# Each key length is compiled by itself. Four of them do 5/8 of the square, the triangle is 1/2.
KEY_LENGTHS = 4


class Scoring(NamedTuple):
    """How a query and a key become a score, static: c tanh(q . k scale / c), c the softcap.

    scale None is 1 / sqrt(head_dim); softcap None leaves the product as it is (arXiv:2408.00118).
    """

    scale: float | None = None
    softcap: float | None = None


PLAIN = Scoring()


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    chunk: int | None = None,
    window: int | jax.Array | None = None,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Each position reads the values of the positions up to its own, weighted by softmax.

    out_i = sum_{i - window < j <= i} softmax_j(score(q_i, k_j)) v_j, query head h reading kv head
    h // (heads / kv_heads). Scores, softmax and sums are float32 whatever the dtype of the input.

    Args:
      q: [b, t, heads, head_dim], any float dtype.
      k: [b, t, kv_heads, head_dim], kv_heads a divisor of heads.
      v: [b, t, kv_heads, head_dim].
      chunk: query positions taken together; None is 64 on CPU and 512 elsewhere. It changes time
        and memory, and the result only by rounding.
      window: how many positions a query reads, its own included; None is all of them. Keys before
        every window of a run of chunks are skipped for an int, and masked for an int32 scalar,
        which lets layers of one scan differ.
      scoring: scale and softcap of the scores.

    Returns:
      [b, t, heads, head_dim] in q's dtype.

    Raises:
      InputError: the shapes do not belong together, or chunk is not positive.

    Cost: b * heads * chunk * t floats at a time. Reverse mode only: `jax.jvp` is not defined.

    Example:
      >>> q, k = jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 2, 8))
      >>> causal_attention(q, k, k).shape
      (1, 5, 4, 8)
    """
    _check_shapes(q, k, v)
    if chunk is None:
        chunk = CPU_CHUNK if jax.default_backend() == "cpu" else CHUNK
    if chunk < 1:
        raise InputError(f"chunk is {chunk}; want at least one query position")
    static = window if isinstance(window, int) else None
    rule = _Rule(min(chunk, q.shape[1]), static, _resolve(scoring, q.shape[3]))
    return _attend(q, k, v, None if static is not None else window, rule)


def attend_to_past(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
    *,
    window: int | jax.Array | None = None,
    scoring: Scoring = PLAIN,
) -> jax.Array:
    """Continues `causal_attention`: queries that begin at `position` read keys from 0 on.

    Args:
      q: [b, t, heads, head_dim], any float dtype; t is small, their scores are held at once.
      keys: [b, kv_heads, length, head_dim]; those after a query's own are not read.
      values: [b, kv_heads, head_dim, length].
      position: int scalar, where the first query stands.
      window, scoring: as `causal_attention`.

    Returns:
      [b, t, heads, head_dim] in q's dtype.
    """
    b, t, heads, head_dim = q.shape
    grouped = q.reshape(b, t, keys.shape[1], -1, head_dim)  # [b, t, kv, g, d]
    product = _dot("btkgd,bksd->bkgts", grouped, keys)
    scores = _score(product, _resolve(scoring, head_dim))
    scores = _mask(scores, position + jnp.arange(t), slice(0, keys.shape[2]), window)
    weights = jax.nn.softmax(scores, axis=-1)
    out = _dot("bkgts,bkds->btkgd", weights.astype(values.dtype), values)
    return out.reshape(q.shape).astype(q.dtype)


class _Rule(NamedTuple):
    """What `_attend` is compiled for; the window is here where it is static."""

    chunk: int
    window: int | None
    scoring: Scoring


def _resolve(scoring: Scoring, head_dim: int) -> Scoring:
    return scoring if scoring.scale is not None else scoring._replace(scale=head_dim**-0.5)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise InputError(f"{shapes}: want q [b, t, heads, head_dim], k and v of one 4-d shape")
    b, t, heads, head_dim = q.shape
    if k.shape[:2] != (b, t) or k.shape[3] != head_dim or heads % k.shape[2]:
        raise InputError(f"{shapes}: want k [{b}, {t}, a divisor of {heads}, {head_dim}]")


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | None, rule: _Rule):
    return _forward(q, k, v, window, rule)[0]


def _forward(q, k, v, window, rule):
    t, kv_heads = k.shape[1:3]
    rows, keys, values = _to_rows(q, kv_heads, rule.chunk), _by_head(k), _by_head(v)

    def attend_chunk(seen, _, item):
        first, q_rows = item
        scores = _scores(q_rows, keys[:, :, seen], rule)  # [b, kv, r, seen]
        scores = _mask_chunk(scores, first, seen, window, rule)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _dot("bkrs,bksd->bkrd", weights.astype(v.dtype), values[:, :, seen]) / total
        return None, (out.astype(q.dtype), top + jnp.log(total))

    parts = []
    for some, seen in _segments(rows.shape[0], t, rule):
        firsts = jnp.arange(some.start, some.stop) * rule.chunk
        parts.append(lax.scan(partial(attend_chunk, seen), None, (firsts, rows[some]))[1])
    out, log_total = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return _from_rows(out, q.shape, rule.chunk), (rows, keys, values, window, out, log_total)


def _backward(rule, saved, d_out):
    rows, keys, values, window, out, log_total = saved
    t, kv_heads = d_out.shape[1], keys.shape[1]
    d_rows = _to_rows(d_out, kv_heads, rule.chunk)
    shift = (d_rows.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def differentiate_chunk(seen, sums, item):
        first, q_rows, d_out_rows, log_sum, moved = item
        scores = _scores(q_rows, keys[:, :, seen], rule)
        weights = jnp.exp(_mask_chunk(scores, first, seen, window, rule) - log_sum)
        d_weights = _dot("bkrd,bksd->bkrs", d_out_rows, values[:, :, seen])
        d_scores = weights * (d_weights - moved) * rule.scoring.scale
        if rule.scoring.softcap is not None:
            d_scores = d_scores * (1 - jnp.square(scores / rule.scoring.softcap))
        d_scores = d_scores.astype(q_rows.dtype)
        d_q = _dot("bkrs,bksd->bkrd", d_scores, keys[:, :, seen])
        # [d, s], not [s, d]: the large operand is then read along its rows, 3 times faster on CPU.
        d_k = _dot("bkrd,bkrs->bkds", q_rows, d_scores)
        d_v = _dot("bkrd,bkrs->bkds", d_out_rows, weights.astype(q_rows.dtype))
        return (sums[0] + d_k, sums[1] + d_v), d_q.astype(q_rows.dtype)

    b, _, _, head_dim = keys.shape
    d_k = d_v = jnp.zeros((b, kv_heads, head_dim, t), jnp.float32)
    d_q = []
    for some, seen in _segments(rows.shape[0], t, rule):
        firsts = jnp.arange(some.start, some.stop) * rule.chunk
        items = (firsts, rows[some], d_rows[some], log_total[some], shift[some])
        zeros = jnp.zeros((b, kv_heads, head_dim, seen.stop - seen.start), jnp.float32)
        sums, d_q_rows = lax.scan(partial(differentiate_chunk, seen), (zeros, zeros), items)
        d_k, d_v = d_k.at[..., seen].add(sums[0]), d_v.at[..., seen].add(sums[1])
        d_q.append(d_q_rows)
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(keys.dtype) for x in (d_k, d_v))  # [b, t, kv, d]
    return _from_rows(jnp.concatenate(d_q), d_out.shape, rule.chunk), d_k, d_v, None


_attend.defvjp(_forward, _backward)


def _segments(chunks: int, t: int, rule: _Rule) -> Iterator[tuple[slice, slice]]:
    """Runs of chunks that share their keys: (which chunks, the keys that any of them reads)."""
    run = -(-chunks // KEY_LENGTHS)
    for start in range(0, chunks, run):
        stop = min(start + run, chunks)
        first = 0 if rule.window is None else max(0, start * rule.chunk - rule.window + 1)
        yield slice(start, stop), slice(first, min(stop * rule.chunk, t))


def _scores(q_rows: jax.Array, keys: jax.Array, rule: _Rule) -> jax.Array:
    """q [b, kv, r, d], keys [b, kv, s, d] -> float32 [b, kv, r, s]."""
    return _score(_dot("bkrd,bksd->bkrs", q_rows, keys), rule.scoring)


def _score(product: jax.Array, scoring: Scoring) -> jax.Array:
    scores = product * scoring.scale
    if scoring.softcap is None:
        return scores
    return scoring.softcap * jnp.tanh(scores / scoring.softcap)


def _mask_chunk(scores: jax.Array, first: jax.Array, seen: slice, window, rule: _Rule) -> jax.Array:
    """Masks the scores [b, kv, r, s] of the chunk that begins at `first`, for the keys `seen`."""
    position = first + jnp.arange(scores.shape[2]) % rule.chunk
    if rule.window is not None:
        window = rule.window
    if window is not None:
        # A row that fills the last chunk up must see a key: its sum would be 0, its gradient nan.
        position = jnp.minimum(position, seen.stop - 1)
    return _mask(scores, position, seen, window)


def _mask(scores: jax.Array, position: jax.Array, keys: slice, window) -> jax.Array:
    """Returns scores [..., r, s], -inf where a key is later, or earlier than the window."""
    query, key = position[:, None], jnp.arange(keys.start, keys.stop)
    seen = query >= key
    if window is not None:
        seen &= query - key < window
    return jnp.where(seen, scores, -jnp.inf)


def _dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _by_head(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)  # [b, kv, t, d]


def _to_rows(x: jax.Array, kv_heads: int, chunk: int) -> jax.Array:
    """[b, t, heads, d] -> [chunks, b, kv, group * chunk, d]; t is filled up with zeros."""
    b, t, heads, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % chunk), (0, 0), (0, 0)))
    x = x.reshape(b, -1, chunk, kv_heads, heads // kv_heads, d)  # [b, n, c, kv, g, d]
    x = x.transpose(1, 0, 3, 4, 2, 5)  # [n, b, kv, g, c, d]
    return x.reshape(*x.shape[:3], -1, d)


def _from_rows(x: jax.Array, shape: tuple[int, ...], chunk: int) -> jax.Array:
    """[chunks, b, kv, group * chunk, d] -> `shape`, [b, t, heads, d]."""
    b, t, heads, d = shape
    x = x.reshape(x.shape[0], b, x.shape[2], -1, chunk, d)  # [n, b, kv, g, c, d]
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, heads, d)[:, :t]
