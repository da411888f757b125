"""Hugging Face folders of a tiny Llama, for the tests of what reads them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.models.families import family

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA = family("llama")


def weights(raw=CONFIG, dtype=np.float32, seed=0):
    """Random weights under the names a transformers Llama saves."""
    rng = np.random.default_rng(seed)
    d, ff = raw["hidden_size"], raw["intermediate_size"]
    kv = d * raw["num_key_value_heads"] // raw["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (raw["vocab_size"], d), "model.norm.weight": (d,)}
    if not raw["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (raw["vocab_size"], d)
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        outs = {"q": d, "k": kv, "v": kv, "o": d}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (out, d) for n, out in outs.items()}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (ff, d) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (d, ff)
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{at}.{n}.weight": (d,) for n in norms}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, arrays, raw=CONFIG, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    if shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: arrays[name] for name in sorted(arrays)[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def open_model(folder):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, LLAMA, LLAMA.read_config(checkpoint.config)


def refusal(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message
