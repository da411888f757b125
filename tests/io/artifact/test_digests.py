"""An artifact knows its bytes: what is changed in it is named, unless nobody wants to know."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

import lqec_jax as lqec
from lqec_jax.core.hashing import hash_arrays
from lqec_jax.core.tree import equal_trees
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.io.artifact import digests
from lqec_jax.io.artifact.artifact import load_artifact, save_artifact
from lqec_jax.io.artifact.digests import META, Hashing, choose_check
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.sources.tokenizer import Tokenizer
from lqec_jax.io.tensor_file import SINGLE, read_header
from tests.io.packed_models import make_model

SCALES, CODES = "blocks.0.attn.q.base.scales", "blocks.0.attn.q.base.codes"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An artifact with a tokenizer of two words."""
    folder = tmp_path_factory.mktemp("digests")
    (folder / "source").mkdir()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.save(str(folder / "source" / "tokenizer.json"))
    model = replace(make_model(), tokenizer=Tokenizer.load(folder / "source"))
    return save_artifact(model, folder / "out", {"README.md": "# card\n"})


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "out")


def edit_json(name, change):
    def spoil(folder):
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return spoil


def edit_arrays(change):
    def spoil(folder):
        arrays = load_file(folder / SINGLE)
        change(arrays)
        save_file(arrays, folder / SINGLE, {"format": "lqec"})

    return spoil


def flip(arrays):
    arrays[CODES].reshape(-1)[3] ^= 1 << 7


def swap(arrays):
    one, other = CODES, CODES.replace(".q.", ".k.")
    arrays[one], arrays[other] = arrays[other], arrays[one]


def reread_scales(arrays):
    arrays[SCALES] = arrays[SCALES].view(np.int16)


def drop_correction(folder):
    """Takes an adapter out of the weights and out of lqec.json, which then agree."""
    edit_json(META, lambda m: m["weights"]["blocks/0/attn/q"].update(corrections=[]))(folder)

    def drop(arrays):
        for factor in "ab":
            del arrays[f"blocks.0.attn.q.corrections.0.{factor}"]

    edit_arrays(drop)(folder)


