"""The box: what it reads as, what slices of it read as, and how it is written and read again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.core import meta

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.foreign.axes import count_weights
from lqec_jax.foreign.kernel import PackedKernel, box, to_matrix
from lqec_kernels.formats import CompressedLinear, Dense
from tests.foreign.models import RECIPE

LAYOUTS = [
    ((6, 10), "io"),
    ((10, 6), "oi"),
    ((6, 2, 5), "ioo"),
    ((2, 3, 10), "iio"),
    ((5, 6, 2), "oio"),
    ((2, 5, 3), "ioi"),
    ((4, 6, 10), "lio"),
    ((2, 4, 3, 6, 2), "lliio"),
]


def draw(shape, dtype="float32"):
    return np.random.RandomState(0).standard_normal(shape).astype(dtype)


def box_dense(w, axes) -> PackedKernel:
    """Boxes a kernel without compressing it."""
    stack = axes.count("l")
    leaves = [
        CompressedLinear(Dense(to_matrix(w[index], axes[stack:])))
        for index in np.ndindex(*w.shape[:stack])
    ]
    return box(leaves, w, axes)


@pytest.mark.parametrize("shape, axes", LAYOUTS)
def test_a_box_reads_as_what_was_put_in(shape, axes):
    w = draw(shape)
    kernel = box_dense(w, axes)
    assert np.array_equal(kernel.unbox(), w)
    layers, d_in, d_out = count_weights(shape, axes)
    assert (kernel.leaf.d_in, kernel.leaf.d_out) == (d_in, d_out)
    assert jax.tree.leaves(kernel)[0].size == layers * d_in * d_out


def test_the_matrix_is_the_one_the_layer_multiplies_by():
    w, x = draw((2, 3, 10)), draw((7, 2, 3))
    y = np.einsum("bhd,hdo->bo", x, w)
    assert np.allclose(x.reshape(7, 6) @ to_matrix(w, "iio"), y, atol=1e-5)
    assert np.array_equal(to_matrix(draw((10, 6)), "oi"), draw((10, 6)).T)


def test_it_reads_in_the_dtype_it_replaced():
    kernel = box_dense(jnp.asarray(draw((6, 10)), jnp.bfloat16), "io")
    assert kernel.unbox().dtype == jnp.bfloat16
    assert kernel.leaf.dense().dtype == jnp.float32


def test_a_slice_of_a_stack_is_a_layer():
    w = draw((4, 2, 3, 10))
    kernel = box_dense(w, "liio")
    layer = jax.tree.map(lambda array: array[2], kernel)
    assert np.array_equal(layer.unbox(), w[2])
    _, seen = jax.lax.scan(lambda carry, one: (carry, one.unbox()), 0, kernel)
    assert np.array_equal(seen, w)
    # What nn.scan does to boxes on its way.
    assert meta.add_axis({"w": meta.remove_axis(kernel, 0, {})}, 0, {})["w"] is kernel


def test_flax_opens_it():
    w = draw((6, 2, 5))
    kernel = box_dense(w, "ioo")
    opened = meta.unbox({"w": kernel, "b": 1})
    assert np.array_equal(opened["w"], w) and opened["b"] == 1
    assert meta.replace_boxed(kernel, 2.0) == 2.0


def test_it_prints_without_its_arrays():
    kernel = box_dense(draw((6, 2, 5)), "ioo")
    said = "PackedKernel(shape=(6, 2, 5), axes='ioo', dtype=float32)"
    assert repr(kernel) == repr(jax.tree.map(lambda a: None, kernel)) == said


def test_it_is_written_and_read_by_flax_serialization():
    w = draw((2, 32, 32))
    leaves = [lqec.quantize(one, RECIPE) for one in w]
    tree = {"layers": {"kernel": box(leaves, w, "lio"), "bias": jnp.ones((2, 32))}}
    data = serialization.to_bytes(tree)
    assert w.nbytes / 4 < len(data) < w.nbytes / 2
    again = serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), data)
    kernel = again["layers"]["kernel"]
    assert isinstance(kernel, PackedKernel)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), tree, again)
    assert jax.tree.all(same)
    assert np.array_equal(kernel.unbox(), tree["layers"]["kernel"].unbox())
    other = {"layers": {**tree["layers"], "kernel": box_dense(w, "lio")}}
    with pytest.raises(InputError, match="the same recipe") as caught:
        serialization.from_bytes(other, data)
    assert "\n" not in str(caught.value)
