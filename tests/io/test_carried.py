"""What goes along with the weights: byte for byte, and nothing from outside of the folder."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io.carried import compare_models, copy_carried, find_carried
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.sources.tokenizer import Tokenizer
from lqec_jax.runs.examples import Rows, prepare_tuning
from tests.golden.tiny_checkpoint import RTN, make_tokens, write_checkpoint
from tests.io.packed_models import make_model

# With an end of line that no JSON writer gives: copied, not written anew.
STRANGE = b'{"eos_token_id": [2, 7],\r\n  "max_new_tokens": 20}'
TOKENIZER = (
    '{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": '
    '{"type": "WordLevel", "unk_token": "w0", "vocab": {"w0": 0, "w1": 1, "w2": 2}}}'
)


@pytest.fixture
def home(tmp_path):
    """A tokenizer's folder with files of every kind."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "generation_config.json").write_bytes(STRANGE)
    (folder / "chat_template.jinja").write_bytes(b"{{ 1 }}\r\n")
    return folder


def link_out(folder, name="merges.txt"):
    """Puts a link into a folder to a file that lies elsewhere."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    (folder / name).symlink_to(elsewhere / "secret")


def test_artifacts_and_every_export_carry_the_files_byte_for_byte(home, tmp_path):
    model = replace(make_model(ranks=(0, 0)), tokenizer=Tokenizer.load(home))
    names = {path.name for path in home.iterdir()}
    folders = [lqec.save(model, tmp_path / "artifact")]
    assert lqec.load(folders[0]).tokenizer.end_ids == {2, 7}
    for form in ("hf", "gptq", "compressed-tensors", "flax"):
        folders.append(export_model(model, tmp_path / form, form).folder)
    again = replace(lqec.load(folders[0]), report={})
    folders.append(export_model(again, tmp_path / "again", "hf").folder)
    for folder in folders:
        for name in names:
            assert (folder / name).read_bytes() == (home / name).read_bytes(), (folder, name)


def test_a_model_without_a_tokenizer_carries_its_generation_config(home, tmp_path):
    (home / "tokenizer.json").unlink()
    assert find_carried(None, home) == [home / "generation_config.json"]
    assert find_carried(None, None) == find_carried(None, tmp_path) == []


@pytest.mark.parametrize("name", ["merges.txt", "generation_config.json", "tokenizer_config.json"])
def test_a_link_out_of_the_folder_is_refused_and_copied_nowhere(home, tmp_path, name):
    (home / name).unlink(missing_ok=True)
    link_out(home, name)
    model = replace(make_model(), tokenizer=SimpleNamespace(files=lambda: [home / name]))
    calls = [
        lambda: lqec.save(model, tmp_path / "artifact"),
        lambda: export_model(model, tmp_path / "hf", "hf"),
        lambda: prepare_tuning(model, Rows("x.jsonl"), epochs=None, seed=0, settings={}),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"{name} is a link to .*secret, outside"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "home"]


def test_compress_refuses_a_link_before_any_work(tmp_path):
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    (folder / "tokenizer.json").write_text(TOKENIZER)
    link_out(folder)
    with pytest.raises(InputError, match="merges.txt is a link"):
        lqec.compress(folder, RTN, make_tokens(4), seqlen=32, windows=4, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model"]


def test_links_within_a_folder_and_of_the_hubs_cache_are_followed(home, tmp_path):
    (home / "merges.txt").symlink_to("chat_template.jinja")
    linked = tmp_path / "linked"
    linked.symlink_to(home)
    assert len(find_carried(Tokenizer.load(linked), None)) == 4
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(home.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert len(find_carried(Tokenizer.load(snapshot), None)) == 4
    out = tmp_path / "out"
    out.mkdir()
    copy_carried(replace(make_model(), tokenizer=Tokenizer.load(snapshot)), out)
    assert (out / "generation_config.json").read_bytes() == STRANGE
    assert not any(path.is_symlink() for path in out.iterdir())
    (snapshot / "vocab.txt").symlink_to(home / "tokenizer.json")
    with pytest.raises(InputError, match="vocab.txt is a link"):
        find_carried(Tokenizer.load(snapshot), None)


def test_the_case_of_two_ends_stops_and_travels(shared, tmp_path):
    case = shared / "cases" / "generation-config" / "generation_config.json"
    if not case.is_file():
        pytest.skip("no folder ../shared/cases")
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (shared / "models" / "xs279k").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / case.name).write_bytes(case.read_bytes())
    model = lqec.load(folder)
    assert model.tokenizer.end_ids == {2, 286}
    done = export_model(model, tmp_path / "hf", "hf")
    assert (done.folder / case.name).read_bytes() == case.read_bytes()


def test_models_that_read_otherwise_are_named(home, tmp_path):
    model = replace(make_model(), tokenizer=Tokenizer.load(home), folder=home)
    assert compare_models(model, model) == []
    other = shutil.copytree(home, tmp_path / "other")
    (other / "generation_config.json").unlink()  # where texts end says nothing about a score
    same = replace(model, tokenizer=Tokenizer.load(other), folder=other)
    assert compare_models(model, same) == []
    (other / "tokenizer.json").write_text(TOKENIZER.replace('"w1": 1, "w2": 2', '"w1": 2, "w2": 1'))
    said = compare_models(model, replace(same, config=make_model(rope_theta=7.0).config))
    assert said == [
        f"{other} has another tokenizer (tokenizer.json); the text was read by the model's own",
        f"{other} has another config.json (rope)",
    ]
    assert compare_models(model, replace(same, tokenizer=None)) == []
