"""Logits of tiny Llamas equal transformers', and every config key that should move them does."""

import copy
import json
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest

from lqec_jax.core.tree import stack_blocks
from lqec_jax.models.config import ModelConfig, Rope
from lqec_jax.models.decoder import forward, model_fns
from lqec_jax.models.families import read_config
from lqec_jax.models.llama import FAMILY
from tests.golden.tiny_weights import make_weights

FOLDER = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((FOLDER / "llama_variants.json").read_text())
SEED = 0


@lru_cache
def golden(name: str) -> np.ndarray:
    with np.load(FOLDER / "llama_logits.npz") as stored:
        return stored[name]


def build_params(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict:
    """Returns the parameter tree that the family's name table makes of checkpoint tensors."""

    def tree(tensors: dict, **layer: int) -> dict:
        nested = {}
        for path, stored in tensors.items():
            *parents, leaf = path.split("/")
            array = weights[stored.name.format(**layer)]
            assert array.shape == stored.shape, path
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = array.T if stored.transposed else array
        return nested

    tensors = FAMILY.block_tensors(config)
    blocks = [tree(tensors, layer=layer) for layer in range(config.layers)]
    return {**tree(FAMILY.outer_tensors(config)), "blocks": stack_blocks(blocks)}


def compute_logits(raw: dict, weights: dict[str, np.ndarray]) -> np.ndarray:
    config = read_config(raw)
    run = jax.jit(partial(forward, config))
    return np.asarray(run(build_params(config, weights), golden("tokens")))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name):
    raw = VARIANTS[name]
    logits = compute_logits(raw, make_weights(raw, SEED))
    assert golden(name).std() > 1
    # float32 sums in another order: 1e-5 is seen where the logits reach 8.
    assert difference(logits, golden(name)) <= 1e-4


def test_functions_compose_to_the_forward_pass():
    raw = VARIANTS["gqa"]
    config = read_config(raw)
    params, fns = build_params(config, make_weights(raw, SEED)), model_fns(config)
    tokens = golden("tokens")
    np.testing.assert_array_equal(fns.embed(params, tokens), params["embed"]["embedding"][tokens])
    pre_norm, post_norm = fns.hidden(params, tokens)
    mean_square = np.square(pre_norm).mean(-1, keepdims=True)
    scaled = pre_norm / np.sqrt(mean_square + 1e-5) * params["norm"]["scale"]
    np.testing.assert_allclose(post_norm, scaled, atol=1e-5)
    assert difference(np.asarray(fns.head(params, post_norm)), golden("gqa")) <= 1e-4


# Variant, then the keys changed; `a.b` is key b of object a. Keys whose change alone would break a
# shape change together with those that keep every tensor's shape.
MUTATIONS = [
    ("llama2_mha", {"rope_theta": 5000.0}),
    ("llama2_mha", {"rms_norm_eps": 1e-4}),
    ("llama2_mha", {"num_hidden_layers": 1}),
    ("llama2_mha", {"tie_word_embeddings": True}),
    ("llama2_mha", {"hidden_act": "relu"}),
    ("llama2_mha", {"hidden_act": "gelu"}),
    ("gelu_tanh", {"hidden_act": "gelu"}),
    ("norm_eps", {"rms_norm_eps": 9e-4}),
    ("llama2_mha", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24}),
    ("head_dim", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}),
    ("attention_bias", {"attention_bias": False}),
    ("mlp_bias", {"mlp_bias": False}),
    ("linear", {"rope_scaling.factor": 4.2}),
    ("linear", {"rope_scaling.type": "dynamic", "max_position_embeddings": 16}),
    ("linear", {"rope_theta": 9000.0}),
    ("linear", {"rope_scaling": None}),
    ("dynamic", {"rope_scaling.factor": 2.2}),
    ("dynamic", {"max_position_embeddings": 18}),
    ("dynamic", {"rope_scaling": None}),
    ("llama3", {"rope_parameters.rope_theta": 9000.0}),
    ("llama3", {"rope_parameters.factor": 7.0}),
    ("llama3", {"rope_parameters.low_freq_factor": 0.8}),
    ("llama3", {"rope_parameters.high_freq_factor": 6.0}),
    ("llama3", {"rope_parameters.original_max_position_embeddings": 28}),
    ("llama3_older", {"rope_theta": 400000.0}),
    ("llama3_older", {"rope_scaling.factor": 7.0}),
    ("yarn", {"rope_parameters.rope_theta": 9000.0}),
    ("yarn", {"rope_parameters.factor": 3.5}),
    ("yarn", {"rope_parameters.original_max_position_embeddings": 64}),
    ("yarn", {"rope_parameters.beta_fast": 1.5}),
    ("yarn", {"rope_parameters.beta_slow": 0.25}),
    ("yarn", {"rope_parameters.truncate": False}),
    ("yarn", {"rope_parameters.attention_factor": 1.15}),
    ("yarn", {"rope_parameters.mscale": 1.0, "rope_parameters.mscale_all_dim": 0.9}),
    ("yarn_attention_factor", {"rope_parameters.attention_factor": 1.31}),
    ("yarn_attention_factor", {"rope_parameters.beta_fast": 2.0}),
    ("yarn_attention_factor", {"rope_parameters.beta_slow": 1.0}),
    ("yarn_mscale", {"rope_parameters.mscale": 1.05}),
    ("yarn_mscale", {"rope_parameters.mscale_all_dim": 0.65}),
    ("yarn_mscale", {"rope_parameters.truncate": True}),
    ("yarn_mscale", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
]


def mutate(name: str, changes: dict) -> dict:
    raw = copy.deepcopy(VARIANTS[name])
    for path, value in changes.items():
        *parents, key = path.split(".")
        place = raw[parents[0]] if parents else raw
        place[key] = value
    return raw


@pytest.mark.parametrize(("name", "changes"), MUTATIONS)
def test_each_key_moves_the_logits(name, changes):
    weights = make_weights(VARIANTS[name], SEED)
    with jax.disable_jit():  # one compilation an operation serves nearly all of them
        logits = compute_logits(mutate(name, changes), weights)
    assert difference(logits, golden(name)) > 1e-3


# See test_family_logits.
NOT_LLAMAS = {"norm", "norm_offset", "post_norms", "qk_norm", "gated", "position_offset",
              "embed_scale", "attention_scale", "attention_softcap", "logit_softcap",
              "windows"}  # fmt: skip


def test_every_modelled_field_is_mutated():
    moved = set()
    for name, changes in MUTATIONS:
        before, after = read_config(VARIANTS[name]), read_config(mutate(name, changes))
        for record, other in ((before, after), (before.rope, after.rope)):
            names = (field.name for field in fields(record))
            moved |= {n for n in names if getattr(record, n) != getattr(other, n)}
    named = {field.name for record in (ModelConfig, Rope) for field in fields(record)}
    # The sizes are the tensors' shapes, which the name table's test compares.
    assert named - moved == {"family", "vocab_size", "d_model", "d_ff"} | NOT_LLAMAS
