"""Settings: where they come from, in which order, and that nothing passes that is not known."""

import dataclasses
import re

import pytest

from lqec_jax.cli.config import Claim, CompressConfig, MeshConfig, dump, resolve
from lqec_jax.errors import InputError


def test_later_sources_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nseqlen: 64\nwindows: 10\ndtype: bfloat16\n")
    config = resolve(
        {"seed": 2, "seqlen": 128, "windows": None}, file, ["seed=3", "recipe=svd(rank=1)"]
    )
    assert config == CompressConfig(
        recipe="svd(rank=1)", seed=3, seqlen=128, windows=10, dtype="bfloat16"
    )


def test_defaults_are_those_of_the_verb():
    import inspect

    from lqec_jax.api import compress

    verb = inspect.signature(compress).parameters
    for field in dataclasses.fields(CompressConfig):
        if field.name not in ("recipe", "calib", "claim"):
            assert verb[field.name].default == field.default, field.name


def test_what_is_dumped_is_read_back(tmp_path):
    config = CompressConfig(
        recipe="rtn(bits=2, group_size=64) | rilq(rank=16)",
        calib="text: with # signs.jsonl",
        val_ratio=0.25,
        seed=7,
        mesh=MeshConfig(2, 4),
        claim=Claim(source="a paper, table 1", expected="10.05", ours="not run"),
    )
    file = tmp_path / "c.yaml"
    file.write_text(dump(config))
    assert resolve({}, file) == config
    assert resolve({}, file, ["mesh.data=1"]).mesh == MeshConfig(1, 4)


@pytest.mark.parametrize(
    "mesh", ["data=2,model=4", " data = 2 , model = 4 ", {"data": 2, "model": 4}]
)
def test_a_mesh_is_text_or_a_mapping(mesh):
    assert resolve({"mesh": mesh}).mesh == MeshConfig(2, 4)


@pytest.mark.parametrize(
    ("claim", "said"),
    [("{exspected: 3}", "unknown key 'exspected'.*did you mean 'expected'"),
     ("{expected: 3}", "a string was wanted"), ("ten", "were wanted")],
)  # fmt: skip
def test_a_claim_is_read_as_strictly_as_a_setting(tmp_path, claim, said):
    file = tmp_path / "c.yaml"
    file.write_text(f"claim: {claim}\n")
    with pytest.raises(InputError, match=said):
        resolve({}, file)


def test_a_setting_reaches_into_a_part_that_is_not_there_yet():
    assert resolve({}, None, ["mesh.model=4"]).mesh == MeshConfig(1, 4)


def test_a_whole_number_is_a_number_too():
    ratio = resolve({}, None, ["val_ratio=0.5"]).val_ratio
    assert ratio == 0.5 and isinstance(resolve({"val_ratio": 1}).val_ratio, float)


def test_a_recipe_is_taken_as_it_stands():
    recipe = "rtn(bits=2, group_size=32) | rilq(rank=16, lr=1e-3)"
    assert resolve({}, None, [f"recipe={recipe}"]).recipe == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("seed=1.5", "--set seed=1.5: seed is '1.5'; an integer was wanted"),
        ("seed=", "--set seed=: seed is ''; an integer was wanted"),
        ("val_ratio=much", "val_ratio is 'much'; a number was wanted"),
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("=1", "unknown key ''"),
        ("mesh.dat=1", "unknown key 'dat'; did you mean 'data'?"),
        ("mesh.data=0", "mesh: data=0, model=1; at least 1 was wanted"),
        ("seed.x=1", "seed has no parts; write seed=value"),
        ("seed", "--set 'seed'; name=value was wanted"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        resolve({}, None, [settings])
    assert "\n" not in str(caught.value)


def test_a_file_is_named_with_its_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 1\nrecipe: {\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}, line 3: not YAML"):
        resolve({}, file)
    file.write_text("seed: one\n")
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}: seed is 'one'"):
        resolve({}, file)
    file.write_text("# nothing but a comment\n")
    assert resolve({}, file) == CompressConfig()


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CompressConfig().seed = 3
