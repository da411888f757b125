"""Every family in every format: what is its own (biases, norms, positions) comes back too."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lqec_jax as lqec
from lqec_jax.core.tree import (
    drop_corrections,
    each_block,
    get_at,
    is_compressed,
    set_at,
    stack_blocks,
)
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.verify import verify
from lqec_jax.io.verify.verify import verify_export
from lqec_jax.models.families import FAMILIES, family
from lqec_jax.recipe import parse_recipe
from tests.golden.make_family_logits import draw_weights
from tests.io.verify.test_verify import accept
from tests.test_family_compression import NAMES as VARIED
from tests.test_family_compression import write

# One object, and every linear is [32, 32]: a step is one program for all families.
RECIPE = parse_recipe("rtn(bits=4, group_size=16, symmetric=True) | svd(rank=2)")
NAMES = {name.partition("/")[0]: name for name in VARIED}
TOKENS = np.arange(32).reshape(2, 16)  # twice the windows of attention
# A weight of each, where it can be one that Llama has not: as stored, and by our path.
OWN = {
    "mistral": ("model.layers.1.mlp.gate_proj", "blocks/1/mlp/gate/kernel"),
    "qwen2": ("model.layers.1.self_attn.k_proj.bias", "blocks/1/attn/k/bias"),
    "qwen3": ("model.layers.1.self_attn.q_norm.weight", "blocks/1/attn/q_norm/scale"),
    "opt": ("model.decoder.embed_positions.weight", "embed/positions"),
    "gemma2": ("model.layers.2.pre_feedforward_layernorm.weight", "blocks/2/mlp_norm/scale"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> a model whose linears are packed and have adapters."""
    return {name: make_model(tmp_path_factory.mktemp(name), NAMES[name]) for name in NAMES}


def make_model(folder, name):
    dense = lqec.load(write(folder / "model", name))
    tensors = family(dense.config.family).block_tensors(dense.config)
    linears = [path for path, stored in tensors.items() if stored.transposed]
    blocks = []
    for block in each_block(dense.params):
        for path in linears:
            block = set_at(block, path, lqec.quantize(get_at(block, path), RECIPE))
        blocks.append(block)
    params = {**dense.params, "blocks": stack_blocks(blocks)}
    return replace(dense, params=params, recipe=str(RECIPE), folder=None)


@pytest.fixture
def weights_only(monkeypatch):
    """Lets verify compare weights alone: a program for each family's block takes a second."""
    monkeypatch.setattr(verify, "_jitted", lambda fns: (lambda block, h: h, lambda params, h: h))


def test_every_family_beside_llama_is_here():
    assert set(NAMES) | {"llama"} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_back_every_weight(name, models, tmp_path, weights_only):
    model = models[name]
    count = len(draw_weights(model.raw_config, seed=0))
    for format, options in (
        ("hf", {}),
        ("hf", {"base_only": True}),
        ("compressed-tensors", {"base_only": True}),
        ("gptq", {"base_only": True}),
        ("peft", {"base": tmp_path / "hf-base_only"}),
        ("flax", {}),
        ("flax", {"dense": True}),
    ):
        folder = tmp_path / "-".join([format, *options])
        export_model(model, folder, format, **options)
        found = verify_export(folder, model)
        assert (found.format, found.weights) == (format, count)
        assert found.weight_difference < 1e-6
    packed = load_file(tmp_path / "compressed-tensors-base_only" / "model.safetensors")
    linears = [key for key in packed if key.endswith("weight_packed")]
    assert len(linears) == sum(
        leaf.base.codes.shape[0] for leaf in jax.tree.leaves(model.params, is_leaf=is_compressed)
        if is_compressed(leaf)
    )  # fmt: skip


@pytest.fixture(scope="module")
def ours(models):
    """family -> logits of its packed model; programs compiled in a hurry."""
    flag = "jax_disable_most_optimizations"
    before = jax.config.values[flag]
    jax.config.update(flag, True)
    yield {name: np.asarray(lqec.logits(model, TOKENS)) for name, model in models.items()}
    jax.config.update(flag, before)
    jax.clear_caches()


@pytest.mark.parametrize("name", ["opt", "gemma2"])  # the least like a Llama
def test_the_dense_export_gives_the_models_logits(name, models, ours, tmp_path):
    folder = export_model(models[name], tmp_path / "out", "hf").folder
    logits = np.asarray(lqec.logits(lqec.load(folder), TOKENS))
    assert np.abs(logits - ours[name]).max() <= 1e-4 < 1 < np.abs(logits).max()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # two libraries' own, of one another
@pytest.mark.parametrize("name", NAMES)
def test_transformers_and_peft_give_our_logits(name, models, ours, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = export_model(models[name], tmp_path / "base", "hf", base_only=True).folder
    adapter = export_model(models[name], tmp_path / "adapter", "peft", base=base).folder
    # The others leave out Gemma 2's softcap of attention.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(logits - ours[name]).max() <= 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_change_to_what_a_family_has_of_its_own_is_found(name, models, tmp_path, weights_only):
    key, path = OWN[name]
    base = export_model(models[name], tmp_path / "out", "compressed-tensors", base_only=True)
    file = base.folder / "model.safetensors"
    tensors = load_file(file)
    key = key if key in tensors else f"{key}.weight_scale"
    save_file(tensors | {key: tensors[key] * np.float32(1.5)}, file, {"format": "pt"})
    accept(base.folder)
    with pytest.raises(CheckFailed, match=f"{path} differs by"):
        verify_export(base.folder, models[name])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_format_cannot_hold_is_refused_in_a_line_and_leaves_nothing(name, models, tmp_path):
    bare = replace(models[name], params=drop_corrections(models[name].params))
    for model, format, why in (
        (models[name], "gptq", "low-rank corrections, which gptq cannot hold; add --base-only"),
        (models[name], "compressed-tensors", "which compressed-tensors cannot hold"),
        (bare, "peft", "no low-rank corrections for peft"),
    ):
        with pytest.raises(InputError, match=why) as said:
            export_model(model, tmp_path / "out", format)
        assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []
