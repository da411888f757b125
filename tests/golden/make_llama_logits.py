"""Writes the golden files of the Llama family with torch and transformers.

    python -m tests.golden.make_llama_logits        (from the repository root; seconds on a CPU)

`llama_variants.json`: variant name -> raw config.json.
`llama_logits.npz`: `tokens` int32 [2, 48]; per variant float32 logits [2, 48, vocab].
`llama_ropes.json`: name -> the raw config, a length, and the inverse frequencies and attention
scale that transformers computes for it, for the variants and for contexts of real models.
Weights come from `tiny_weights.make_weights(config, SEED)` and are not stored.
"""

import json
from pathlib import Path

import numpy as np

from tests.golden.tiny_weights import make_weights

FOLDER = Path(__file__).parent
SEED = 0
LENGTH = 48

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
    "pretraining_tp": 1,
    "attention_dropout": 0.0,
    "torch_dtype": "float32",
    "transformers_version": "4.46.0",
}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def older(**changes: object) -> dict:
    """Returns the base config as transformers 4 spells it."""
    return {**BASE, **changes}


def newer(rope: dict, **changes: object) -> dict:
    """Returns the base config as transformers 5 spells it."""
    kept = set(BASE) - {"rope_theta", "rope_scaling", "torch_dtype"}
    spelled = {"dtype": "float32", "transformers_version": "5.23.0", "rope_parameters": rope}
    return {**{key: BASE[key] for key in BASE if key in kept}, **spelled, **changes}


VARIANTS = {
    "llama2_mha": older(),
    "gqa": older(num_key_value_heads=2),
    "mqa": older(num_key_value_heads=1),
    "head_dim": older(num_key_value_heads=2, head_dim=16),
    "tied_head": older(tie_word_embeddings=True),
    "attention_bias": older(num_key_value_heads=2, attention_bias=True),
    "mlp_bias": older(mlp_bias=True),
    "theta_500000": older(rope_theta=500000.0),
    "linear": older(rope_scaling={"type": "linear", "factor": 4.0}),
    "dynamic": older(
        max_position_embeddings=16, rope_scaling={"type": "dynamic", "factor": 2.0}, head_dim=16
    ),
    "llama3": newer({**LLAMA3, "rope_theta": 10000.0}, num_key_value_heads=2, head_dim=16),
    "llama3_older": older(rope_theta=500000.0, rope_scaling=LLAMA3, head_dim=16),
    "yarn": newer(YARN, head_dim=16),
    "yarn_attention_factor": newer(
        {**YARN, "attention_factor": 1.3, "beta_fast": 1.5, "beta_slow": 0.25}, head_dim=16
    ),
    "yarn_mscale": newer(
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.6, "truncate": False}, head_dim=16
    ),
    "gelu_tanh": older(hidden_act="gelu_pytorch_tanh"),
    "norm_eps": older(rms_norm_eps=1e-3),
}


def _real(kind: dict, max_length: int, heads: int = 32) -> dict:
    shape = {"hidden_size": heads * 128, "num_attention_heads": heads, "num_key_value_heads": 8}
    return newer(kind, max_position_embeddings=max_length, **shape)


ROPES = {
    "llama3_128k": (
        _real({**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}, 131072),
        2048,
    ),
    "yarn_64k": (
        _real({**YARN, "factor": 16.0, "original_max_position_embeddings": 4096}, 65536),
        2048,
    ),
    "yarn_unset_original": (
        _real({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, 32768),
        2048,
    ),
    "yarn_null_factor": (
        _real({**YARN, "factor": None, "original_max_position_embeddings": 4096}, 32768),
        2048,
    ),
    "yarn_untruncated": (
        _real(
            {**YARN, "original_max_position_embeddings": 4096, "truncate": False, "beta_slow": 2},
            16384,
        ),
        2048,
    ),
    "yarn_ramp_beyond_the_head": (
        _real(
            {
                **YARN,
                "rope_theta": 100.0,
                "original_max_position_embeddings": 131072,
                "beta_fast": 2000,
            },
            524288,
        ),
        2048,
    ),
    "dynamic_short": (
        _real({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 4096),
        2048,
    ),
    "dynamic_long": (
        _real({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 4096),
        10000,
    ),
}


def compute_logits(raw: dict, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits [b, t, vocab] of transformers' own Llama with our weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict(json.loads(json.dumps(raw)), attn_implementation="eager")
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    weights = {name: torch.from_numpy(w) for name, w in make_weights(raw, SEED).items()}
    loaded = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if raw["tie_word_embeddings"] else set()
    if loaded.unexpected_keys or set(loaded.missing_keys) - tied:
        raise ValueError(f"weights do not match: {loaded}")
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()


def compute_rope(raw: dict, length: int) -> tuple[list[float], float]:
    """Returns transformers' inverse frequencies and attention scale for a sequence of `length`."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = LlamaRotaryEmbedding(LlamaConfig.from_dict(json.loads(json.dumps(raw))))
    rope(torch.zeros(1), torch.arange(length)[None])
    return [float(f) for f in rope.inv_freq], float(rope.attention_scaling)


def main() -> None:
    """Writes the three files beside this one."""
    tokens = np.random.RandomState(SEED).randint(0, BASE["vocab_size"], (2, LENGTH))
    tokens = tokens.astype(np.int32)
    logits = {name: compute_logits(raw, tokens) for name, raw in VARIANTS.items()}
    np.savez_compressed(FOLDER / "llama_logits.npz", tokens=tokens, **logits)
    variants = json.dumps(VARIANTS, indent=1)
    (FOLDER / "llama_variants.json").write_text(variants + "\n")
    ropes = {name: (raw, LENGTH) for name, raw in VARIANTS.items()} | ROPES
    golden = {}
    for name, (raw, length) in ropes.items():
        frequency, scale = compute_rope(raw, length)
        golden[name] = {
            "config": raw,
            "length": length,
            "inverse_frequencies": frequency,
            "attention_scale": scale,
        }
    (FOLDER / "llama_ropes.json").write_text(json.dumps(golden, indent=None) + "\n")
    for name, values in logits.items():
        print(f"{name:22s} logits' deviation {values.std():.3f}")


if __name__ == "__main__":
    main()
