"""OPT (arXiv:2205.01068): learned positions, layer norms, an MLP without a gate."""

from collections.abc import Mapping
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Family
from lqec_jax.models.raw_config import Section
from lqec_jax.models.rotary import ACTIVATIONS, open_config

LAYER = "model.decoder.layers.{layer}"
NAMES = {
    "attn_norm": f"{LAYER}.self_attn_layer_norm",
    "attn/q": f"{LAYER}.self_attn.q_proj",
    "attn/k": f"{LAYER}.self_attn.k_proj",
    "attn/v": f"{LAYER}.self_attn.v_proj",
    "attn/o": f"{LAYER}.self_attn.out_proj",
    "mlp_norm": f"{LAYER}.final_layer_norm",
    "mlp/up": f"{LAYER}.fc1",
    "mlp/down": f"{LAYER}.fc2",
    "embed/embedding": "model.decoder.embed_tokens",
    "embed/positions": "model.decoder.embed_positions",
    "norm": "model.decoder.final_layer_norm",
    "head": "lm_head",
}

MODELLED = (
    "model_type architectures vocab_size hidden_size ffn_dim num_hidden_layers word_embed_proj_dim "
    "num_attention_heads max_position_embeddings activation_function enable_bias "
    "tie_word_embeddings"
).split()
INERT = ("dropout", "activation_dropout", "layerdrop", "init_std")
# The one checkpoint that norms after a block, of 350 million parameters, also projects embeddings.
NEUTRAL = {
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "layer_norm_elementwise_affine": True,
}
POSITION_OFFSET = 2  # the first two rows of the table are never used


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads an OPT config.json.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; embeddings of another width than the blocks'.
    """
    keys = open_config(raw, ("OPTForCausalLM",), MODELLED, INERT, NEUTRAL)
    heads, d_model = keys.count("num_attention_heads"), keys.count("hidden_size")
    _check_widths(keys, heads, d_model)
    biased = keys.flag("enable_bias", True)
    return ModelConfig(
        family="opt",
        vocab_size=keys.count("vocab_size"),
        d_model=d_model,
        d_ff=keys.count("ffn_dim"),
        layers=keys.count("num_hidden_layers"),
        heads=heads,
        kv_heads=heads,
        head_dim=d_model // heads,
        max_length=keys.count("max_position_embeddings", 2048),
        norm="layer",
        norm_eps=1e-5,
        activation=keys.choice("activation_function", ACTIVATIONS, "relu"),
        gated=False,
        rope=None,
        position_offset=POSITION_OFFSET,
        attention_bias=biased,
        output_bias=biased,
        mlp_bias=biased,
        tied_head=keys.flag("tie_word_embeddings", True),
    )


def _check_widths(keys: Section, heads: int, d_model: int) -> None:
    projected = keys.count("word_embed_proj_dim", None) or d_model
    if projected != d_model:
        raise keys.error(
            "word_embed_proj_dim",
            f"is {projected}, hidden_size {d_model}; only equal widths are modelled; use another "
            "checkpoint",
        )
    if d_model % heads:
        raise keys.error("hidden_size", f"{d_model} does not divide into {heads} heads")


FAMILY = Family(read_config, NAMES)
