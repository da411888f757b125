"""config.json of every family: real files, defaults, nulls, refusals by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from lqec_jax.errors import InputError
from lqec_jax.models.config import ModelConfig, Rope
from lqec_jax.models.families import FAMILIES, family, read_config
from lqec_jax.models.parameters import EVERYTHING, linear_sites, outer_shapes, with_constants

GOLDEN = Path(__file__).parents[1] / "golden"
VARIANTS = json.loads((GOLDEN / "family_variants.json").read_text())
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
}
ROTARY = SIZES | {"intermediate_size": 80}
SMALLEST = {
    "mistral": ROTARY,
    "qwen2": ROTARY | {"num_key_value_heads": 8},
    "qwen3": ROTARY | {"num_key_value_heads": 8},
    "opt": SIZES | {"ffn_dim": 80},
    "gemma2": ROTARY,
}


def read(name: str, **changes) -> ModelConfig:
    return read_config({"model_type": name, **SMALLEST[name], **changes})


def refusal(name: str, **changes) -> str:
    """Returns the one line with which a family's smallest config, so changed, is refused."""
    with pytest.raises(InputError) as caught:
        read(name, **changes)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("config.json: ")
    return message


def test_defaults_of_mistral():
    assert read("mistral") == ModelConfig(
        "mistral", 64, 48, 80, 3, 8, 8, 6, 131072, norm_eps=1e-6, windows=(4096,) * 3
    )
    assert read("mistral").window == 4096 and not read("mistral").mixed_windows


def test_defaults_of_qwen():
    qwen2 = read("qwen2")
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen2.max_length, qwen2.head_dim, qwen2.windows) == (32768, 6, ())
    qwen3 = read("qwen3")
    assert (qwen3.attention_bias, qwen3.output_bias, qwen3.qk_norm) == (False, False, True)
    assert qwen3.head_dim == 128
    assert read("qwen3", attention_bias=True).output_bias


def test_defaults_of_opt():
    assert read("opt") == ModelConfig(
        "opt", 64, 48, 80, 3, 8, 8, 6, 2048,
        norm="layer", activation="relu", gated=False, rope=None, position_offset=2,
        attention_bias=True, output_bias=True, mlp_bias=True, tied_head=True,
    )  # fmt: skip
    assert outer_shapes(read("opt"))["embed/positions"] == (2050, 48)
    assert [site.path for site in linear_sites(read("opt")) if site.group == 2] == ["mlp/up"]


def test_defaults_of_gemma2():
    gemma2 = read("gemma2")
    assert gemma2 == ModelConfig(
        "gemma2", 64, 48, 80, 3, 8, 4, 256, 8192,
        norm_eps=1e-6, norm_offset=1.0, post_norms=True, activation="gelu_tanh",
        embed_scale=48**0.5, attention_scale=1 / 16, attention_softcap=50.0, logit_softcap=30.0,
        windows=(4096, 0, 4096), tied_head=True,
    )  # fmt: skip
    assert gemma2.mixed_windows and gemma2.window is None


@pytest.mark.parity
@pytest.mark.parametrize("name", SMALLEST)
def test_defaults_agree_with_the_installed_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(name, **SMALLEST[name])
    # What transformers saves, all defaults spelled out, is read as what we take for absent keys.
    assert read_config(json.loads(theirs.to_json_string(use_diff=False))) == read(name)


def test_what_is_null_is_none():
    assert read("mistral", sliding_window=None).windows == ()
    assert read("mistral", num_key_value_heads=None).kv_heads == 8
    assert read("qwen2", use_sliding_window=True, sliding_window=None).windows == ()
    gemma2 = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (None, None)


def test_windows_by_layer():
    use = {"use_sliding_window": True, "sliding_window": 7}
    assert read("qwen2", **use).windows == ()  # the first 28 layers have none
    assert read("qwen2", **use, max_window_layers=1).windows == (0, 7, 7)
    assert read("qwen3", **use, max_window_layers=0).windows == (7, 7, 7)
    full, slides = "full_attention", "sliding_attention"
    assert read("qwen2", **use, layer_types=[slides, full, slides]).windows == (7, 0, 7)
    assert read("qwen2", layer_types=[full] * 3).windows == ()
    assert read("gemma2", sliding_window=7, layer_types=[full, full, slides]).windows == (0, 0, 7)


