"""Other people's Flax trees become our model: transformers-v4 checkpoints, plain linen trees."""

import json
from functools import partial

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io.sources.flax import (
    MSGPACK,
    MSGPACK_INDEX,
    from_flax,
    is_flax_checkpoint,
    read_msgpack,
)
from lqec_jax.runs.job import prepare
from tests.golden.tiny_checkpoint import RAW, SEQLEN, make_tokens, write_checkpoint
from tests.golden.tiny_weights import make_weights

CONFIG = {**RAW, "num_hidden_layers": 2, "attention_bias": True}
TOKENS = np.arange(32).reshape(2, 16)


def make_tree(raw=CONFIG) -> dict:
    """Returns what transformers 4 keeps of a Llama in Flax: kernels turned, names with slashes."""
    flat = {}
    for name, array in make_weights(raw, 0).items():
        module, _, last = name.replace(".", "/").rpartition("/")
        if last == "bias":
            flat[f"{module}/bias"] = array
        elif module.endswith("embed_tokens"):
            flat[f"{module}/embedding"] = array
        elif array.ndim == 2:
            flat[f"{module}/kernel"] = array.T
        else:
            flat[f"{module}/weight"] = array
    return unflatten_dict(flat, sep="/")


def write_flax(folder, tree, raw=CONFIG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / MSGPACK).write_bytes(flax.serialization.to_bytes(tree))
    return folder


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The same weights through safetensors."""
    folder = tmp_path_factory.mktemp("hf") / "m"
    return lqec.load(write_checkpoint(folder, num_hidden_layers=2, attention_bias=True))


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left, right))


def test_a_folder_of_transformers_4_is_loaded(wanted, tmp_path):
    folder = write_flax(tmp_path / "flax", make_tree())
    model = lqec.load(folder)
    assert equal(model.params, wanted.params) and model.config == wanted.config
    assert model.folder == folder and len(model.fingerprint) == 64
    # The layout of the checkpoint, not of the test: a name worked out by hand.
    flat = flatten_dict(make_tree(), sep="/")
    assert flat["model/layers/1/self_attn/k_proj/kernel"].shape == (32, 16)
    assert {"model/layers/0/input_layernorm/weight", "lm_head/kernel"} <= set(flat)
    np.testing.assert_array_equal(
        model.params["blocks"][0]["attn"]["k"]["kernel"][1],
        flat["model/layers/1/self_attn/k_proj/kernel"],
    )


def test_it_gives_transformers_logits():
    from tests.models.test_llama_logits import VARIANTS, golden

    model = from_flax(VARIANTS["gqa"], make_tree(VARIANTS["gqa"]))
    logits = np.asarray(lqec.logits(model, golden("tokens")))
    assert np.abs(logits - golden("gqa")).max() <= 1e-4


def test_shards_are_joined(wanted, tmp_path):
    flat = sorted(flatten_dict(make_tree(), sep="/").items())
    folder = write_flax(tmp_path / "flax", {})
    (folder / MSGPACK).unlink()
    index = {}
    for number, part in enumerate((flat[:9], flat[9:]), start=1):
        name = f"flax_model-0000{number}-of-00002.msgpack"
        tree = unflatten_dict(dict(part), sep="/")
        (folder / name).write_bytes(flax.serialization.to_bytes(tree))
        index |= {key: name for key, _ in part}
    (folder / MSGPACK_INDEX).write_text(json.dumps({"weight_map": index}))
    assert equal(lqec.load(folder).params, wanted.params)
    # In two shards: one value, or refused by name.
    for value, message in ((flat[0][1], None), (flat[0][1] + 1, "different values")):
        tree = unflatten_dict(dict(part) | {flat[0][0]: value}, sep="/")
        (folder / name).write_bytes(flax.serialization.to_bytes(tree))
        if message is None:
            assert equal(lqec.load(folder).params, wanted.params)
        else:
            with pytest.raises(InputError, match=f"{flat[0][0]}' lies in an earlier .*{message}"):
                lqec.load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match="00002-of-00002.msgpack missing"):
        lqec.load(folder)


@pytest.mark.parametrize("shards", [{}, 3, {"a": "../x.msgpack"}, {"a": 3}, {"a": "/x.msgpack"}])
def test_an_index_names_files_of_its_folder(tmp_path, shards):
    folder = write_flax(tmp_path / "flax", {})
    (folder / MSGPACK).unlink()
    (folder / MSGPACK_INDEX).write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match="wanted files in this folder"):
        lqec.load(folder)


def test_safetensors_are_read_rather(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    (folder / MSGPACK).write_bytes(b"not read")
    assert not is_flax_checkpoint(folder) and lqec.load(folder).config.layers == 5


def test_such_a_folder_is_compressed_like_any_other(wanted, tmp_path):
    folder = write_flax(tmp_path / "flax", make_tree())
    recipe, tokens = "rtn(bits=4, group_size=16)", make_tokens(4)
    job, like = (prepare(source, recipe, tokens, seqlen=SEQLEN) for source in (folder, wanted))
    assert equal(job.source.block(1), like.source.block(1)) and job.source.folder == folder
    assert job.fingerprint["calibration"] == like.fingerprint["calibration"]


class Cell(nn.Module):
    """Somebody's attention: heads as an axis of their own, kernels boxed with their axes."""

    @nn.compact
    def __call__(self, x):
        make = partial(nn.with_partitioning, nn.initializers.lecun_normal())
        for name in ("q_proj", "k_proj", "v_proj"):
            heads = 4 if name == "q_proj" else 2
            nn.DenseGeneral((heads, 8), name=name, kernel_init=make(("d", "h", None)))(x)
        mixed = jnp.zeros((*x.shape[:-1], 4, 8))
        return nn.DenseGeneral(
            32, axis=(-2, -1), name="o_proj", kernel_init=make(("h", None, "d"))
        )(mixed)


