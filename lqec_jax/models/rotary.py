"""What Llama and the families after it share: keys of config.json, and names of tensors."""

from collections.abc import Collection, Mapping
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.raw_config import Section, read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

TENSOR_NAMES = {
    "attn_norm": "model.layers.{layer}.input_layernorm",
    "attn/q": "model.layers.{layer}.self_attn.q_proj",
    "attn/k": "model.layers.{layer}.self_attn.k_proj",
    "attn/v": "model.layers.{layer}.self_attn.v_proj",
    "attn/o": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp/gate": "model.layers.{layer}.mlp.gate_proj",
    "mlp/up": "model.layers.{layer}.mlp.up_proj",
    "mlp/down": "model.layers.{layer}.mlp.down_proj",
    "embed/embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}

MODELLED = (
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters"
).split()
WINDOW_KEYS = ("sliding_window", "layer_types")

# pretraining_tp only says how the same products were split over devices.
INERT = (
    "transformers_version torch_dtype dtype use_cache initializer_range bos_token_id eos_token_id "
    "pad_token_id attention_dropout pretraining_tp name_or_path _name_or_path _commit_hash "
    "_attn_implementation _attn_implementation_autoset attn_implementation output_attentions "
    "output_hidden_states return_dict chunk_size_feed_forward id2label label2id num_labels "
    "problem_type finetuning_task task_specific_params tokenizer_class prefix torchscript "
    "is_decoder max_sequence_length do_sample temperature top_k top_p typical_p max_length "
    "min_length num_beams num_beam_groups num_return_sequences repetition_penalty length_penalty "
    "diversity_penalty early_stopping no_repeat_ngram_size output_scores return_dict_in_generate "
    "remove_invalid_values is_llama_config transformers.js_config unsloth_version unsloth_fixed"
).split()

NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


def open_config(
    raw: Mapping[str, Any],
    architectures: Collection[str],
    modelled: Collection[str],
    inert: Collection[str] = (),
    neutral: Mapping[str, Any] | None = None,
) -> Section:
    """Opens a config.json; `modelled`, `inert` and `neutral` are added to what all families know.

    Raises: InputError: another's code or architecture, a quantized checkpoint, or a key that is not
    known to leave the logits alone.
    """
    keys = Section(raw)
    _refuse_foreign(keys, architectures)
    keys.refuse_unknown(modelled, (*INERT, *inert), {**NEUTRAL, **(neutral or {})})
    return keys


def read_rotary(
    keys: Section,
    *,
    max_length: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied_head: bool = False,
    activation: str = "hidden_act",
    activation_default: str = "silu",
) -> ModelConfig:
    """Reads what these families share; the arguments are a family's values for absent keys.

    Args:
      kv_heads: None is as many as heads; so is a null.
      head_dim: None is hidden_size / heads.
      activation: the key that names it.
    Raises: InputError: a key that is missing or of the wrong type; shapes that do not divide.
    """
    heads = keys.count("num_attention_heads")
    context = keys.count("max_position_embeddings", max_length)
    absent = "num_key_value_heads" not in keys.values
    config = ModelConfig(
        family=keys.values["model_type"],
        vocab_size=keys.count("vocab_size"),
        d_model=keys.count("hidden_size"),
        d_ff=keys.count("intermediate_size"),
        layers=keys.count("num_hidden_layers"),
        heads=heads,
        kv_heads=keys.count("num_key_value_heads", None) or (kv_heads if absent else None) or heads,
        head_dim=_read_head_dim(keys, heads, head_dim),
        max_length=context,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.choice(activation, ACTIVATIONS, activation_default),
        rope=read_rope(keys, context),
        tied_head=keys.flag("tie_word_embeddings", tied_head),
    )
    _check_heads(keys, config)
    return config


def read_windows(keys: Section, window: int | None, slides: list[bool]) -> tuple[int, ...]:
    """Returns each layer's window, 0 for none; () where no layer has one.

    Args:
      window: in tokens, None where the file has none.
      slides: which layers have it, unless `layer_types` says.
    Raises: InputError: `layer_types` of another length or with another word, or a window asked for
    where there is none.
    """
    types = keys.values.get("layer_types")
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or len(types) != len(slides) or not set(types) <= set(known):
            raise keys.error(
                "layer_types",
                f"is {str(types)[:80]}; wanted {len(slides)} of {', '.join(known)}",
            )
        slides = [known[word] for word in types]
        if any(slides) and window is None:
            raise keys.error("layer_types", "has sliding_attention, but there is no sliding_window")
    if window is None or not any(slides):
        return ()
    return tuple(window if slide else 0 for slide in slides)


def read_window(keys: Section, default: int) -> int | None:
    """Returns `sliding_window`: absent is the default, null is none."""
    return keys.count("sliding_window", None) if "sliding_window" in keys.values else default


def _refuse_foreign(keys: Section, architectures: Collection[str]) -> None:
    if keys.values.get("quantization_config"):
        raise keys.error(
            "quantization_config",
            "is set: the checkpoint is already quantized; use the full-precision one it came from",
        )
    if keys.values.get("auto_map"):
        raise keys.error("auto_map", "asks for the checkpoint's own code; use one without it")
    names = keys.values.get("architectures")
    if names and names not in [[name] for name in architectures]:
        raise keys.error("architectures", f"is {names!r}; wanted {[*architectures][:1]!r}")


def _read_head_dim(keys: Section, heads: int, default: int | None) -> int:
    given, d_model = keys.count("head_dim", None), keys.count("hidden_size")
    if given is None and "head_dim" not in keys.values:
        given = default
    if given is None and d_model % heads:
        raise keys.error(
            "hidden_size", f"{d_model} does not divide into {heads} heads; give head_dim"
        )
    return given or d_model // heads


def _check_heads(keys: Section, config: ModelConfig) -> None:
    if config.heads % config.kv_heads:
        raise keys.error(
            "num_key_value_heads",
            f"is {config.kv_heads}; wanted a divisor of num_attention_heads {config.heads}",
        )
    # Dynamic scaling raises theta to the power d / (d - 2).
    if config.head_dim % 2 or (config.rope.kind == "dynamic" and config.head_dim == 2):
        raise keys.error("head_dim", f"is {config.head_dim}; a rotary embedding cannot turn it")
