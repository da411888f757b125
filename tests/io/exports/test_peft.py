"""The adapter export: names, ranks, and the base that it belongs to."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.peft import CONFIG, WEIGHTS, _expand, make_config
from lqec_kernels.formats import LowRank
from tests.io.packed_models import make_model

PREFIX = "base_model.model.model.layers"
WORDS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TOKENS = np.arange(32).reshape(2, 16)


def export(model, out, **options):
    done = export_model(model, out, "peft", **options)
    config = json.loads((done.folder / CONFIG).read_text())
    return done, config, load_file(done.folder / WEIGHTS)


def test_factors_are_transposed_and_alpha_is_the_rank(tmp_path):
    model = make_model()
    done, config, tensors = export(model, tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)
    assert config["target_modules"] == WORDS and config["rank_pattern"] == {}
    assert len(tensors) == 2 * 7 * 2
    (correction,) = model.params["blocks"][0]["mlp"]["down"]["kernel"].corrections
    name = f"{PREFIX}.1.mlp.down_proj.lora_{{}}.weight"
    np.testing.assert_array_equal(tensors[name.format("A")], correction.a[1].T)
    np.testing.assert_array_equal(tensors[name.format("B")], correction.b[1].T)
    assert tensors[name.format("A")].shape == (2, 64) and "--base-only" in done.notes[0]


def test_ranks_may_differ_by_layer(tmp_path):
    _, config, tensors = export(make_model((2, 2), (3, 1)), tmp_path / "out")
    assert config["r"] == 3 and len(config["rank_pattern"]) == 7
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["rank_pattern"][r"model\.layers\.1\.self_attn\.q_proj"] == 1
    assert tensors[f"{PREFIX}.1.self_attn.q_proj.lora_B.weight"].shape == (32, 1)


def test_where_some_linears_have_none_targets_are_full_names(tmp_path):
    _, config, _ = export(make_model((2, 2), (2, 0)), tmp_path / "out")
    assert len(config["target_modules"]) == 7
    assert config["target_modules"][0] == "model.layers.0.mlp.down_proj"


def test_the_usual_rank_is_the_default():
    config = make_config({"a.q": 4, "b.q": 2, "c.q": 2}, ["a.q", "b.q", "c.q"], "base")
    assert config["r"] == config["lora_alpha"] == 2 and config["rank_pattern"] == {r"a\.q": 4}
    assert config["base_model_name_or_path"] == "base" and config["target_modules"] == ["q"]


@pytest.mark.parametrize(("pool", "dtype"), [(1, np.float16), (16, np.float16), (6, np.float32)])
def test_pooled_factors_are_written_out_and_none_is_rounded(pool, dtype):
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(s).astype(np.float16) for s in ((96 // pool, 2), (2, 8)))
    whole_a, whole_b = _expand(LowRank(a, b, pool))
    assert (whole_a.dtype, whole_b.dtype) == (dtype, np.float16)
    wanted = np.repeat(a.astype(np.float32) / np.float32(pool), pool, axis=0)
    np.testing.assert_array_equal(whole_a, wanted)
    np.testing.assert_array_equal(whole_b, b)


def test_its_base_is_checked_and_named(tmp_path):
    model, other = make_model(), make_model(symmetric=False)
    for name, source, base_only in (("base", model, True), ("other", other, True),
                                    ("folded", model, False)):  # fmt: skip
        export_model(source, tmp_path / name, "hf", base_only=base_only)
    _, config, _ = export(model, tmp_path / "out", base=tmp_path / "base")
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    for name, why in (("other", "from another base"), ("folded", "has the adapters folded in"),
                      ("nothing", "no lqec_export.json")):  # fmt: skip
        with pytest.raises(InputError, match=why):
            export(model, tmp_path / "refused", base=tmp_path / name)


def test_a_base_in_compressed_tensors_comes_with_advice(tmp_path):
    export_model(make_model(), tmp_path / "base", "compressed-tensors", base_only=True)
    done, _, _ = export(make_model(), tmp_path / "out", base=tmp_path / "base")
    assert "dequantize=True" in done.notes[0]


def test_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(InputError, match="no low-rank corrections for peft"):
        export(make_model(ranks=(0, 0)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # two libraries' own, of one another
@pytest.mark.parametrize("ranks", [(2, 2), (3, 1), (2, 0)])
def test_transformers_and_peft_give_our_logits(ranks, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = make_model(ranks=ranks)
    base = export_model(model, tmp_path / "base", "hf", base_only=True).folder
    adapter = export_model(model, tmp_path / "adapter", "peft", base=base).folder
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    ours = np.asarray(lqec.logits(model, TOKENS))
    assert np.abs(logits - ours).max() <= 1e-4 < np.abs(ours).max()
