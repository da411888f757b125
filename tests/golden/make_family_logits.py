"""Writes the golden logits of the families beside Llama, with torch and transformers.

    python -m tests.golden.make_family_logits        (from the repository root; seconds on a CPU)

`family_variants.json`: 'family/variant' -> raw config.json.
`family_logits.npz`: `tokens` int32 [1, 40]; per variant float32 logits [1, 40, vocab].
Weights come from `draw_weights(raw, SEED)` and are not stored: names and shapes are those of our
mapping, which transformers accepts only if they are its own.
"""

import json
from pathlib import Path

import numpy as np

from lqec_jax.models import families
from tests.golden.tiny_weights import draw_tensor

FOLDER = Path(__file__).parent
SEED, LENGTH, VOCAB = 0, 40, 64

SIZES = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = SIZES | {
    "intermediate_size": 80,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MISTRAL = ROTARY | {"model_type": "mistral", "sliding_window": 8}
QWEN2 = ROTARY | {
    "model_type": "qwen2",
    "use_sliding_window": False,
    "sliding_window": 8,
    "max_window_layers": 1,
}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 16, "attention_bias": False}
OPT = SIZES | {
    "model_type": "opt",
    "ffn_dim": 80,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": True,
}
GEMMA2 = ROTARY | {
    "model_type": "gemma2",
    "num_hidden_layers": 3,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 8,
    "attention_bias": False,
    "tie_word_embeddings": True,
}


def newer(raw: dict, **changes: object) -> dict:
    """Returns a config as transformers 5 spells it."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": raw["rope_theta"]}}
    return {key: raw[key] for key in raw if key != "rope_theta"} | rope | changes


# Two that differ in one key show that the key moves the logits.
VARIANTS = {
    "mistral/window": MISTRAL,
    "mistral/no_window": MISTRAL | {"sliding_window": None},
    "mistral/newer": newer(MISTRAL, head_dim=16),
    "qwen2/plain": QWEN2,
    "qwen2/late_window": QWEN2 | {"use_sliding_window": True},
    "qwen2/window": QWEN2 | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen2/newer": newer(
        QWEN2,
        use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    ),
    "qwen3/plain": QWEN3,
    "qwen3/bias": QWEN3 | {"attention_bias": True},
    "qwen3/late_window": QWEN3 | {"use_sliding_window": True},
    "qwen3/newer": newer(QWEN3, head_dim=12, tie_word_embeddings=True),
    "opt/plain": OPT,
    "opt/no_bias": OPT | {"enable_bias": False},
    "opt/untied": OPT | {"tie_word_embeddings": False},
    "opt/gelu": OPT | {"activation_function": "gelu"},
    "gemma2/plain": GEMMA2,
    "gemma2/window_9": GEMMA2 | {"sliding_window": 9},
    "gemma2/scalar": GEMMA2 | {"query_pre_attn_scalar": 16},
    "gemma2/low_cap": GEMMA2 | {"attn_logit_softcapping": 2.0},
    "gemma2/low_final_cap": GEMMA2 | {"final_logit_softcapping": 3.0},
    "gemma2/gelu": GEMMA2 | {"hidden_activation": "gelu"},
    "gemma2/bias": GEMMA2 | {"attention_bias": True},
    "gemma2/newer": newer(
        GEMMA2, layer_types=["full_attention", "full_attention", "sliding_attention"]
    ),
}


def draw_weights(raw: dict, seed: int) -> dict[str, np.ndarray]:
    """Returns checkpoint tensor name -> float32 array as stored, linears [d_out, d_in].

    Each tensor has its own stream, seeded by its name. Scales are such that attention is far from
    uniform and the logits' deviation exceeds 1.
    """
    config = families.read_config(raw)
    family = families.family(config.family)
    tensors = dict(family.outer_tensors(config))
    for layer in range(config.layers):
        for path, stored in family.block_tensors(config).items():
            tensors[f"{layer}/{path}"] = stored._replace(name=stored.name.format(layer=layer))
    weights = {}
    for path, stored in tensors.items():
        scale, center = _scale(path, stored.shape, config.norm_offset)
        weights[stored.name] = draw_tensor(stored.name, stored.shape, scale, center, seed)
    return weights


def _scale(path: str, shape: tuple[int, ...], norm_offset: float) -> tuple[float, float]:
    leaf = path.rpartition("/")[2]
    if leaf == "kernel" and path != "head/kernel":
        gain = 1.4 if path.endswith(("attn/q/kernel", "attn/k/kernel")) else 1.0
        return gain / shape[1] ** 0.5, 0.0
    return (0.2, 1.0 - norm_offset) if leaf == "scale" else (0.3, 0.0)


def compute_logits(raw: dict, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits [b, t, vocab] of transformers' own model with our weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: raw[key] for key in raw if key != "model_type"}
    config = AutoConfig.for_model(raw["model_type"], **json.loads(json.dumps(options)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.to(torch.float32).eval()
    weights = {name: torch.from_numpy(w) for name, w in draw_weights(raw, SEED).items()}
    loaded = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    if loaded.unexpected_keys or set(loaded.missing_keys) - tied:
        raise ValueError(f"weights do not match: {loaded}")
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def main() -> None:
    """Writes the two files beside this one."""
    tokens = np.random.RandomState(SEED).randint(0, VOCAB, (1, LENGTH)).astype(np.int32)
    logits = {name: compute_logits(raw, tokens) for name, raw in VARIANTS.items()}
    np.savez_compressed(FOLDER / "family_logits.npz", tokens=tokens, **logits)
    (FOLDER / "family_variants.json").write_text(json.dumps(VARIANTS, indent=1) + "\n")
    for name, values in logits.items():
        print(f"{name:22s} logits' deviation {values.std():.3f}")


if __name__ == "__main__":
    main()
