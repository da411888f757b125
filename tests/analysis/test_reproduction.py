"""An artifact is made again to the same bytes, or what differs and what is missing has a name."""

import json
import shutil

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.analysis import reproduction
from lqec_jax.errors import CheckFailed, InputError
from tests.golden.tiny_checkpoint import RTN, SEQLEN, make_tokens, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("again")
    write_checkpoint(folder / "model", num_hidden_layers=2)
    write_checkpoint(folder / "other", num_hidden_layers=2, seed=1)
    np.save(folder / "calib.npy", make_tokens(6))
    np.save(folder / "more.npy", make_tokens(6)[::-1])
    lqec.compress(folder / "model", f"{RTN} | svd(rank=2)", folder / "calib.npy", seqlen=SEQLEN,
                  windows=6, seed=5, eval=folder / "more.npy", out=folder / "small")  # fmt: skip
    return folder


def given(folder, **changes):
    wanted = {"model": "model", "calib": "calib.npy", "eval": "more.npy"} | changes
    return {name: folder / value for name, value in wanted.items() if value is not None}


def edit_meta(folder, tmp_path, change):
    """Returns a copy of the artifact with another lqec.json."""
    copy = shutil.copytree(folder / "small", tmp_path / "copy")
    meta = json.loads((copy / "lqec.json").read_text())
    change(meta)
    (copy / "lqec.json").write_text(json.dumps(meta))
    return copy


def test_the_same_comes_out_and_is_found_by_name_or_where_it_is_said(folder, monkeypatch):
    found = reproduction.reproduce(folder / "small", **given(folder))
    assert found.unlike == () and found.tensors > 30
    monkeypatch.chdir(folder)
    assert reproduction.reproduce("small").tensors == found.tensors


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": None}, "'model' is not here; give --model"),
        ({"calib": None}, "'calib.npy' is not here; give --calib"),
        ({"eval": None}, "'more.npy' is not here; give --eval"),
        ({"model": "other"}, "the model is another one"),
        ({"calib": "more.npy"}, "the calibration text gives other windows"),
        ({"eval": "calib.npy"}, "the scored text gives other windows"),
    ],
)
def test_what_is_missing_or_another_is_named(changes, why, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduction.api, "compress", lambda *_, **__: pytest.fail("it was run"))
    with pytest.raises(InputError, match=why):
        reproduction.reproduce(folder / "small", **given(folder, **changes))


def test_the_first_difference_is_named_with_what_is_unlike(folder, tmp_path):
    name = "blocks.0.attn.k.base.codes"

    def change(meta):
        meta["digests"]["tensors"][name] = "0" * 64
        meta["versions"]["jax"], meta["made"]["threads"] = "0.1", 999

    copy = edit_meta(folder, tmp_path, change)
    with pytest.raises(CheckFailed) as said:
        reproduction.reproduce(copy, **given(folder))
    assert (
        f"1 of {len(json.loads((copy / 'lqec.json').read_text())['digests']['tensors'])} "
        in str(said.value)
    )
    for words in (f"first '{name}'", "jax was 0.1, is ", "999 cores then"):
        assert words in str(said.value)


def test_what_cannot_be_made_again_is_refused(folder, tmp_path):
    copy = edit_meta(folder, tmp_path, lambda m: m["made"].update(mesh="{'data': 2}"))
    with pytest.raises(InputError, match="made on a mesh {'data': 2}"):
        reproduction.reproduce(copy, **given(folder))
    with pytest.raises(InputError, match="is no lqec artifact"):
        reproduction.reproduce(folder / "model")
