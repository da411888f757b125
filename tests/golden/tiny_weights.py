"""Weights of tiny Llama checkpoints from numpy alone, so golden files need not hold them."""

import zlib

import numpy as np


def make_weights(raw_config: dict, seed: int) -> dict[str, np.ndarray]:
    """Returns checkpoint tensor name -> float32 array, as stored: linears [d_out, d_in].

    Each tensor has its own stream, seeded by its name: two configs share every tensor they have in
    common. Scales are such that attention is far from uniform and the logits' deviation exceeds 1,
    so a wrong rotation, norm or head order shows.
    """
    return {
        name: draw_tensor(name, shape, scale, center, seed)
        for name, (shape, scale, center) in _tensors(raw_config).items()
    }


def draw_tensor(
    name: str, shape: tuple[int, ...], scale: float, center: float, seed: int
) -> np.ndarray:
    """Returns center + scale · N(0, 1), float32, from the stream of this name."""
    # The legacy generator: numpy guarantees that its stream never changes.
    stream = np.random.RandomState([seed, zlib.crc32(name.encode())])
    return (center + scale * stream.standard_normal(shape)).astype(np.float32)


def _tensors(raw: dict) -> dict[str, tuple[tuple[int, ...], float, float]]:
    d, vocab = raw["hidden_size"], raw["vocab_size"]
    tensors = {
        "model.embed_tokens.weight": ((vocab, d), 0.3, 0.0),
        "model.norm.weight": ((d,), 0.2, 1.0),
    }
    if not raw.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = ((vocab, d), 0.3, 0.0)
    for layer in range(raw["num_hidden_layers"]):
        for name, entry in _block_tensors(raw).items():
            tensors[f"model.layers.{layer}.{name}"] = entry
    return tensors


def _block_tensors(raw: dict) -> dict[str, tuple[tuple[int, ...], float, float]]:
    d, d_ff, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or d // heads
    q, kv = heads * head_dim, raw.get("num_key_value_heads", heads) * head_dim
    attention, mlp = raw.get("attention_bias", False), raw.get("mlp_bias", False)
    linears = {
        "self_attn.q_proj": (q, d, 1.4, attention),
        "self_attn.k_proj": (kv, d, 1.4, attention),
        "self_attn.v_proj": (kv, d, 1.0, attention),
        "self_attn.o_proj": (d, q, 1.0, attention),
        "mlp.gate_proj": (d_ff, d, 1.0, mlp),
        "mlp.up_proj": (d_ff, d, 1.0, mlp),
        "mlp.down_proj": (d, d_ff, 1.0, mlp),
    }
    tensors = {}
    for name, (d_out, d_in, gain, biased) in linears.items():
        tensors[f"{name}.weight"] = ((d_out, d_in), gain / d_in**0.5, 0.0)
        if biased:
            tensors[f"{name}.bias"] = ((d_out,), 0.3, 0.0)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.weight"] = ((d,), 0.2, 1.0)
    return tensors
