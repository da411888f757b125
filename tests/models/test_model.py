"""A model carries its functions, in its own dtype, and compares as a value that cannot change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.models.decoder import forward, init_params, model_fns
from lqec_jax.models.model import Model
from tests.train.tiny import VOCAB, make_config

CONFIG = make_config(d=32, d_ff=64)
TOKENS = np.arange(24).reshape(2, 12) % VOCAB


@pytest.fixture(scope="module")
def params():
    return jax.jit(init_params, static_argnums=0)(CONFIG, jax.random.key(0))


def compute_logits(model):
    fns = model.fns
    return jax.jit(lambda params: fns.head(params, fns.hidden(params, TOKENS)[1]))(model.params)


def test_functions_are_the_decoders_and_made_once(params):
    model = Model(CONFIG, params, {})
    assert model.fns is model.fns is model_fns(CONFIG, jnp.float32)
    assert model.fns.vocab_size == VOCAB
    logits = jax.jit(forward, static_argnums=0)(CONFIG, params, TOKENS)
    np.testing.assert_allclose(compute_logits(model), logits, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_is_that_of_activations_and_logits_stay_float32(params, dtype):
    model = Model(CONFIG, params, {}, dtype=dtype)
    assert jax.eval_shape(model.fns.embed, params, TOKENS).dtype == dtype
    pre_norm, post_norm = jax.eval_shape(model.fns.hidden, params, TOKENS)
    assert pre_norm.dtype == post_norm.dtype == dtype
    assert jax.eval_shape(model.fns.head, params, post_norm).dtype == jnp.float32


def test_bfloat16_is_near_float32_but_not_it(params):
    models = [Model(CONFIG, params, {}, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    whole, half = map(compute_logits, models)
    error = float(jnp.abs(whole - half).max() / jnp.abs(whole).max())
    assert 1e-4 < error < 0.1


def test_a_model_cannot_be_changed_and_prints_no_weights(params):
    model = Model(CONFIG, params, {"model_type": "llama"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.params = {}
    assert "Array" not in repr(model) and "d_model=32" in repr(model)
    assert (model.recipe, model.report, model.fingerprint) == ("", {}, "")
