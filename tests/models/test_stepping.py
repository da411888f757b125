"""A prompt and then one token at a time gives the logits of the whole sequence at once."""

import json
from pathlib import Path

import jax
import numpy as np

from lqec_jax.models.cache import Cache
from lqec_jax.models.decoder import init_params, model_fns
from lqec_jax.models.families import read_config
from lqec_jax.models.stepping import step_fns
from tests.compiling import options_for_memory
from tests.golden.tiny_weights import make_weights
from tests.models.test_llama_logits import SEED, build_params, golden

FOLDER = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((FOLDER / "llama_variants.json").read_text())
COUNT, PADDED, LENGTH = 7, 12, 64


def decode_all(config, params, tokens):
    """Returns the logits after each token from the last of a prompt of 7 on."""
    fns = step_fns(config)
    prompt = np.pad(tokens[:, :COUNT], ((0, 0), (0, PADDED - COUNT)), constant_values=9)
    prefill = jax.jit(fns.prefill, static_argnums=3)
    decode = jax.jit(fns.decode, donate_argnums=3)
    logits, caches = prefill(params, prompt, COUNT, LENGTH)
    all_logits = [logits]
    for position in range(COUNT, tokens.shape[1]):
        logits, caches = decode(params, tokens[:, position], position, caches)
        all_logits.append(logits)
    assert decode._cache_size() == 1
    return np.stack(all_logits, axis=1)


def test_steps_give_the_logits_of_the_whole_sequence():
    raw = VARIANTS["llama3"]  # grouped heads too
    config = read_config(raw)
    assert config.kv_heads < config.heads
    steps = decode_all(config, build_params(config, make_weights(raw, SEED)), golden("tokens"))
    assert np.abs(steps - golden("llama3")[:, COUNT - 1 :]).max() <= 1e-4


def test_a_step_holds_one_layer_of_the_cache():
    raw = {**VARIANTS["llama3"], "num_hidden_layers": 12}
    config = read_config(raw)
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    shape, length = (config.layers, 4, config.kv_heads), 8 * LENGTH
    cache = Cache(
        jax.ShapeDtypeStruct((*shape, length, config.head_dim), np.float32),
        jax.ShapeDtypeStruct((*shape, config.head_dim, length), np.float32),
    )
    token, position = jax.ShapeDtypeStruct((4,), np.int32), jax.ShapeDtypeStruct((), np.int32)
    decode = jax.jit(step_fns(config).decode, donate_argnums=3)
    compiled = decode.lower(params, token, position, (cache,)).compile(
        compiler_options=options_for_memory()
    )
    layer = sum(array.size * 4 for array in (cache.keys, cache.values)) / config.layers
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.5 * layer


def test_a_single_row_on_a_tpu_has_company_and_the_same_logits(monkeypatch):
    config = read_config(VARIANTS["llama3"])
    params = build_params(config, make_weights(VARIANTS["llama3"], SEED))
    head = model_fns(config).head
    row = np.random.default_rng(0).standard_normal((1, config.d_model)).astype(np.float32)
    wanted = head(params, row)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert f"f32[2,{config.vocab_size}]" in str(jax.make_jaxpr(head)(params, row))
    for lead in ((1,), (1, 1)):
        came = head(params, row.reshape(*lead, -1))
        assert came.shape == (*lead, config.vocab_size)
        np.testing.assert_allclose(came.reshape(1, -1), wanted, atol=1e-6)
