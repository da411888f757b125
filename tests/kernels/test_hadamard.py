"""Hadamard matrices: that they are, for all widths of the field's models, and fast products."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.hadamard import build, factor, largest_order, multiply

# d_model and d_ff of Llama 1-3, Qwen 2-3, Mistral, Gemma 2-3, OPT, TinyLlama and small ones.
WIDTHS = (64, 96, 128, 192, 224, 336, 352, 768, 896, 1152, 1536, 2048, 2304, 2560, 2816, 3072,
          3584, 4096, 4864, 5120, 5376, 5632, 6912, 8192, 8960, 9216, 9728, 10240, 11008, 12288,
          13824, 14336, 15360, 17920, 18944, 21504, 22016, 24576, 25600, 27648, 28672, 29568,
          36864, 53248)  # fmt: skip


def assert_hadamard(matrix: np.ndarray) -> None:
    assert set(np.unique(matrix)) <= {-1, 1}
    wide = matrix.astype(np.float64)
    np.testing.assert_array_equal(wide @ wide.T, len(matrix) * np.eye(len(matrix)))


@pytest.mark.parametrize(
    ("order", "kind"),
    [(2, "Sylvester"), (12, "Paley I"), (28, "Paley I over 27"), (344, "Paley I over 343"),
     (36, "12 x 3 is no product: Paley II over 17"), (52, "Paley II over 25"),
     (100, "Paley II over 49"), (148, "Paley II over 73"), (164, "Paley II over 81"),
     (336, "a product"), (352, "a product")],
)  # fmt: skip
def test_every_construction_is_orthogonal(order, kind):
    assert_hadamard(build(order))


def test_every_small_multiple_of_four_is_built_and_nothing_else():
    built = [order for order in range(1, 92) if factor(order) is not None]
    assert built == [1, 2, *range(4, 92, 4)]
    for order in built:
        assert_hadamard(build(order))
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92 is built here"):
        build(92)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_the_fields_models_is_rotated_whole(width):
    assert int(np.prod(factor(width))) == width
    # Cost is a small factor: at most that of a matrix of 344, for 43 · 2^k.
    assert sum(factor(width)) <= 344 + 2 * 8
    assert largest_order(width) == width


def test_other_widths_have_a_largest_block():
    assert [largest_order(size) for size in (50, 105, 172, 92 * 2)] == [2, 1, 4, 8]
    assert [largest_order(size, 512) for size in (11008, 4096, 352)] == [344, 512, 352]


# Artifacts name an order, not a matrix: another matrix would read them wrongly.
@pytest.mark.parametrize(
    ("order", "crc"),
    [(64, 914919037), (352, 486791437), (344, 376848176), (336, 1957727729), (100, 595205037)],
)
def test_matrices_stay_what_they_are(order, crc):
    assert zlib.crc32(build(order).tobytes()) == crc


@pytest.mark.parametrize("order", [1, 8, 44, 352])
def test_a_product_is_that_with_the_matrix(order):
    x = np.random.RandomState(0).standard_normal((3, 2 * order)).astype(np.float32)
    h = build(order) / np.sqrt(order)
    run = jax.jit(multiply, static_argnames=("order", "transpose"))
    for matrix, transpose in ((h, False), (h.T, True)):
        wanted = (x.reshape(3, 2, order) @ matrix).reshape(x.shape)
        np.testing.assert_allclose(run(x, order, transpose=transpose), wanted, atol=2e-6)
    np.testing.assert_allclose(run(run(x, order), order, transpose=True), x, atol=2e-6)
    assert run(jnp.asarray(x, jnp.bfloat16), order).dtype == jnp.bfloat16
