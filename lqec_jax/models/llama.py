"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783): config keys and tensor names."""

from collections.abc import Mapping
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import StoredTensor
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
    "attn_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "attn/q": "model.layers.{layer}.self_attn.q_proj",
    "attn/k": "model.layers.{layer}.self_attn.k_proj",
    "attn/v": "model.layers.{layer}.self_attn.v_proj",
    "attn/o": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp/gate": "model.layers.{layer}.mlp.gate_proj",
    "mlp/up": "model.layers.{layer}.mlp.up_proj",
    "mlp/down": "model.layers.{layer}.mlp.down_proj",
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

_MODELLED = (
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps "
    "hidden_act attention_bias mlp_bias tie_word_embeddings rope_theta rope_scaling rope_parameters"
).split()

# pretraining_tp only says how the same products were split over devices.
_INERT = (
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

_NEUTRAL = {
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Llama config.json; absent optional keys take the defaults of Hugging Face's Llama.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; shapes that do not divide.
    """
    keys = Section(raw)
    _refuse_foreign(keys)
    keys.refuse_unknown(_MODELLED, _INERT, _NEUTRAL)
    heads = keys.count("num_attention_heads")
    max_length = keys.count("max_position_embeddings", 2048)
    config = ModelConfig(
        family="llama",
        vocab_size=keys.count("vocab_size"),
        d_model=keys.count("hidden_size"),
        d_ff=keys.count("intermediate_size"),
        layers=keys.count("num_hidden_layers"),
        heads=heads,
        kv_heads=keys.count("num_key_value_heads", None) or heads,
        head_dim=_head_dim(keys, heads),
        max_length=max_length,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.choice("hidden_act", ACTIVATIONS, "silu"),
        rope=read_rope(keys, max_length),
        attention_bias=keys.flag("attention_bias", False),
        mlp_bias=keys.flag("mlp_bias", False),
        tied_head=keys.flag("tie_word_embeddings", False),
    )
    _check_heads(keys, config)
    return config


def _refuse_foreign(keys: Section) -> None:
    if keys.values.get("quantization_config"):
        raise keys.error(
            "quantization_config",
            "is set: the checkpoint is already quantized; use the full-precision one it came from",
        )
    if keys.values.get("auto_map"):
        raise keys.error("auto_map", "asks for the checkpoint's own code; use one without it")
    names = keys.values.get("architectures")
    if names and names not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]):
        raise keys.error("architectures", f"is {names!r}; wanted ['LlamaForCausalLM']")


def _head_dim(keys: Section, heads: int) -> int:
    given, d_model = keys.count("head_dim", None), keys.count("hidden_size")
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


def block_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns parameter path -> stored tensor for one block; format the name with `layer=`."""
    d, f = config.d_model, config.d_ff
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attn = {"attn/q": (d, q), "attn/k": (d, kv), "attn/v": (d, kv), "attn/o": (q, d)}
    mlp = {"mlp/gate": (d, f), "mlp/up": (d, f), "mlp/down": (f, d)}
    return {
        **_norm("attn_norm/scale", d),
        **_linears(attn, config.attention_bias),
        **_norm("mlp_norm/scale", d),
        **_linears(mlp, config.mlp_bias),
    }


def outer_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Returns parameter path -> stored tensor outside the blocks; no head when it is tied."""
    shape = (config.vocab_size, config.d_model)
    embed = {"embed/embedding": StoredTensor(TENSOR_NAMES["embed/embedding"], shape, False)}
    head = {"head/kernel": StoredTensor(TENSOR_NAMES["head/kernel"], shape, True)}
    return embed | _norm("norm/scale", config.d_model) | ({} if config.tied_head else head)


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns parameter path -> shape inside, kernels [d_in, d_out], for one block."""
    return {path: stored.inner_shape for path, stored in block_tensors(config).items()}


def _norm(path: str, d: int) -> dict[str, StoredTensor]:
    return {path: StoredTensor(TENSOR_NAMES[path], (d,), False)}


def _linears(dims: Mapping[str, tuple[int, int]], biased: bool) -> dict[str, StoredTensor]:
    tensors = {}
    for path, (d_in, d_out) in dims.items():
        name = TENSOR_NAMES[path]
        tensors[f"{path}/kernel"] = StoredTensor(f"{name}.weight", (d_out, d_in), True)
        if biased:
            tensors[f"{path}/bias"] = StoredTensor(f"{name}.bias", (d_out,), False)
    return tensors
