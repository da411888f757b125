"""A prompt and then one token at a time gives the logits of the whole sequence at once."""

import json
from pathlib import Path

import jax
import numpy as np

from lqec_jax.models.families import read_config
from lqec_jax.models.stepping import step_fns
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