# What is done to an artifact -> what names it, and whether that needs the weights to be hashed.
CHANGES = {
    "a bit of a code": (edit_arrays(flip), "1 tensor is not as written", True),
    "names swapped": (edit_arrays(swap), "2 tensors are not as written", True),
    "another dtype": (edit_arrays(reread_scales), f"1 tensor is not as written: '{SCALES}'", True),
    "a scale is NaN": (
        edit_arrays(lambda a: a[SCALES].reshape(-1).__setitem__(0, np.nan)),
        f"'{SCALES}' holds 1 non-finite",
        False,
    ),
    "a factor is Inf": (
        edit_arrays(lambda a: a[SCALES].reshape(-1).__setitem__(0, np.inf)),
        f"'{SCALES}' holds 1 non-finite",
        False,
    ),
    "rope_theta": (
        edit_json("config.json", lambda c: c.update(rope_theta=1e6)),
        "config.json is not as written",
        False,
    ),
    "a correction dropped": (drop_correction, "lqec.json was edited; 2 tensors missing", False),
    "a correction not described": (
        edit_json(META, lambda m: m["weights"]["blocks/0/attn/q"].update(corrections=[])),
        "attn/q/corrections/0/a is no weight of this model",
        False,
    ),
    "another recipe": (
        edit_json(META, lambda m: m.update(recipe="rtn(bits=8)")),
        "lqec.json was edited",
        False,
    ),
    "another tokenizer": (
        edit_json("tokenizer.json", lambda t: t["model"]["vocab"].update(a=1, b=0)),
        "tokenizer.json is not as written",
        False,
    ),
    "a template added": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "chat_template.jinja was not there when it was written",
        False,
    ),
    "a tokenizer gone": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer.json is missing",
        False,
    ),
    "digests damaged": (
        edit_json(META, lambda m: m.update(digests=3)),
        "digests are damaged",
        False,
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_named(folder, name):
    change, named, in_weights = CHANGES[name]
    change(folder)
    for check in ("auto", "full", *(() if in_weights else ("fast",))):
        with pytest.raises(InputError) as said:
            load_artifact(folder, check=check)
        assert named in str(said.value) and str(folder) in str(said.value)
        assert "\n" not in str(said.value)
    with pytest.raises(CheckFailed) as said:
        lqec.verify(folder)
    assert named in str(said.value)


def test_every_flipped_bit_is_noticed(folder):
    """A bit of each of some hundred bytes of the weights' file, lqec.json and config.json."""
    rng = np.random.default_rng(0)
    for name, count in ((SINGLE, 60), (META, 40), ("config.json", 10), ("tokenizer.json", 10)):
        whole = (folder / name).read_bytes()
        header = 3000 if name == SINGLE else 1
        places = {*rng.integers(0, len(whole), count), *rng.integers(0, header, count // 2)}
        for place in places:
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(spoiled)
            with pytest.raises((CheckFailed, InputError)):
                lqec.verify(folder)
        (folder / name).write_bytes(whole)
    assert lqec.verify(folder).tensors == len(read_header(folder / SINGLE))


def test_what_is_not_checked_is_taken_as_it_is(folder):
    edit_arrays(flip)(folder)
    edit_json("config.json", lambda c: c.update(rope_theta=1e6))(folder)
    came = load_artifact(folder, check="none")
    assert came.raw_config["rope_theta"] == 1e6
    # Saved again, it is another artifact, whose bytes are its own.
    again = save_artifact(came, folder.parent / "again", {})
    assert load_artifact(again, check="full").raw_config == came.raw_config


def test_fast_reads_no_weight_to_hash_it(folder, monkeypatch):
    edit_arrays(flip)(folder)
    with pytest.raises(InputError, match="not as written"):
        load_artifact(folder)
    taken = load_artifact(folder, check="none").params
    assert equal_trees(load_artifact(folder, check="fast").params, taken)
    monkeypatch.setattr(digests, "FULL_BYTES", 0)
    assert equal_trees(load_artifact(folder).params, taken)


def test_auto_is_full_up_to_a_size(written, monkeypatch):
    checkpoint = Checkpoint.open(written)
    size = sum(entry.bytes for entry in checkpoint.entries.values())
    for limit, wanted in ((size, "full"), (size - 1, "fast")):
        monkeypatch.setattr(digests, "FULL_BYTES", limit)
        assert choose_check("auto", checkpoint) == wanted
    with pytest.raises(InputError, match="check='some'; one of auto, full, fast, none"):
        choose_check("some", checkpoint)
    with pytest.raises(InputError, match="check='some'"):
        lqec.load(written, check="some")


def test_an_artifact_that_is_older_than_digests_loads_and_says_so(folder, caplog):
    edit_json(META, lambda m: m.pop("digests"))(folder)
    with caplog.at_level(logging.WARNING):
        load_artifact(folder)
    (line,) = caplog.messages
    assert f"{folder}/lqec.json has no digests" in line
    caplog.clear()
    load_artifact(folder, check="none")
    assert not caplog.messages
    with pytest.raises(InputError, match="has no digests"):
        lqec.verify(folder)
    # What says how it was made has digests too, or has lost them.
    edit_json(META, lambda m: m.update(made={"verb": "compress"}))(folder)
    with pytest.raises(InputError, match="digests are damaged"):
        load_artifact(folder)


def test_a_tokenizer_may_be_put_beside_a_model_without_one(written, tmp_path):
    folder = save_artifact(make_model(), tmp_path / "bare", {})
    shutil.copy(written / "tokenizer.json", folder)
    assert load_artifact(folder).tokenizer is not None


def test_arrays_are_hashed_while_they_are_handed_on():
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3).T, "b": np.zeros((), np.float16)}
    hashing = Hashing(arrays.items())
    assert hashing.digests == {}
    assert [name for name, _ in hashing] == ["a", "b"]
    assert hashing.digests == {n: hash_arrays([(n, a)]) for n, a in arrays.items()}
    # Another name, dtype or shape is another digest.
    assert len({hash_arrays([p]) for p in (("a", np.zeros(4, np.int8)), ("b", np.zeros(4, np.int8)),
                ("a", np.zeros(1, np.int32)), ("a", np.zeros((2, 2), np.int8)))}) == 4  # fmt: skip
