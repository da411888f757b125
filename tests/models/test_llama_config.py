"""Llama's config.json: defaults, both spellings, refusals by name, and the tensor name table."""

import json
from pathlib import Path

import pytest

from lqec_jax.errors import InputError
from lqec_jax.models.config import ModelConfig, Rope
from lqec_jax.models.families import FAMILIES, family, read_config
from lqec_jax.models.llama import FAMILY
from tests.golden.tiny_weights import make_weights

VARIANTS = json.loads((Path(__file__).parents[1] / "golden" / "llama_variants.json").read_text())
SMALLEST = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def refusal(**changes) -> str:
    """Returns the one line with which the smallest config, so changed, is refused."""
    with pytest.raises(InputError) as caught:
        read_config({**SMALLEST, **changes})
    message = str(caught.value)
    assert "\n" not in message and message.startswith("config.json: ")
    return message


def read_rope(**changes) -> Rope:
    return read_config({**SMALLEST, **changes}).rope


def test_defaults_are_those_of_transformers():
    assert read_config(SMALLEST) == ModelConfig(
        family="llama",
        vocab_size=64,
        d_model=48,
        d_ff=80,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=12,
        max_length=2048,
        norm_eps=1e-6,
        activation="silu",
        rope=Rope("default", 10000.0),
        attention_bias=False,
        mlp_bias=False,
        tied_head=False,
    )


@pytest.mark.parity
def test_defaults_agree_with_the_installed_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(**SMALLEST)
    ours = read_config(SMALLEST)
    assert (theirs.num_key_value_heads, theirs.head_dim) == (ours.kv_heads, ours.head_dim)
    assert (theirs.rms_norm_eps, theirs.hidden_act) == (ours.norm_eps, ours.activation)
    assert theirs.max_position_embeddings == ours.max_length
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": ours.rope.theta}
    assert (theirs.attention_bias, theirs.mlp_bias) == (ours.attention_bias, ours.mlp_bias)
    assert theirs.tie_word_embeddings == ours.tied_head
    # What transformers saves is read back.
    assert read_config(json.loads(theirs.to_json_string(use_diff=False))) == ours


def test_every_value_is_read():
    config = read_config(
        {
            **SMALLEST,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 77,
            "rms_norm_eps": 0.25,
            "hidden_act": "relu",
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        }
    )
    assert (config.kv_heads, config.head_dim, config.max_length) == (2, 16, 77)
    assert (config.norm_eps, config.activation) == (0.25, "relu")
    assert config.attention_bias and config.mlp_bias and config.tied_head


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
    ],
)
def test_activation_names(word, ours):
    assert read_config({**SMALLEST, "hidden_act": word}).activation == ours


def test_keys_that_cannot_move_logits_are_accepted():
    inert = {
        "architectures": ["LlamaForCausalLM"],
        "transformers_version": "4.46.0",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "temperature": 0.6,
        "_name_or_path": "somewhere",
        "quantization_config": None,
        "sliding_window": None,
        "pruned_heads": {},
        "partial_rotary_factor": 1.0,
        "rope_interleaved": False,
    }
    assert read_config({**SMALLEST, **inert}) == read_config(SMALLEST)


