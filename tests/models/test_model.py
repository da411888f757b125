"""A model carries its functions, in its own dtype, and compares as a value that cannot change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.models.decoder import forward, model_fns
from lqec_jax.models.model import Model
from tests.golden.tiny_checkpoint import RAW, write_checkpoint

TOKENS = np.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=2)
    return lqec.load(folder, dtype="float32")


def test_functions_are_the_decoders_and_made_once(model):
    assert model.fns is model.fns is model_fns(model.config, jnp.float32)
    assert model.fns.vocab_size == RAW["vocab_size"]
    logits = jax.jit(forward, static_argnums=0)(model.config, model.params, TOKENS)
    np.testing.assert_allclose(lqec.logits(model, TOKENS), logits, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_that_of_activations_and_logits_stay_float32(model, dtype):
    fns = dataclasses.replace(model, dtype=dtype).fns
    assert jax.eval_shape(fns.embed, model.params, TOKENS).dtype == dtype
    pre_norm, post_norm = jax.eval_shape(fns.hidden, model.params, TOKENS)
    assert pre_norm.dtype == post_norm.dtype == dtype
    assert jax.eval_shape(fns.head, model.params, post_norm).dtype == jnp.float32


def test_bfloat16_is_near_float32_but_not_it(model):
    whole = lqec.logits(model, TOKENS)
    half = lqec.logits(dataclasses.replace(model, dtype=jnp.bfloat16), TOKENS)
    error = float(jnp.abs(whole - half).max() / jnp.abs(whole).max())
    assert 1e-4 < error < 0.1


def test_a_model_cannot_be_changed_and_prints_no_weights(model):
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.params = {}
    assert "Array" not in repr(model) and "d_model=32" in repr(model)
    bare = Model(model.config, model.params, model.raw_config)
    assert (bare.recipe, bare.report, bare.fingerprint, bare.dtype) == ("", {}, "", jnp.float32)
