"""Causal attention that never holds the whole square of scores, forward or backward.

Queries are taken in chunks, and a chunk multiplies only the keys that lie before its end. What the
backward pass keeps is the output and one log-sum-exp a row; the probabilities are computed again
(Dao et al. 2022, arXiv 2205.14135; here a chunk sees all its keys at once, so there is no running
maximum to correct). The queries of one kv head are rows of one matrix: grouped heads cost no copy
of the keys.
"""

from collections.abc import Iterator
from functools import partial

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


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """Each position reads the values of the positions up to its own, weighted by softmax.

    out_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(head_dim)) v_j, query head h reading kv head
    h // (heads / kv_heads). Scores, softmax and sums are float32 whatever the dtype of the input.

    Args:
      q: [b, t, heads, head_dim], any float dtype.
      k: [b, t, kv_heads, head_dim], kv_heads a divisor of heads.
      v: [b, t, kv_heads, head_dim].
      chunk: query positions taken together; None is 64 on CPU and 512 elsewhere. It changes time
        and memory, and the result only by rounding.

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
    return _attend(q, k, v, min(chunk, q.shape[1]))


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise InputError(f"{shapes}: want q [b, t, heads, head_dim], k and v of one 4-d shape")
    b, t, heads, head_dim = q.shape
    if k.shape[:2] != (b, t) or k.shape[3] != head_dim or heads % k.shape[2]:
        raise InputError(f"{shapes}: want k [{b}, {t}, a divisor of {heads}, {head_dim}]")


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> jax.Array:
    return _forward(q, k, v, chunk)[0]


def _forward(q, k, v, chunk):
    t, kv_heads = k.shape[1:3]
    rows, keys, values = _to_rows(q, kv_heads, chunk), _by_head(k), _by_head(v)

    def attend_chunk(end, _, item):
        first, q_rows = item
        scores = _masked_scores(q_rows, keys[:, :, :end], first, chunk)  # [b, kv, r, end]
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _dot("bkrs,bksd->bkrd", weights.astype(v.dtype), values[:, :, :end]) / total
        return None, (out.astype(q.dtype), top + jnp.log(total))

    parts = []
    for some, end in _segments(rows.shape[0], chunk, t):
        firsts = jnp.arange(some.start, some.stop) * chunk
        parts.append(lax.scan(partial(attend_chunk, end), None, (firsts, rows[some]))[1])
    out, log_total = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return _from_rows(out, q.shape, chunk), (rows, keys, values, out, log_total)


def _backward(chunk, saved, d_out):
    rows, keys, values, out, log_total = saved
    t, kv_heads = d_out.shape[1], keys.shape[1]
    scale = keys.shape[-1] ** -0.5
    d_rows = _to_rows(d_out, kv_heads, chunk)
    shift = (d_rows.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

    def differentiate_chunk(end, sums, item):
        first, q_rows, d_out_rows, log_sum, moved = item
        scores = _masked_scores(q_rows, keys[:, :, :end], first, chunk)
        weights = jnp.exp(scores - log_sum)
        d_weights = _dot("bkrd,bksd->bkrs", d_out_rows, values[:, :, :end])
        d_scores = (weights * (d_weights - moved) * scale).astype(q_rows.dtype)
        d_q = _dot("bkrs,bksd->bkrd", d_scores, keys[:, :, :end])
        # [d, s], not [s, d]: the large operand is then read along its rows, 3 times faster on CPU.
        d_k = _dot("bkrd,bkrs->bkds", q_rows, d_scores)
        d_v = _dot("bkrd,bkrs->bkds", d_out_rows, weights.astype(q_rows.dtype))
        return (sums[0] + d_k, sums[1] + d_v), d_q.astype(q_rows.dtype)

    b, _, _, head_dim = keys.shape
    d_k = d_v = jnp.zeros((b, kv_heads, head_dim, t), jnp.float32)
    d_q = []
    for some, end in _segments(rows.shape[0], chunk, t):
        firsts = jnp.arange(some.start, some.stop) * chunk
        items = (firsts, rows[some], d_rows[some], log_total[some], shift[some])
        zeros = jnp.zeros((b, kv_heads, head_dim, end), jnp.float32)
        sums, d_q_rows = lax.scan(partial(differentiate_chunk, end), (zeros, zeros), items)
        d_k, d_v = d_k.at[..., :end].add(sums[0]), d_v.at[..., :end].add(sums[1])
        d_q.append(d_q_rows)
    d_k, d_v = (x.transpose(0, 3, 1, 2).astype(keys.dtype) for x in (d_k, d_v))  # [b, t, kv, d]
    return _from_rows(jnp.concatenate(d_q), d_out.shape, chunk), d_k, d_v


_attend.defvjp(_forward, _backward)


def _segments(chunks: int, chunk: int, t: int) -> Iterator[tuple[slice, int]]:
    """Runs of chunks that share one key length: (which chunks, the keys before the run's end)."""
    run = -(-chunks // KEY_LENGTHS)
    for start in range(0, chunks, run):
        stop = min(start + run, chunks)
        yield slice(start, stop), min(stop * chunk, t)


def _masked_scores(q_rows: jax.Array, keys: jax.Array, first: jax.Array, chunk: int) -> jax.Array:
    """q [b, kv, r, d], keys [b, kv, s, d] -> float32 [b, kv, r, s]; -inf where the key is later."""
    scores = _dot("bkrd,bksd->bkrs", q_rows, keys) * keys.shape[-1] ** -0.5
    position = first + jnp.arange(q_rows.shape[2]) % chunk
    return jnp.where(position[:, None] >= jnp.arange(keys.shape[2]), scores, -jnp.inf)


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
