"""Artifacts: equal bytes after reading and writing again, and no folder that is half of two."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import set_at
from lqec_jax.errors import InputError
from lqec_jax.io import tensor_file
from lqec_jax.io.artifact import artifact
from lqec_jax.io.artifact.artifact import (
    META,
    REPORT,
    is_artifact,
    load_artifact,
    save_artifact,
)
from lqec_jax.io.tensor_file import INDEX, SINGLE, read_header
from lqec_jax.models.families import family, read_config
from lqec_jax.models.model import Model
from lqec_kernels.formats import Affine, CompressedLinear, LowRank
from tests.golden import tiny_checkpoint
from tests.golden.tiny_checkpoint import hash_folder

RAW = {**tiny_checkpoint.RAW, "num_hidden_layers": 3, "num_key_value_heads": 4,
       "tie_word_embeddings": True}  # fmt: skip
CONFIG = read_config(RAW)
PAGES = {"page.html": "<p>", "README.md": "# é\n"}
TOKENS = np.arange(16).reshape(1, 16)


@pytest.fixture(scope="module")
def model():
    """Two blocks of 2 bits and one of 3: two segments in memory."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((CONFIG.vocab_size, CONFIG.d_model)).astype(np.float32)
    params = {
        "embed": {"embedding": embedding},
        "blocks": (make_segment(rng, 2, 2), make_segment(rng, 1, 3)),
        "norm": {"scale": np.ones(CONFIG.d_model, np.float32)},
    }
    report = {"seed": 5, "environment": {"versions": {"jax": "1"}}, "stages": [{"ppl": 2.5}]}
    return Model(CONFIG, jax.tree.map(jnp.asarray, params), RAW, recipe="rtn(bits=2)",
                 report=report, fingerprint="abc")  # fmt: skip


