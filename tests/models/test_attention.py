from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.models import attention as module
from lqec_jax.models.attention import PLAIN, Scoring, attend_to_past, causal_attention
from lqec_jax.models.cache import arrange
from tests.compiling import options_for_memory

HEADS = {"one kv head each": (4, 4), "grouped": (6, 2), "one kv head for all": (3, 1)}


def draw(t, heads=4, kv_heads=2, *, b=2, head_dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)  # jax.random compiles each shape: seconds, all told
    shapes = [(b, t, heads, head_dim), *[(b, t, kv_heads, head_dim)] * 2, (b, t, heads, head_dim)]
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]  # q, k, v, d_out


def reference(q, k, v):
    """float64, one query at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, heads, head_dim = q.shape
    out = np.zeros_like(q)
    for row, i, h in np.ndindex(b, t, heads):
        kv = h // (heads // k.shape[2])
        scores = k[row, : i + 1, kv] @ q[row, i, h] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[row, i, h] = weights @ v[row, : i + 1, kv] / weights.sum()
    return out


def full_square(q, k, v, window=None, scale=None, softcap=None):
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))
    if window is not None:
        seen &= jnp.triu(seen, 1 - window)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


@partial(jax.jit, static_argnums=0)
def both_ways(attend, q, k, v, d_out):
    """The output, then the three gradients."""
    out, pull_back = jax.vjp(attend, q, k, v)
    return out, *pull_back(d_out)


@lru_cache
def chunked(chunk):
    return partial(causal_attention, chunk=chunk)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_equals_float64_reference_and_gradients_of_the_full_square(heads):
    check_both_ways(37, 16, heads)


# 37 / 2 needs 19 chunks, so several share one key length; 32 / 8 leaves nothing to fill up.
@pytest.mark.parametrize("t, chunk", [(37, 2), (32, 8), (37, 37), (5, 64), (5, None), (1, 1)])
def test_any_length_and_chunk(t, chunk):
    check_both_ways(t, chunk, (4, 2))


def check_both_ways(t, chunk, heads):
    arrays = draw(t, *heads)
    out, *grads = both_ways(chunked(chunk), *arrays)
    np.testing.assert_allclose(out, reference(*arrays[:3]), atol=2e-6, rtol=1e-5)
    for x, y in zip(grads, both_ways(full_square, *arrays)[1:], strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


# 4 positions a chunk: runs of chunks skip keys. 16: the rows that fill 37 up to 48 see no key.
@pytest.mark.parametrize(
    ("chunk", "window", "scoring"),
    [
        (4, 5, PLAIN),
        (16, np.int32(3), Scoring(scale=0.5, softcap=1.5)),
        (16, 1, Scoring(softcap=0.7)),
    ],
)
def test_windows_and_softcaps_both_ways(chunk, window, scoring):
    def attend(q, k, v):
        return causal_attention(q, k, v, chunk=chunk, window=window, scoring=scoring)

    square = partial(full_square, window=int(window), scale=scoring.scale, softcap=scoring.softcap)
    arrays = draw(37)
    got, want = (jax.jit(partial(both_ways.__wrapped__, f))(*arrays) for f in (attend, square))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_keys_before_every_window_are_skipped():
    def keys(window):
        rule = module._Rule(8, window, PLAIN)
        return [(s.start, s.stop) for _, s in module._segments(16, 128, rule)]

    assert keys(None) == [(0, 32), (0, 64), (0, 96), (0, 128)]
    assert keys(1) == [(0, 32), (32, 64), (64, 96), (96, 128)]
    assert keys(40) == [(0, 32), (0, 64), (25, 96), (57, 128)]


@pytest.mark.parametrize("window", [None, 5])
def test_a_past_is_read_as_the_whole(window):
    q, k, v, _ = draw(12)
    options = {"window": window, "scoring": Scoring(softcap=1.5)}
    whole = jax.jit(partial(full_square, window=window, softcap=1.5))(q, k, v)
    room = ((0, 0), (0, 4), (0, 0), (0, 0))
    keys, values = arrange(*(np.pad(x, room, constant_values=9.0) for x in (k, v)))
    last = jax.jit(partial(attend_to_past, **options))(q[:, 9:], keys, values, 9)
    np.testing.assert_allclose(last, whole[:, 9:], atol=2e-6, rtol=1e-5)


def test_one_token_reads_its_own_value():
    q, k, v, _ = draw(1, heads=4, kv_heads=2)
    np.testing.assert_allclose(causal_attention(q, k, v), jnp.repeat(v, 2, axis=2), rtol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_half_precision_keeps_dtype_and_float32_softmax(dtype, tolerance):
    arrays = draw(37, dtype=dtype)
    exact = both_ways(full_square, *(x.astype(jnp.float32) for x in arrays))
    for x, y in zip(both_ways(chunked(16), *arrays), exact, strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=4 * tolerance)
    out = both_ways(chunked(16), *arrays)[0].astype(jnp.float32)
    np.testing.assert_allclose(out, exact[0], atol=tolerance)


def test_scores_too_large_for_exp_stay_finite():
    q, k, v, d_out = draw(37)
    big = 60 * q, 60 * k, v, d_out
    out, *grads = both_ways(chunked(16), *big)
    np.testing.assert_allclose(out, both_ways(full_square, *big)[0], atol=1e-4)
    assert all(jnp.isfinite(x).all() for x in grads)


@pytest.mark.parametrize("j", [0, 15, 16, 17, 36])
def test_a_token_never_reaches_back(j):
    def run(*arrays):
        return [np.asarray(x) for x in both_ways(chunked(16), *arrays)]

    q, k, v, d_out = (np.array(x) for x in draw(37))
    d_out[:, j:] = 0
    before, _, d_k, d_v = run(q, k, v, d_out)
    assert not d_k[:, j:].any() and not d_v[:, j:].any()

    for x in (q, k, v):
        x[:, j] += 3.0
    after = run(q, k, v, d_out)[0]
    np.testing.assert_array_equal(before[:, :j], after[:, :j])
    assert (np.abs(before - after)[:, j:].max((0, 2, 3)) > 1e-4).all()


def test_under_scan_and_remat():
    q, k, v, d_out = draw(20, heads=4, kv_heads=4)

    def three_times(attend, wrap):
        def loss(k):
            step = wrap(lambda x, _: (x + attend(x, k, v), None))
            return (jax.lax.scan(step, q, length=3)[0] * d_out).sum()

        return jax.jit(jax.grad(loss))(k)

    got, want = three_times(chunked(8), jax.checkpoint), three_times(full_square, lambda f: f)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


def test_under_vmap():
    stacks = [jnp.stack([x, x[::-1] + 1]) for x in draw(20)]
    got, want = (
        jax.vmap(partial(both_ways, attend))(*stacks) for attend in (chunked(8), full_square)
    )
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def test_memory_grows_with_t_not_with_its_square():
    def temporaries(attend, t):
        arrays = draw(t, heads=2, kv_heads=1, b=1)
        lowered = both_ways.lower(attend, *arrays)
        compiled = lowered.compile(compiler_options=options_for_memory())
        return compiled.memory_analysis().temp_size_in_bytes

    t, square = 2048, 2 * 2048**2 * 4
    assert temporaries(full_square, t) > square
    assert temporaries(chunked(64), t) < square / 4


@pytest.mark.parametrize(
    "shapes, chunk, message",
    [
        (((2, 5, 4, 8), (2, 5, 3, 8), (2, 5, 3, 8)), None, "a divisor of 4"),
        (((2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)), None, "want k"),
        (((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 4)), None, "one 4-d shape"),
        (((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8)), 0, "chunk is 0"),
    ],
)
def test_wrong_shapes_are_named(shapes, chunk, message):
    with pytest.raises(InputError, match=message):
        causal_attention(*(jnp.ones(s) for s in shapes), chunk=chunk)