def test_a_block_carries_its_window_only_where_layers_differ():
    gemma2 = read("gemma2")
    windows = [with_constants(gemma2, layer, {})["attn"]["window"] for layer in range(3)]
    assert [int(w) for w in windows] == [4096, EVERYTHING, 4096]
    assert all(w.dtype == "int32" and w.shape == () for w in windows)
    assert with_constants(read("mistral"), 0, {}) == {}


HUB = {  # from the hub, as their authors wrote them
    "mistral": {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "opt": {
        "_name_or_path": "facebook/opt-125m", "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1,
        "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0,
        "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
        "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4",
        "use_cache": True, "vocab_size": 256000,
    },
}  # fmt: skip
PARAMETERS = {  # as counted on their model cards
    "mistral": 7_241_732_096,
    "qwen2": 494_032_768,
    "qwen3": 596_049_920,
    "opt": 125_239_296,
    "gemma2": 2_614_341_888,
}


@pytest.mark.parametrize("name", HUB)
def test_real_configs_are_read_and_have_as_many_parameters(name):
    config = read_config(HUB[name])
    block = sum(_size(t.shape) for t in family(name).block_tensors(config).values())
    outer = sum(_size(t.shape) for t in family(name).outer_tensors(config).values())
    assert config.layers * block + outer == PARAMETERS[name]


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mistral", {"sliding_window": 0}, ["sliding_window is 0", "positive integer"]),
        ("mistral", {"attention_bias": True}, ["attention_bias = True is not modelled"]),
        ("mistral", {"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor"]),
        ("mistral", {"architectures": ["LlamaForCausalLM"]}, ["wanted ['MistralForCausalLM']"]),
        ("qwen2", {"qkv_bias": False}, ["qkv_bias", "not modelled"]),
        ("qwen2", {"use_mrope": True}, ["use_mrope is True"]),
        ("qwen2", {"max_window_layers": -1}, ["max_window_layers is -1", "at least 0"]),
        ("qwen2", {"layer_types": ["full_attention"]}, ["layer_types", "wanted 3 of"]),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, ["layer_types", "full_attention"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, ["there is no sliding_window"]),
        ("qwen3", {"use_sliding_windows": True}, ["did you mean 'use_sliding_window'"]),
        ("qwen3", {"head_dim": 7}, ["head_dim is 7"]),
        ("opt", {"do_layer_norm_before": False}, ["do_layer_norm_before is False", "True"]),
        ("opt", {"word_embed_proj_dim": 24}, ["word_embed_proj_dim is 24", "hidden_size 48"]),
        ("opt", {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm is True"]),
        ("opt", {"layer_norm_elementwise_affine": False}, ["elementwise_affine is False"]),
        ("opt", {"rope_theta": 1e4}, ["rope_theta", "not modelled"]),
        ("opt", {"num_attention_heads": 5}, ["hidden_size 48", "5 heads"]),
        ("gemma2", {"sliding_window": None}, ["sliding_window is None"]),
        ("gemma2", {"attn_logit_softcapping": 0}, ["attn_logit_softcapping is 0"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention is True"]),
        ("gemma2", {"query_pre_attn_scalar": "256"}, ["query_pre_attn_scalar is '256'"]),
    ],
)  # fmt: skip
def test_refusals(name, changes, words):
    message = refusal(name, **changes)
    assert all(word in message for word in words), message


SHARED = {
    "vocab_size": 65,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 24,
    "max_position_embeddings": 77,
    "tie_word_embeddings": None,  # the other one
}
SHARED_ROTARY = SHARED | {
    "intermediate_size": 81,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 0.25,
    "rope_theta": 500.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_shared_key_is_read(name):
    before = read(name)
    for key, value in (SHARED if name == "opt" else SHARED_ROTARY).items():
        value = not before.tied_head if value is None else value
        assert read(name, **{key: value}) != before, key


def test_every_field_differs_between_some_variants():
    configs = [read_config(raw) for raw in [*VARIANTS.values(), *HUB.values()]]
    configs += [read("mistral", rope_theta=5e5), ModelConfig("llama", 1, 1, 1, 1, 1, 1, 1, 1)]
    for field in fields(ModelConfig):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name
    assert {config.rope for config in configs} >= {None, Rope(), Rope(theta=5e5)}


def test_all_families_of_the_table_are_here():
    assert set(SMALLEST) == set(HUB) == set(FAMILIES) - {"llama"}