def make_segment(rng, layers, bits):
    """Returns random blocks; every pattern of bits is a code, so words are drawn as they are."""
    segment = {}
    for path, shape in family("llama").block_shapes(CONFIG).items():
        value = np.ones((layers, *shape), np.float32)
        if path.endswith("/kernel"):
            d_in, d_out = shape
            words = rng.integers(0, 2**32, (layers, d_in // 32 * bits, d_out), np.uint32)
            zeros = rng.integers(0, 2**32, (layers, d_in // 32, d_out // 32 * bits), np.uint32)
            scales = rng.uniform(0.01, 0.1, (layers, d_in // 32, d_out)).astype(np.float16)
            factors = (rng.standard_normal((layers, size, 2)) / 9 for size in shape)
            a, b = (factor.astype(np.float16) for factor in factors)
            base = Affine(words, scales, zeros, bits, 32, d_in)
            value = CompressedLinear(base, (LowRank(a, b.swapaxes(1, 2).copy()),))
        segment = set_at(segment, path, value)
    return segment


@pytest.fixture
def folder(model, tmp_path):
    return save_artifact(model, tmp_path / "out", PAGES)


def refusal(call, *arguments, **named):
    """Returns the one line of a refusal."""
    with pytest.raises(InputError) as said:
        call(*arguments, **named)
    assert "\n" not in str(said.value)
    return str(said.value)


def edit(folder, name, change):
    """Rewrites a JSON file of a folder; `change` alters it in place."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def test_reading_and_writing_again_gives_the_same_bytes_and_logits(model, folder, tmp_path):
    assert is_artifact(folder)
    came = load_artifact(folder)
    assert jax.tree.structure(came.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(came.params), jax.tree.leaves(model.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    save_artifact(came, tmp_path / "deeper" / "again", PAGES)
    assert hash_folder(tmp_path / "deeper" / "again") == hash_folder(folder)
    assert set(hash_folder(folder)) == {"config.json", META, REPORT, SINGLE, *PAGES}
    assert {name: (folder / name).read_text("utf-8") for name in PAGES} == PAGES
    np.testing.assert_array_equal(lqec.logits(came, TOKENS), lqec.logits(model, TOKENS))


def test_everything_a_model_knows_of_itself_comes_back(model, folder):
    came = load_artifact(folder)
    for name in ("config", "raw_config", "recipe", "report", "fingerprint"):
        assert getattr(came, name) == getattr(model, name), name
    assert came.folder == folder and came.tokenizer is None
    meta = json.loads((folder / META).read_text())
    assert (meta["format_version"], meta["seed"], meta["versions"]) == (1, 5, {"jax": "1"})
    assert len(meta["weights"]) == 3 * 7
    assert meta["weights"]["blocks/2/attn/q"]["base"]["bits"] == 3


def test_codes_stay_packed_on_disk(model, folder):
    entries = read_header(folder / SINGLE)
    stored = sum(entry.bytes for entry in entries.values())
    assert stored == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert entries["blocks.0.attn.q.base.codes"].shape == (2, 32)
    assert entries["blocks.2.attn.q.base.codes"].shape == (3, 32)


def test_large_weights_are_cut_into_shards_with_an_index(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SHARD_BYTES", 6000)
    sharded = save_artifact(model, tmp_path / "sharded", PAGES)
    assert not (sharded / SINGLE).exists()
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    count = len(shards)
    assert count > 3
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    sizes = [
        {name: entry.bytes for name, entry in read_header(sharded / shard).items()}
        for shard in shards
    ]
    assert all(len(shard) == 1 or sum(shard.values()) <= 6000 for shard in sizes)
    for shard, following in zip(sizes, sizes[1:], strict=False):
        assert sum(shard.values()) + following[min(following)] > 6000  # none is cut early
    held = {name: file for file, shard in zip(shards, sizes, strict=True) for name in shard}
    assert held == index
    assert set(index) == set(read_header(folder / SINGLE))
    came = load_artifact(sharded)
    for a, b in zip(jax.tree.leaves(came.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert hash_folder(save_artifact(came, tmp_path / "again", PAGES)) == hash_folder(sharded)


def test_the_tokenizers_files_are_copied_as_they_are(model, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_bytes(b'{"a":\r\n1}')
    files = [source / "tokenizer_config.json"]
    named = Model(CONFIG, model.params, RAW, SimpleNamespace(files=lambda: files))
    folder = save_artifact(named, tmp_path / "out", PAGES)
    assert (folder / "tokenizer_config.json").read_bytes() == files[0].read_bytes()


def test_an_artifact_is_not_replaced_unasked(model, folder):
    before = hash_folder(folder.parent)
    other = Model(CONFIG, model.params, RAW, recipe="other")
    assert "--overwrite" in refusal(save_artifact, other, folder, PAGES)
    assert hash_folder(folder.parent) == before
    save_artifact(other, folder, PAGES, overwrite=True)
    assert load_artifact(folder).recipe == "other"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_what_is_no_artifact_is_never_replaced(model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("kept")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = hash_folder(tmp_path)
    for name in ("home", "file", "dangling"):
        said = refusal(save_artifact, model, tmp_path / name, PAGES, overwrite=True)
        assert "exists and is no lqec artifact" in said
    assert "is no folder that you may write to" in refusal(
        save_artifact, model, tmp_path / "file" / "out", PAGES
    )
    assert hash_folder(tmp_path) == before


def test_a_failure_while_writing_leaves_the_old_folder_and_nothing_else(model, folder, monkeypatch):
    def fail(path, value):
        raise OSError("no space left")

    before = hash_folder(folder.parent)
    monkeypatch.setattr(artifact, "write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        save_artifact(model, folder, PAGES, overwrite=True)
    assert hash_folder(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def forget_layer(raw):
    raw["num_hidden_layers"] -= 1


def invent_layer(raw):
    raw["num_hidden_layers"] += 1


def widen(raw):
    raw["intermediate_size"] *= 2


CHANGES = {
    "another format": (
        META,
        lambda m: m.update(format_version=2),
        "format_version 2; this version reads 1",
    ),
    "no format": (META, lambda m: m.pop("format_version"), "format_version None"),
    "no recipe": (META, lambda m: m.pop("recipe"), "recipe is missing or damaged"),
    "weights no object": (META, lambda m: m.update(weights=[]), "weights is missing or damaged"),
    "a weight not described": (
        META,
        lambda m: m["weights"].pop("blocks/0/attn/q"),
        "do not belong together",
    ),
    "a weight not stored": (
        META,
        lambda m: m["weights"].update({"blocks/3/attn/q": m["weights"]["blocks/0/attn/q"]}),
        "blocks.3.attn.q.base.codes is missing from the weights",
    ),
    "other bits": (
        META,
        lambda m: m["weights"]["blocks/0/mlp/down"]["base"].update(bits=4),
        "do not belong together",
    ),
    "bits beyond any": (
        META,
        lambda m: m["weights"]["blocks/0/mlp/down"]["base"].update(bits=2**31),
        "do not belong together",
    ),
    "an unknown operator": (
        META,
        lambda m: m["weights"]["blocks/0/attn/q"]["base"].update(format="trellis"),
        "format 'trellis' is not known",
    ),
    "a static field gone": (
        META,
        lambda m: m["weights"]["blocks/0/attn/q"]["base"].pop("bits"),
        "do not belong together",
    ),
    "a block too many": ("config.json", forget_layer, "there are blocks 2 more"),
    "a block too few": ("config.json", invent_layer, "do not belong together"),
    "another width": ("config.json", widen, "mlp/gate/kernel is [32, 64], not [32, 128]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files_that_do_not_belong_together_are_refused(folder, name):
    file, change, wanted = CHANGES[name]
    edit(folder, file, change)
    assert wanted in refusal(load_artifact, folder)


@pytest.mark.parametrize("file", [SINGLE, META, "config.json", REPORT])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused_by_name(folder, file, share):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(share * len(whole))])
    assert file in refusal(load_artifact, folder)


@pytest.mark.parametrize("file", [SINGLE, META, "config.json"])
def test_a_file_that_is_gone_is_refused_by_name(folder, file):
    (folder / file).unlink()
    assert file in refusal(load_artifact, folder)
