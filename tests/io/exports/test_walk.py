"""The walk over a model: every parameter once, in order, under the checkpoint's name."""

from dataclasses import replace

import numpy as np
import pytest

from lqec_jax.core.tree import set_at
from lqec_jax.errors import InputError
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.walk import cast, to_stored, walk
from lqec_jax.models.families import family
from tests.io.packed_models import make_model


@pytest.fixture(scope="module")
def model():
    return make_model((2, 3), (2, 0))


def test_every_parameter_comes_once_with_its_blocks_number(model):
    paths = [placed.path for placed in walk(model)]
    block = family("llama").block_tensors(model.config)
    outer = list(family("llama").outer_tensors(model.config))
    assert paths == outer + [f"blocks/{layer}/{path}" for layer in (0, 1) for path in block]
    placed = next(p for p in walk(model) if p.path == "blocks/1/mlp/up/kernel")
    assert placed.stored.name == "model.layers.1.mlp.up_proj.weight"
    assert placed.module == "model.layers.1.mlp.up_proj"
    assert placed.value.base.bits == 3 and not placed.value.stack_shape


def test_a_packed_weight_is_stored_as_the_matrix_it_stands_for(model):
    placed = next(p for p in walk(model) if p.path == "blocks/0/attn/q/kernel")
    wanted = np.asarray(placed.value.dense()).T
    np.testing.assert_array_equal(to_stored(placed, None), wanted)
    half = to_stored(placed, np.dtype(np.float16))
    np.testing.assert_array_equal(half, wanted.astype(np.float16))


def test_a_cast_refuses_what_it_would_make_infinite():
    w = np.array([1.0, np.inf, 7e4, -7e4], np.float32)
    assert cast(w, None, "w") is w and cast(w, w.dtype, "w") is w
    with pytest.raises(InputError, match="w has 2 values beyond the range of float16"):
        cast(w, np.dtype(np.float16), "w")


def test_values_beyond_float16_are_named(model, tmp_path):
    params = set_at(model.params, "norm/scale", model.params["norm"]["scale"] * 1e6)
    with pytest.raises(InputError, match="norm/scale has 32 values beyond the range of float16"):
        export_model(replace(model, params=params), tmp_path / "out", "hf", dtype="float16")
    assert list(tmp_path.iterdir()) == []