def test_a_plain_linen_tree_is_read(wanted):
    tree = make_tree()["model"]
    made = [Cell().init(jax.random.key(i), jnp.ones((1, 32)))["params"] for i in range(2)]
    layers = {f"layers_{i}": {**tree["layers"][str(i)], "self_attn": made[i]} for i in range(2)}
    for layer in layers.values():
        layer["input_layernorm"] = {"scale": layer["input_layernorm"]["weight"]}
    plain = {k: v for k, v in tree.items() if k != "layers"} | layers
    model = from_flax(CONFIG, {"params": {**plain, "lm_head": make_tree()["lm_head"]}})
    block = model.params["blocks"][0]
    kernel = made[1]["q_proj"]["kernel"].unbox()
    assert kernel.shape == (32, 4, 8)
    np.testing.assert_array_equal(block["attn"]["q"]["kernel"][1], kernel.reshape(32, 32))
    np.testing.assert_array_equal(
        block["attn"]["o"]["kernel"][0], made[0]["o_proj"]["kernel"].unbox().reshape(32, 32)
    )
    assert block["attn"]["k"]["bias"].shape == (2, 16)
    assert equal(block["mlp"], wanted.params["blocks"][0]["mlp"])


def test_other_names_are_renamed(wanted):
    tree = make_tree()
    tree["transformer"] = tree.pop("model")
    model = from_flax(CONFIG, tree, rename=lambda path: path.replace("transformer", "model"))
    assert equal(model.params, wanted.params)


def test_a_tied_head_may_be_there_again():
    raw = {**CONFIG, "tie_word_embeddings": True}
    tree = make_tree(raw)
    tree["lm_head"] = {"kernel": tree["model"]["embed_tokens"]["embedding"].T}
    assert "head" not in from_flax(raw, tree).params
    tree["lm_head"]["kernel"] = tree["lm_head"]["kernel"] + 1
    with pytest.raises(InputError, match="differs from the embedding"):
        from_flax(raw, tree)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("model/norm/weight", None, "'norm/weight' is missing for a llama of 2 layers"),
        ("model/norm/other", np.ones(3), "1 arrays that a llama of 2 layers does not have: norm/"),
        ("model/norm/weight", np.ones(8), r"'norm/weight' is \[8\], config.json asks for \[32\]"),
        ("model/norm/weight", np.ones(32, np.int32), "is int32, wanted floating"),
        ("model/norm/weight", np.full(32, np.inf, np.float32), "holds NaN or Inf"),
    ],
)
def test_what_does_not_fit_is_named(path, value, why):
    flat = flatten_dict(make_tree(), sep="/")
    flat[path] = value
    tree = unflatten_dict({k: v for k, v in flat.items() if v is not None}, sep="/")
    with pytest.raises(InputError, match=why) as said:
        from_flax(CONFIG, tree)
    assert "\n" not in str(said.value)


def test_msgpack_is_read_by_path(tmp_path):
    tree = {"model": {"a": np.ones((2, 3), np.float32)}, "b": jnp.ones(2, jnp.bfloat16)}
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(flax.serialization.to_bytes(tree))
    found = read_msgpack(path)
    assert {name: (a.shape, str(a.dtype)) for name, a in found.items()} == {
        "model/a": ((2, 3), "float32"),
        "b": ((2,), "bfloat16"),
    }


def test_damaged_msgpack_is_named(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    whole = flax.serialization.to_bytes({"a": np.ones(100)})
    for damaged in (whole[:200], b"\xc1\xc1", b"", json.dumps({}).encode(),
                    flax.serialization.to_bytes(np.ones(3))):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="flax_model.msgpack") as said:
            read_msgpack(path)
        assert "\n" not in str(said.value)
