"""Kernel axes: every layout of Flax's own layers is read, what is not plain is not guessed."""

import re

import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.foreign.axes import (
    check_told,
    count_weights,
    order_axes,
    read_axes,
    split_shape,
)

NORM = {"layers/norm/scale": (3, 8), "embed/embedding": (48, 8)}


def read(path, shape, *, told=None, **others):
    return read_axes(path, {path: shape, **others.get("others", {})}, told or {})


@pytest.mark.parametrize(
    "path, shape, bias, axes",
    [
        ("mlp/kernel", (8, 16), (16,), "io"),
        ("q/kernel", (8, 2, 4), (2, 4), "ioo"),
        ("o/kernel", (2, 4, 8), (8,), "iio"),
        ("layers/mlp/kernel", (3, 8, 16), (3, 16), "lio"),
        ("layers/q/kernel", (3, 8, 2, 4), (3, 2, 4), "lioo"),
        ("layers/o/kernel", (3, 2, 4, 8), (3, 8), "liio"),
        ("groups/of/layers/o/kernel", (5, 3, 2, 4, 8), (5, 3, 8), "lliio"),
        ("conv/kernel", (5, 5, 8, 16), (16,), "iiio"),
    ],
)
def test_a_bias_tells(path, shape, bias, axes):
    assert read(path, shape, others={path.replace("kernel", "bias"): bias}) == axes


@pytest.mark.parametrize(
    "path, shape, axes",
    [
        ("any/thing", (8, 16), "io"),
        ("attn/query/kernel", (8, 2, 4), "ioo"),
        ("attn/value/kernel", (8, 2, 4), "ioo"),
        ("attn/out/kernel", (2, 4, 8), "iio"),
        ("layers/attn/key/kernel", (3, 8, 2, 4), "lioo"),
        ("layers/attn/out/kernel", (3, 2, 4, 8), "liio"),
        ("layers/query/kernel", (3, 8, 16), "lio"),  # a stack of Dense layers of that name
        ("layers/mlp/kernel", (3, 8, 16), "lio"),
        ("experts/kernel", (3, 8, 16), None),
        ("conv/kernel", (5, 5, 8, 16), None),
        ("layers/experts/kernel", (3, 4, 8, 16), None),
    ],
)
def test_names_and_the_norm_of_a_scanned_block_tell_without_a_bias(path, shape, axes):
    assert read(path, shape, others=NORM) == axes


def test_a_norm_outside_of_the_stack_tells_nothing():
    assert read("mlp/kernel", (3, 8, 16), others={"norm/scale": (8,)}) is None
    assert read("layers/mlp/kernel", (3, 8, 16), others={**NORM, "layers/odd": (2,)}) is None


def test_what_two_readings_fit_is_settled_by_the_name_or_not_at_all():
    bias = {"attn/query/bias": (4, 4), "attn/qkv/bias": (4, 4)}
    assert read("attn/query/kernel", (4, 4, 4), others=bias) == "ioo"
    assert read("attn/qkv/kernel", (4, 4, 4), others=bias) is None


def test_what_is_told_counts_more_and_the_first_match_most():
    told = {"a/*": "oi", "*": "io"}
    assert read("a/kernel", (8, 16), told=told) == "oi"
    assert read("b/kernel", (8, 16), told=told) == "io"
    with pytest.raises(InputError, match=r"names 2 axes, b/kernel has 3: \[8, 2, 4\]"):
        read("b/kernel", (8, 2, 4), told=told)


@pytest.mark.parametrize("axes", ["", "ii", "o", "il", "ilo", "ixo", 3, "io "])
def test_other_letters_are_refused(axes):
    with pytest.raises(InputError, match=re.escape(f"axes={{'*': {axes!r}}}")) as caught:
        check_told({"*": axes})
    assert "\n" not in str(caught.value)


def test_an_order_that_is_no_dict_is_refused():
    with pytest.raises(InputError, match="axes='io'; a dict was wanted"):
        check_told("io")
    assert check_told({"*": "llioi"}) == {"*": "llioi"}


def test_order_puts_inputs_first_and_sizes_follow():
    shape, axes = (7, 2, 3, 5), "loio"
    assert split_shape(shape, axes) == ((7,), (3,), (2, 5))
    assert count_weights(shape, axes) == (7, 3, 10)
    assert np.zeros(shape).transpose(order_axes(axes)).shape == (7, 3, 2, 5)