ROPES = {
    "default": ({"rope_type": "default"}, Rope("default", 5e5)),
    "linear": ({"rope_type": "linear", "factor": 4}, Rope("linear", 5e5, 4.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, Rope("dynamic", 5e5, 2.0, 2048)),
    "llama3": (LLAMA3, Rope("llama3", 5e5, 8.0, 32, 1.0, 4.0)),
    "yarn": (
        {
            **YARN,
            "beta_fast": 24,
            "beta_slow": 2,
            "attention_factor": 1.1,
            "mscale": 0.7,
            "mscale_all_dim": 0.8,
            "truncate": False,
        },
        Rope(
            "yarn",
            5e5,
            4.0,
            512,
            beta_fast=24.0,
            beta_slow=2.0,
            attention_factor=1.1,
            mscale=0.7,
            mscale_all_dim=0.8,
            truncate=False,
        ),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_both_spellings_are_one_rope(name):
    given, expected = ROPES[name]
    oldest = {key: value for key, value in given.items() if key != "rope_type"}
    oldest["type"] = given["rope_type"]
    assert read_rope(rope_theta=5e5, rope_scaling=oldest) == expected
    assert read_rope(rope_theta=5e5, rope_scaling=given) == expected
    assert read_rope(rope_theta=5e5, rope_scaling={**given, **oldest}) == expected
    assert read_rope(rope_parameters={**given, "rope_theta": 5e5}) == expected
    assert read_rope(rope_theta=1e4, rope_parameters={**given, "rope_theta": 5e5}) == expected
    both = {"rope_scaling": oldest, "rope_parameters": given}
    assert read_rope(rope_theta=5e5, **both) == expected


def test_rope_defaults():
    assert read_rope(rope_theta=100) == Rope("default", 100.0)
    assert read_rope(rope_scaling={}) == Rope()
    assert read_rope(rope_parameters={"rope_theta": 100.0}) == Rope("default", 100.0)
    yarn = read_rope(rope_parameters={"rope_type": "yarn", "factor": 2.0})
    assert yarn == Rope("yarn", factor=2.0, original_length=2048)
    assert read_rope(rope_scaling={**YARN, "factor": None}).factor == 2048 / 512
    unset = {"attention_factor": None, "mscale": None, "beta_fast": None, "beta_slow": None}
    assert read_rope(rope_scaling={**YARN, **unset}) == read_rope(rope_scaling=YARN)
    no_original = {key: LLAMA3[key] for key in LLAMA3 if not key.startswith("original")}
    assert read_rope(rope_scaling=no_original).original_length == 2048


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, ["already quantized"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map", "own code"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["wanted ['LlamaForCausalLM']"]),
        ({"architectures": 3}, ["architectures is 3"]),
        ({"sliding_window": 4096}, ["sliding_window"]),
        ({"rope_thetaa": 1e4}, ["rope_thetaa", "did you mean 'rope_theta'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5", "1.0"]),
        ({"rope_interleaved": True}, ["rope_interleaved is True"]),
        ({"hidden_act": "tanh"}, ["hidden_act is 'tanh'", "silu"]),
        ({"hidden_act": "gelu_newer"}, ["did you mean 'gelu_new'"]),
        ({"hidden_act": None}, ["hidden_act is None"]),
        ({"hidden_size": "48"}, ["hidden_size is '48'", "positive integer"]),
        ({"hidden_size": 48.0}, ["hidden_size is 48.0", "positive integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0", "positive integer"]),
        ({"vocab_size": True}, ["vocab_size is True", "positive integer"]),
        ({"vocab_size": None}, ["vocab_size is None"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps is -1e-05", "positive number"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        ({"attention_bias": "yes"}, ["attention_bias is 'yes'", "true or false"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings is 1", "true or false"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads is 3", "divisor", "4"]),
        ({"hidden_size": 50}, ["hidden_size 50", "4 heads"]),
        ({"head_dim": 7}, ["head_dim is 7"]),
        ({"model_type": "mamba"}, ["model_type 'mamba'", "llama"]),
        ({"model_type": ["llama"]}, ["model_type ['llama']"]),
        ({"model_type": "lama"}, ["did you mean 'llama'"]),
        ({"rope_theta": 1.0}, ["rope_theta is 1.0", "more than 1"]),
        ({"rope_theta": None}, ["rope_theta is None"]),
        ({"rope_scaling": "linear"}, ["rope_scaling is 'linear'", "object"]),
    ],
)
def test_refusals(changes, words):
    message = refusal(**changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "longrope"}, ["rope_type is 'longrope'", "yarn"]),
        ({"type": "yarnn"}, ["type is 'yarnn'", "did you mean 'yarn'"]),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, ["disagree"]),
        ({"rope_type": "linear"}, ["factor is missing"]),
        ({"rope_type": "linear", "factor": 0.5}, ["factor is 0.5", "at least 1"]),
        ({"rope_type": "linear", "factor": "4"}, ["factor is '4'"]),
        ({"rope_type": "linear", "factor": None}, ["factor is None"]),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3}, ["beta_fast", "factor"]),
        ({"rope_type": "default", "factor": 2.0}, ["factor"]),
        ({**LLAMA3, "high_freq_factor": 1.0}, ["low_freq_factor is 1.0", "high_freq_factor 1.0"]),
        ({**LLAMA3, "original_max_position_embeddings": 32.5}, ["is 32.5", "positive integer"]),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, ["beta_fast is 1.0", "beta_slow 2.0"]),
        (
            {**YARN, "factor": None, "original_max_position_embeddings": 4096},
            ["factor is 0.5", "at least 1"],
        ),
        ({**YARN, "truncate": "no"}, ["truncate is 'no'", "true or false"]),
        ({**YARN, "finetuned": True}, ["finetuned"]),
        ({**YARN, "partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
    ],
)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rope_refusals_name_the_key_inside(place, rope, words):
    message = refusal(**{place: rope})
    assert f"{place}." in message
    assert all(word in message for word in words), message


def test_spellings_that_disagree_are_refused():
    linear = {"rope_type": "linear", "factor": 2.0}
    message = refusal(rope_scaling=linear, rope_parameters={**linear, "factor": 4.0})
    assert "rope_scaling and rope_parameters disagree" in message


@pytest.mark.parametrize("key", SMALLEST)
def test_missing_keys_are_refused_by_name(key):
    raw = {name: value for name, value in SMALLEST.items() if name != key}
    with pytest.raises(InputError, match=f"{key} is missing"):
        read_config(raw)


def test_every_family_in_the_table_is_complete():
    for name in FAMILIES:
        module = family(name)
        for function in ("read_config", "block_tensors", "outer_tensors", "block_shapes"):
            assert callable(getattr(module, function)), (name, function)


@pytest.mark.parametrize("name", VARIANTS)
def test_name_table_covers_the_checkpoint_exactly(name):
    config = read_config(VARIANTS[name])
    stored = {tensor.name: tensor.shape for tensor in FAMILY.outer_tensors(config).values()}
    for layer in range(config.layers):
        for tensor in FAMILY.block_tensors(config).values():
            stored[tensor.name.format(layer=layer)] = tensor.shape
    assert stored == {name: w.shape for name, w in make_weights(VARIANTS[name], seed=0).items()}


def test_block_shapes_are_inner_shapes():
    config = read_config(VARIANTS["attention_bias"])
    shapes = FAMILY.block_shapes(config)
    assert shapes["attn/q/kernel"] == (48, 48) and shapes["attn/k/kernel"] == (48, 24)
    assert shapes["attn/k/bias"] == (24,) and shapes["attn/o/bias"] == (48,)
    assert shapes["mlp/gate/kernel"] == (48, 80) and shapes["mlp/down/kernel"] == (80, 48)
    assert shapes["attn_norm/scale"] == shapes["mlp_norm/scale"] == (48,)
    assert "mlp/gate/bias" not in shapes
    assert "mlp/down/bias" in FAMILY.block_shapes(read_config(VARIANTS["mlp_bias"]))
    assert "head/kernel" not in FAMILY.outer_tensors(read_config(VARIANTS["tied_head"]))
