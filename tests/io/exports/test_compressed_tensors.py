"""The compressed-tensors export: words worked out by hand, its config, and transformers' logits."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lqec_jax as lqec
from lqec_jax.core.tree import set_at
from lqec_jax.errors import InputError
from lqec_jax.io.exports.compressed_tensors import pack_linear
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.walk import to_dense
from lqec_jax.io.verify import compressed_tensors as reader
from lqec_kernels.formats import Affine
from tests.golden.tiny_checkpoint import write_checkpoint
from tests.io.packed_models import make_model

TOKENS = np.arange(32).reshape(2, 16)
DOWN = "model.layers.1.mlp.down_proj"


def read_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(("bits", "word"), [(2, 0b1101), (3, 0b111001), (4, 0xF1), (8, 0xFF01)])
def test_two_codes_by_hand(bits, word):
    codes = jnp.zeros((40, 3), jnp.uint8).at[0, 0].set(1).at[1, 0].set(2**bits - 1)
    base = Affine.from_codes(codes, jnp.ones((2, 3)), None, bits=bits, group_size=20)
    packed = pack_linear(base)
    words = -(-40 * bits // 32)  # no more than the bits fill
    assert packed["weight_packed"].shape == (3, words)
    assert packed["weight_packed"].dtype == np.int32 and packed["weight_packed"][0, 0] == word
    assert packed["weight_shape"].tolist() == [3, 40]
    assert packed["weight_scale"].shape == (3, 2) and "weight_zero_point" not in packed


def test_one_scale_of_a_whole_weight_is_written_out():
    codes = jnp.zeros((40, 3), jnp.uint8)
    base = Affine.from_codes(codes, jnp.full((1, 1), 0.5), None, bits=4, group_size=40)
    np.testing.assert_array_equal(pack_linear(base)["weight_scale"], np.full((3, 1), 0.5))


def test_zero_points_are_packed_along_the_output():
    zeros = jnp.zeros((2, 3), jnp.uint8).at[0, 1].set(2).at[1, 2].set(1)
    base = Affine.from_codes(jnp.zeros((32, 3), jnp.uint8), jnp.ones((2, 3)), zeros, bits=2,
                             group_size=16)  # fmt: skip
    assert pack_linear(base)["weight_zero_point"].tolist() == [[0b1000, 0b10000]]


@pytest.mark.parametrize(
    ("bits", "symmetric"), [(2, True), (3, True), (4, True), (7, True), (8, True), (3, False)]
)
def test_an_independent_reader_gives_the_weights(bits, symmetric, tmp_path):
    model = make_model((bits, bits), (0, 0), symmetric, num_key_value_heads=2)
    folder = export_model(model, tmp_path / "out", "compressed-tensors").folder
    leaf = model.params["blocks"][0]["mlp"]["down"]["kernel"]
    w = reader.read(folder, {})[f"{DOWN}.weight"]()
    np.testing.assert_array_equal(w, to_dense(leaf)[1].T)


def test_one_grid_is_one_group_for_every_linear(tmp_path):
    done = export_model(make_model(ranks=(0, 0)), tmp_path / "out", "compressed-tensors")
    said = read_config(done.folder)
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = said["config_groups"].values()
    assert group["targets"] == ["Linear"] and said["ignore"] == ["lm_head"]
    wanted = {"num_bits": 2, "type": "int", "symmetric": True, "strategy": "group",
              "group_size": 32}  # fmt: skip
    assert wanted.items() <= group["weights"].items() and not done.notes
    tensors = load_file(done.folder / "model.safetensors")
    assert f"{DOWN}.weight" not in tensors and tensors["lm_head.weight"].shape == (64, 32)
    # The model's dtype: transformers may unpack in the scales'.
    assert tensors[f"{DOWN}.weight_scale"].dtype == np.float32


def test_grids_and_dense_linears_may_mix(tmp_path):
    model = make_model((2, 3), (0, 0))
    dense = jnp.ones((1, 32, 32))
    first = set_at(model.params["blocks"][0], "attn/q/kernel", dense)
    blocks = (first, *model.params["blocks"][1:])
    model = replace(model, params={**model.params, "blocks": blocks})
    done = export_model(model, tmp_path / "out", "compressed-tensors")
    said = read_config(done.folder)
    groups = said["config_groups"].values()
    assert [len(group["targets"]) for group in groups] == [6, 7]
    assert [group["weights"]["num_bits"] for group in groups] == [2, 3]
    assert said["ignore"] == ["lm_head", "model.layers.0.self_attn.q_proj"]
    assert done.notes == (
        "codes that straddle words are read by compressed-tensors 0.18 and later",
    )
    found = reader.read(done.folder, {})
    assert (found["model.layers.0.self_attn.q_proj.weight"]() == 1).all()
    assert DOWN + ".weight" in found


def test_its_limits_are_said(tmp_path):
    done = export_model(make_model((2, 2), (0, 0), False), tmp_path / "out", "compressed-tensors")
    assert "asymmetric weights are for vLLM" in done.notes[0]
    for options, why in (
        ({}, "low-rank corrections, which compressed-tensors cannot hold; add --base-only"),
        ({"bits": (1, 1), "ranks": (0, 0)}, "1-bit codes which compressed-tensors cannot hold"),
    ):
        with pytest.raises(InputError, match=why):
            export_model(make_model(**options), tmp_path / "refused", "compressed-tensors")


def test_a_dense_model_is_refused(tmp_path):
    model = lqec.load(write_checkpoint(tmp_path / "m", num_hidden_layers=1))
    with pytest.raises(InputError, match="no weight is packed; export a dense model as hf"):
        export_model(model, tmp_path / "out", "compressed-tensors")


def load(folder, **options):
    """Returns what transformers makes of a folder, and torch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    if options.pop("dequantize", False):
        said = transformers.CompressedTensorsConfig(dequantize=True)
        options["quantization_config"] = said
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options), torch


