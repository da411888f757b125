"""Verify accepts what was exported, and nothing that differs in a bit, a weight or a name."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lqec_jax as lqec
from lqec_jax.core.tree import is_compressed, set_at
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.record import RECORD, hash_file
from lqec_jax.io.verify.verify import verify_export
from lqec_kernels.inputs import InputGrid
from tests.io.packed_models import make_model

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"
FORMATS = [
    ("hf", {}),
    ("hf", {"base_only": True}),
    ("hf", {"dtype": "bfloat16"}),
    ("hf", {"dtype": "float16"}),
    ("peft", {}),
    ("peft", {"dtype": "bfloat16"}),
    ("gptq", {"base_only": True}),
    ("gptq", {"base_only": True, "gptq_version": 2, "dtype": "bfloat16"}),
    ("compressed-tensors", {"base_only": True}),
    ("flax", {}),
    ("flax", {"dense": True}),
    ("flax", {"dtype": "float16"}),
]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def other():
    """The same but for one adapter's one number."""
    model = make_model()
    grown = jax.tree.map(lambda a: a, model.params)
    leaf = grown["blocks"][0]["attn"]["o"]["kernel"]
    (low,) = leaf.corrections
    leaf = replace(leaf, corrections=(replace(low, a=low.a.at[1, 0, 0].add(0.5)),))
    block = set_at(grown["blocks"][0], "attn/o/kernel", leaf)
    return replace(model, params={**grown, "blocks": (block,)})


def accept(folder):
    """Makes the record agree with the files as they are now."""
    record = json.loads((folder / RECORD).read_text())
    record["files"] = {name: hash_file(folder / name) for name in record["files"]}
    (folder / RECORD).write_text(json.dumps(record))


def failure(folder, model):
    with pytest.raises(CheckFailed) as said:
        verify_export(folder, model)
    line = str(said.value)
    assert "\n" not in line and line.startswith(str(folder)) and line.endswith("export it again")
    return line


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_an_export_is_accepted(format, options, model, tmp_path):
    done = export_model(model, tmp_path / "out", format, **options)
    found = verify_export(done.folder, model)
    assert (found.format, found.weights) == (format, 3 + 2 * 9)
    assert found.largest_logit > 1
    if options.get("dtype") is None:
        assert found.weight_difference < 1e-6 and found.logit_difference < 1e-4
    else:
        assert 1e-5 < found.weight_difference < 0.02 and found.logit_difference < 0.5


@pytest.mark.parametrize("format", ["hf", "gptq", "compressed-tensors", "flax", "peft"])
def test_a_flipped_bit_is_found(format, model, tmp_path):
    """A bit of a weight: with the hash that tells, then with a hash that was made to agree."""
    name = "adapter_model.safetensors" if format == "peft" else WEIGHTS
    base_only = format in ("gptq", "compressed-tensors")
    folder = export_model(model, tmp_path / "out", format, base_only=base_only).folder
    tensors = load_file(folder / name)
    key = next(k for k in sorted(tensors, reverse=True)
               if k.endswith(("up_proj.weight", "up_proj.qweight", "up_proj.weight_packed",
                              "up/base/codes", "up_proj.lora_B.weight")))  # fmt: skip
    array = np.ascontiguousarray(tensors[key])
    array.view(np.uint8).reshape(-1)[5] ^= 1 << 5
    save_file(tensors | {key: array}, folder / name, {"format": "pt"})
    assert f"{name} is not the file that was exported" in failure(folder, model)
    accept(folder)
    line = failure(folder, model)
    assert "/mlp/up/kernel differs by" in line


def test_the_lowest_bit_is_found_by_the_hash(model, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-4] ^= 1  # the last bit of a float32
    (folder / WEIGHTS).write_bytes(raw)
    assert "sha256 differs" in failure(folder, model)


def test_another_model_is_told_by_its_weights(model, other, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    line = failure(folder, other)
    assert "blocks/1/attn/o/kernel differs by" in line and "logits differ" in line
    # Its base is the same, so an export of the base alone stands for both.
    base = export_model(model, tmp_path / "base", "hf", base_only=True).folder
    assert verify_export(base, other).weight_difference < 1e-6


def test_another_base_is_told_by_its_hash(model, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    assert "exported from another model" in failure(folder, make_model(symmetric=False))


def test_an_adapter_is_checked_on_the_base_it_names(model, tmp_path):
    base = export_model(model, tmp_path / "base", "gptq", base_only=True).folder
    folder = export_model(model, tmp_path / "adapter", "peft", base=base).folder
    assert verify_export(folder, model).weight_difference < 1e-6
    tensors = load_file(base / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.scales"
    save_file(tensors | {name: tensors[name] * 2}, base / WEIGHTS, {"format": "pt"})
    assert "blocks/0/mlp/up/kernel differs by" in failure(folder, model)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop(NORM), "norm/scale is missing"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "1 tensors of no weight: extra"),
        (lambda t: t.update({NORM: np.ones(8, np.float32)}), "is [8], not [32]"),
        (lambda t: t.update({NORM: np.full(32, np.nan, np.float32)}), "differs by nan"),
    ],
)
def test_what_a_folder_holds_is_compared(change, why, model, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    accept(folder)
    assert why in failure(folder, model)


def test_a_file_cut_short_is_a_failed_check(model, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000])
    line = failure(folder, model)
    assert "sha256 differs" in line and "it cannot be read back" in line


def test_a_config_of_another_model_is_found(model, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 0.1}))
    accept(folder)
    assert "config.json describes another model" in failure(folder, model)


def test_the_model_is_the_one_the_export_names(model, other, tmp_path):
    artifact = lqec.save(model, tmp_path / "artifact")
    lqec.export(artifact, tmp_path / "out", "hf")
    assert lqec.verify(tmp_path / "out").logit_difference < 1e-4
    with pytest.raises(CheckFailed):
        lqec.verify(tmp_path / "out", other)
    lqec.export(model, tmp_path / "memory", "hf")
    with pytest.raises(InputError, match="exported from memory; give the model"):
        lqec.verify(tmp_path / "memory")
    assert lqec.verify(tmp_path / "memory", artifact).weights == 21


def test_how_inputs_are_rounded_is_compared_where_an_export_says_it(model, tmp_path):
    def rounded(bits):
        round_inputs = lambda node: replace(node, input_grid=InputGrid("int", bits, "token"))  # noqa: E731
        params = jax.tree.map(
            lambda node: round_inputs(node) if is_compressed(node) else node,
            model.params, is_leaf=is_compressed,
        )  # fmt: skip
        return replace(model, params=params)

    eight = rounded(8)
    packed = export_model(eight, tmp_path / "packed", "flax").folder
    assert verify_export(packed, eight).logit_difference < 1e-4
    wanted = (
        "blocks/0/attn/k/kernel rounds its inputs by {'kind': 'int', 'bits': 8, 'per': 'token'}"
    )
    assert f"{wanted}, not None" in failure(packed, model)
    assert wanted in failure(packed, rounded(4))
    for format, options in (("flax", {"dense": True}), ("hf", {})):
        exact = export_model(eight, tmp_path / format, format, **options).folder
        assert verify_export(exact, eight).logit_difference < 1e-4
