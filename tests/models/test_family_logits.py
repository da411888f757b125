"""Logits of every family equal transformers', at once and token by token; each key moves them."""

import json
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

import jax
import numpy as np
import pytest

from lqec_jax.core.tree import set_at, stack_blocks
from lqec_jax.models.decoder import forward, init_params
from lqec_jax.models.families import FAMILIES, family, read_config
from lqec_jax.models.parameters import with_constants
from tests.golden.make_family_logits import draw_weights
from tests.models.test_stepping import COUNT, decode_all

FOLDER = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((FOLDER / "family_variants.json").read_text())
SEED = 0


@lru_cache
def golden(name: str) -> np.ndarray:
    with np.load(FOLDER / "family_logits.npz") as stored:
        return stored[name]


def build_params(raw: dict) -> dict:
    """Returns the parameter tree that the family's name table makes of checkpoint tensors."""
    config, weights = read_config(raw), draw_weights(raw, SEED)
    names = family(config.family)

    def tree(tensors: dict, **layer: int) -> dict:
        nested = {}
        for path, stored in tensors.items():
            array = weights[stored.name.format(**layer)]
            nested = set_at(nested, path, array.T if stored.transposed else array)
        return nested

    blocks = [
        with_constants(config, layer, tree(names.block_tensors(config), layer=layer))
        for layer in range(config.layers)
    ]
    return {**tree(names.outer_tensors(config)), "blocks": stack_blocks(blocks)}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name):
    raw = VARIANTS[name]
    run = jax.jit(partial(forward, read_config(raw)))
    logits = np.asarray(run(build_params(raw), golden("tokens")))
    assert golden(name).std() > 1
    # float32 sums in another order: 1e-5 is seen where the logits reach 8.
    assert difference(logits, golden(name)) <= 1e-4


STEPPED = ("mistral/window", "qwen2/late_window", "qwen3/plain", "opt/plain", "gemma2/plain")


@pytest.mark.parametrize("name", STEPPED)
def test_steps_give_the_logits_of_the_whole_sequence(name):
    raw = VARIANTS[name]
    steps = decode_all(read_config(raw), build_params(raw), golden("tokens"))
    assert difference(steps, golden(name)[:, COUNT - 1 :]) <= 1e-4


def test_each_key_moves_the_logits():
    moved = set()
    for name, other in combinations(VARIANTS, 2):
        a, b = VARIANTS[name], VARIANTS[other]
        keys = [key for key in {*a, *b} if a.get(key) != b.get(key)]
        if len(keys) == 1:
            moved.add((a["model_type"], keys[0]))
            assert difference(golden(name), golden(other)) > 1e-3, (name, other)
    assert moved >= {
        ("mistral", "sliding_window"),
        ("qwen2", "use_sliding_window"),
        ("qwen2", "max_window_layers"),
        ("qwen3", "use_sliding_window"),
        ("qwen3", "attention_bias"),
        ("opt", "enable_bias"),
        ("opt", "activation_function"),
        ("opt", "tie_word_embeddings"),
        ("gemma2", "sliding_window"),
        ("gemma2", "query_pre_attn_scalar"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
        ("gemma2", "hidden_activation"),
        ("gemma2", "attention_bias"),
    }


def test_every_family_is_stepped_and_the_text_is_longer_than_its_window():
    assert {name.partition("/")[0] for name in STEPPED} == set(FAMILIES) - {"llama"}
    for raw in VARIANTS.values():
        windows = read_config(raw).windows
        assert max(windows, default=0) < golden("tokens").shape[1] / 2


@pytest.mark.parametrize("name", STEPPED)
def test_drawn_parameters_have_the_shapes_of_the_checkpoint(name):
    raw = VARIANTS[name]
    config = read_config(raw)
    drawn = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    built = jax.eval_shape(lambda: build_params(raw))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), built
    )