def run(theirs, torch):
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # the libraries' own, of one another
@pytest.mark.parametrize(
    ("bits", "group_size"),
    [((2, 2), 16), ((3, 3), 16), ((4, 4), 16), ((8, 8), 16), ((2, 5), 16), ((3, 3), None)],
)
def test_transformers_gives_our_logits(bits, group_size, tmp_path):
    model = make_model(bits, (0, 0), group_size=group_size, num_key_value_heads=2)
    folder = export_model(model, tmp_path / "out", "compressed-tensors").folder
    ours = np.asarray(lqec.logits(model, TOKENS))
    assert np.abs(run(*load(folder)) - ours).max() <= 1e-4 < np.abs(ours).max()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bits", "dequantize"), [((2, 2), False), ((3, 3), True), ((2, 3), False)])
def test_with_an_adapter_beside_it_peft_gives_our_logits(bits, dequantize, tmp_path):
    peft = pytest.importorskip("peft")
    model = make_model(bits)
    base = export_model(model, tmp_path / "base", "compressed-tensors", base_only=True).folder
    adapter = export_model(model, tmp_path / "adapter", "peft", base=base).folder
    theirs, torch = load(base, dequantize=dequantize)
    if not dequantize:
        run(theirs, torch)
    logits = run(peft.PeftModel.from_pretrained(theirs, adapter), torch)
    assert np.abs(logits - np.asarray(lqec.logits(model, TOKENS))).max() <= 1e-4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_trained_model_rounded_by_us_is_the_same_in_transformers(bits, shared, tmp_path):
    tokens = np.random.RandomState(0).randint(0, 105, (4, 64))
    recipe = f"rtn(bits={bits}, group_size=32, symmetric=True)"
    model = lqec.compress(shared / "models" / "babyllama", recipe, tokens, seqlen=64, windows=4)
    folder = export_model(model, tmp_path / "out", "compressed-tensors").folder
    ours = np.asarray(lqec.logits(model, tokens))
    theirs, torch = load(folder)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(logits - ours).max() <= 1e-4 < np.abs(ours).max()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_transformers_still_refuses_asymmetric_weights(tmp_path):
    # What ASYMMETRIC tells the user; when this fails, tell them something better.
    folder = export_model(make_model((4, 4), (0, 0), False), tmp_path / "out", "compressed-tensors")
    with pytest.raises(RuntimeError, match="mismatched"):
        load(folder.folder)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_their_compressor_unpacks_our_asymmetric_weights(bits):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    leaf = make_model((bits, bits), (0, 0), False).params["blocks"][0]["mlp"]["down"]["kernel"]
    base = Affine(leaf.base.codes[0], leaf.base.scales[0].astype(jnp.float32), leaf.base.zeros[0],
                  bits, 32, 64)  # fmt: skip
    said = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=32)
    state = {n: torch.tensor(np.ascontiguousarray(a)) for n, a in pack_linear(base).items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=said)
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"].numpy()
    np.testing.assert_allclose(theirs, base.dense().T, atol=1e-6)
