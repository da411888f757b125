"""One product for every format: what it adds, and what it refuses."""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_kernels
from lqec_kernels import api, repack_for_kernels, use
from lqec_kernels.api import packed_matmul
from lqec_kernels.formats import Affine, Dense, LowRank


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def base() -> Affine:
    words = np.random.RandomState(0).randint(0, 2**32, (6, 7), dtype=np.uint32)
    return Affine(words, 1 + np.abs(draw(3, 7)), None, 3, 16, d_in=48)


@pytest.mark.parametrize("implementation", ["auto", "xla"])
def test_adds_every_correction(base, implementation):
    x = draw(2, 5, 48)
    corrections = [LowRank(draw(48, r, seed=r), draw(r, 7, seed=9)) for r in (1, 4)]
    multiply = jax.jit(partial(packed_matmul, implementation=implementation))
    y = multiply(x, base, corrections=corrections)
    dense = np.asarray(base.dense()) + sum(c.a @ c.b for c in corrections)
    assert y.shape == (2, 5, 7)
    np.testing.assert_allclose(y, x @ dense, atol=1e-3)
    narrow = jax.eval_shape(multiply, x.astype(jnp.bfloat16), base, corrections=corrections)
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_pooled_correction_is_added_beside_one_that_is_not(base, tokens):
    x, g = draw(tokens, 48), draw(tokens, 7, seed=3)
    pooled, plain = LowRank(draw(3, 2), draw(2, 7, seed=9), 16), LowRank(draw(48, 1), draw(1, 7))

    @jax.jit
    def run(x, corrections):
        def answer(x, corrections):
            return jnp.sum(g * packed_matmul(x, base, corrections=corrections))

        y = packed_matmul(x, base, corrections=corrections)
        return y, jax.grad(answer, argnums=(0, 1))(x, corrections)

    y, (dx, (d_pooled, d_plain)) = run(x, (pooled, plain))
    expanded = np.repeat(pooled.a, 16, axis=0) / 16
    dense = np.asarray(base.dense()) + expanded @ pooled.b + plain.a @ plain.b
    np.testing.assert_allclose(y, x @ dense, atol=1e-3)
    np.testing.assert_allclose(dx, g @ dense.T, atol=1e-3)
    d_expanded = x.T @ g @ pooled.b.T
    np.testing.assert_allclose(d_pooled.a, d_expanded.reshape(3, 16, 2).mean(1), atol=1e-3)
    np.testing.assert_allclose(d_pooled.b, expanded.T @ x.T @ g, atol=1e-3)
    np.testing.assert_allclose(d_plain.a, x.T @ g @ plain.b.T, atol=1e-3)
    np.testing.assert_allclose(d_plain.b, plain.a.T @ x.T @ g, atol=1e-3)


def test_refuses_an_unknown_implementation(base):
    with pytest.raises(ValueError, match=r"implementation='cuda' is not one of auto, xla"):
        packed_matmul(draw(1, 48), base, implementation="cuda")


def test_refuses_another_width_and_says_both_shapes(base):
    with pytest.raises(ValueError, match=r"x has width 47, the weight \[48, 7\]"):
        packed_matmul(draw(1, 47), base)


def test_asked_for_by_name_what_cannot_says_why(base):
    # 48 inputs and groups of 16: kernels could, but not here.
    with pytest.raises(NotImplementedError, match="triton: it needs an NVIDIA GPU"):
        packed_matmul(draw(1, 48), base, implementation="triton")
    with pytest.raises(NotImplementedError, match="pallas: it reads no Dense"):
        packed_matmul(draw(1, 4), Dense(draw(4, 4)), implementation="pallas")


@pytest.fixture
def chosen(monkeypatch):
    """Puts a kernel that says it was called in the place of Triton's, on a seeming GPU."""
    calls = []

    def multiply(x, base, low_rank, layer=None):
        calls.append(type(base).__name__)
        if base.bits == 2:
            raise NotImplementedError("two bits are too few")
        y = x @ base.dense()
        return y if low_rank is None else y + (x @ low_rank[0]) @ low_rank[1]

    monkeypatch.setattr("lqec_kernels.api._find_kernel", lambda name: multiply)
    monkeypatch.setattr("lqec_kernels.capability._why_not_here", lambda *arguments: "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    api._say_once.cache_clear()
    return calls


def test_auto_takes_the_first_that_can_and_says_once_which(base, chosen, caplog):
    x, adapters = draw(2, 48), [LowRank(draw(48, 2), draw(2, 7)), LowRank(draw(48, 1), draw(1, 7))]
    with caplog.at_level(logging.INFO, logger="lqec_kernels.api"):
        for _ in range(2):
            y = packed_matmul(x, repack_for_kernels(base), corrections=adapters)
        packed_matmul(x, base)
        two = Affine(base.codes[:4], base.scales, None, 2, 16, 48)
        packed_matmul(x, repack_for_kernels(two))
    dense = np.asarray(base.dense()) + sum(c.a @ c.b for c in adapters)
    np.testing.assert_allclose(y, x @ dense, atol=1e-3)
    assert chosen == ["Planes"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "packed_matmul takes triton for Planes",
        "packed_matmul takes xla for Affine; not triton: the weight is not in its layout; call "
        "lqec_kernels.repack once",
        "packed_matmul takes xla for Planes; not triton: two bits are too few",
    ]


def test_by_name_a_weight_is_repacked_and_gradients_are_of_what_was_stored(base, chosen):
    x = draw(2, 48)
    run = partial(packed_matmul, implementation="triton")
    gradient = jax.grad(lambda base: jnp.sum(run(x, base)), allow_int=True)(base)
    assert chosen == ["Planes"] and isinstance(gradient, Affine)
    assert gradient.codes.dtype == jax.dtypes.float0
    wanted = jax.grad(lambda s: jnp.sum(x @ Affine(base.codes, s, None, 3, 16, 48).dense()))
    np.testing.assert_allclose(gradient.scales, wanted(base.scales), rtol=1e-4, atol=1e-4)


def test_a_choice_holds_inside_its_with_and_jit_knows(base, chosen):
    x, run = draw(2, 48), jax.jit(packed_matmul)
    assert run(x, base).shape == (2, 7) and not chosen
    for _ in range(2):
        with use("triton"):
            run(x, base)
        assert len(chosen) == 1
    run(x, base)
    assert len(chosen) == 1
    with use("triton"), pytest.raises(NotImplementedError, match="reads no Dense"):
        packed_matmul(x[:, :4], Dense(draw(4, 4)))
    with use("triton", "xla"):
        assert packed_matmul(x[:, :4], Dense(draw(4, 4))).shape == (2, 4)
    with pytest.raises(ValueError, match="'tritn' is not one of auto, xla, pallas"):
        use("xla", "tritn")


def test_the_package_offers_the_operators_and_the_product():
    for name in lqec_kernels.__all__:
        assert getattr(lqec_kernels, name).__module__.startswith("lqec_kernels.")
