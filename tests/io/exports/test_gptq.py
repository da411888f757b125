"""The GPTQ export: words worked out by hand, both versions' zeros, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lqec_jax.errors import InputError
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.gptq import CONFIG, pack_linear
from lqec_jax.io.exports.walk import to_dense
from lqec_jax.io.verify import gptq as reader
from lqec_kernels.formats import Affine
from tests.io.packed_models import make_model


def two_codes(bits, zeros=None):
    """32 x 32 codes: (0, 0) is 1, (1, 0) is 2^bits - 1, the rest are 0."""
    codes = jnp.zeros((32, 32), jnp.uint8).at[0, 0].set(1).at[1, 0].set(2**bits - 1)
    return Affine.from_codes(codes, jnp.ones((2, 32), jnp.float16), zeros, bits=bits, group_size=16)


@pytest.mark.parametrize(
    ("bits", "word", "zero_words"),
    [
        (2, 0b1101, {0x55555555}),
        (3, 0b111001, {0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D}),
        (4, 0xF1, {0x77777777}),
        (8, 0xFF01, {0x7F7F7F7F}),
    ],
)
def test_two_codes_and_the_symmetric_zeros_of_version_1(bits, word, zero_words):
    packed = pack_linear(two_codes(bits), 1, "q")
    assert {name: (array.dtype.name, array.shape) for name, array in packed.items()} == {
        "qweight": ("int32", (bits, 32)),
        "qzeros": ("int32", (2, bits)),
        "scales": ("float16", (2, 32)),
        "g_idx": ("int32", (32,)),
    }
    assert packed["qweight"][0, 0] == word
    assert not packed["qweight"][0, 1:].any() and not packed["qweight"][1:].any()
    assert set(packed["qzeros"].view(np.uint32).ravel().tolist()) == zero_words
    assert packed["g_idx"].tolist() == [0] * 16 + [1] * 16


def test_one_scale_of_a_whole_weight_is_written_out():
    codes = two_codes(4).codes
    packed = pack_linear(Affine(codes, jnp.full((1, 1), 0.5), None, 4, 32, 32), 1, "q")
    np.testing.assert_array_equal(packed["scales"], np.full((1, 32), 0.5))
    assert packed["qzeros"].shape == (1, 4) and not packed["g_idx"].any()


def test_version_2_stores_zeros_as_they_are():
    assert set(pack_linear(two_codes(4), 2, "q")["qzeros"].view(np.uint32).ravel()) == {0x88888888}
    zeros = jnp.zeros((2, 32), jnp.uint8).at[1, 1].set(3)
    packed = pack_linear(two_codes(2, zeros), 2, "q")
    assert packed["qzeros"].tolist() == [[0, 0], [0b1100, 0]]


def test_version_1_has_no_place_for_a_zero_of_0():
    zeros = jnp.ones((2, 32), jnp.uint8).at[0, 5].set(0)
    with pytest.raises(InputError, match="q has 1 zeros of 0, .* add --gptq-version 2"):
        pack_linear(two_codes(2, zeros), 1, "q")


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (3, True), (8, True), (3, False), (4, False)]
)
def test_an_independent_reader_gives_the_weights(bits, symmetric, tmp_path):
    model = make_model((bits, bits), (0, 0), symmetric)
    version = 2 if bits == 4 else 1
    folder = export_model(model, tmp_path / "out", "gptq", gptq_version=version).folder
    w = reader.read(folder, {})["model.layers.1.mlp.down_proj.weight"]()
    leaf = model.params["blocks"][0]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(w, to_dense(leaf)[1].T)


def test_the_config_is_in_both_places(tmp_path):
    done = export_model(make_model(ranks=(0, 0)), tmp_path / "out", "gptq")
    said = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    assert said == json.loads((done.folder / CONFIG).read_text())
    wanted = {"quant_method": "gptq", "bits": 2, "group_size": 32, "sym": True, "desc_act": False,
              "checkpoint_format": "gptq"}  # fmt: skip
    assert wanted.items() <= said.items()
    names = load_file(done.folder / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" not in names and "lm_head.weight" in names
    assert done.notes == ("vLLM's own gptq takes symmetric 4 and 8 bits only; GPTQModel reads this "
                          "folder",)  # fmt: skip


def test_whole_rows_are_group_size_minus_1(tmp_path):
    done = export_model(make_model((4, 4), (0, 0), group_size=None), tmp_path / "out", "gptq")
    said = json.loads((done.folder / CONFIG).read_text())
    assert said["group_size"] == -1 and not done.notes
    index = load_file(done.folder / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"]
    assert index.tolist() == [0] * 64


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": (2, 3), "ranks": (0, 0)}, "2 bits in groups of 32, symmetric, .* has 3 bits"),
        ({"bits": (5, 5), "ranks": (0, 0)}, "5-bit codes which gptq cannot hold"),
        ({}, "low-rank corrections, which gptq cannot hold; add --base-only"),
        ({"ranks": (0, 0), "num_key_value_heads": 2}, r"attn/k/kernel is \[32, 16\], .* of 32"),
    ],
)
def test_what_it_cannot_say_is_refused(options, why, tmp_path):
    with pytest.raises(InputError, match=why):
        export_model(make_model(**options), tmp_path / "out", "gptq")
    assert list(tmp_path.iterdir()) == []
