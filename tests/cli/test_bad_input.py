"""Recipes, texts, options, outputs that cannot be: one line, exit code 2, nothing left behind."""

import os

import numpy as np
import pytest

from tests.cli.spoiled import TOKENIZER, refusal
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint

# ---- recipes

RECIPES = {
    "": "recipe: empty",
    "rtm(bits=2)": "did you mean 'rtn'",
    "rtn(bits=9)": "bits=9",
    "rtn(bits=0)": "bits=0",
    "rtn(bits=2.5)": "bits=2.5",
    "rtn(bits=True)": "bits=True",
    "rtn(bits='2')": "bits='2'",
    "rtn(bit=2)": "did you mean 'bits'",
    "rtn(2)": "named arguments only",
    "rtn(bits=2": "cannot be read",
    "rtn(bits=2))": "cannot be read",
    "rtn(bits=2, bits=3)": "'bits' twice",
    "rtn(bits=2) + svd(rank=1)": "is not a method",
    "rtn(bits=2); import os": "cannot be read",
    "__import__('os').system('touch hacked')": "is not a method",
    "rtn(bits=__import__('os').getpid())": "is not a method",
    "rtn(bits=open('x', 'w'))": "unknown method 'open'",
    "rtn(**{'bits': 2})": "named arguments only",
    "rtn(bits=2, group_size=48)": "not divisible by group_size=48",
    "rtn(bits=2, group_size=0)": "group_size=0",
    "rtn(bits=2, group_size=32) | svd(rank=17)": "rank=17 is larger",
    "rtn(bits=2, group_size=32) | svd(rank=1.5)": "rank=1.5",
    "rtn(bits=2, group_size=32) | rilq(rank=99)": "rank=99 is larger",
    "rtn(bits=2, group_size=32) | svd(rank=4) | rilq(rank=8)": "leave rank out",
    "rtn(bits=2, group_size=32) | rilq(lr=1e999)": "lr=inf",
    "rtn(bits=2, group_size=32) | rilq(batch=8, accumulate=3)": "does not divide",
    "rtn(bits=2, group_size=32) | rilq(preset='theirs')": "preset='theirs'",
    "rtn(bits=" + "9" * 4500 + ")": "characters",
    "rtn(bits=" + "(" * 1500 + "1" + ")" * 1500 + ")": "cannot be read",
    "rtn(bits=" + "-" * 3000 + "1)": "cannot be read",
    "|" * 40: "cannot be read",
    "rtn(bits=2)\x00": "cannot be read",
    "rtn(bits=2)\n| \x1b[31mred": "cannot be read",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_a_recipe_that_cannot_run_is_refused_before_any_work(recipe, place, capfd, monkeypatch):
    monkeypatch.chdir(place.folder)
    assert RECIPES[recipe] in refusal(capfd, place.folder, place.compress(recipe=recipe))


# ---- texts

TEXTS = {
    "missing.npy": (None, "no file"),
    "missing.jsonl": (None, "no file"),
    "text.doc": (b"words", "is not a text source"),
    "text": (b"words", "is not a text source"),
    "text.txt": (b"w1 w2 w3", "there is no tokenizer"),
    "empty.npy": (np.zeros(0, np.int32), "no tokens"),
    "short.npy": (np.zeros(SEQLEN - 1, np.int32), "do not fill one window"),
    "float.npy": (np.zeros(200), "float64"),
    "other.npy": (np.zeros((9, 16), np.int32), "[9, 16]"),
    "high.npy": (np.full(200, 64, np.int32), "outside the model's vocabulary of 64"),
    "negative.npy": (np.full(200, -1, np.int32), "outside"),
    "wrapping.npy": (np.full(200, 2**32 + 1, np.int64), "outside"),
    "cut.npy": (b"\x93NUMPY\x01\x00", "not a .npy of numbers"),
    "damaged.npy": (b"\x93NUMPY\x01\x00\x08\x00{'a': (\x00" + bytes(99), "not a .npy of numbers"),
    "objects.npy": (np.array([{}] * 99, object), "not a .npy of numbers"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_cannot_be_used_is_refused(name, place, capfd):
    content, words = TEXTS[name]
    if isinstance(content, bytes):
        place.write(name, content)
    elif content is not None:
        place.save(name, content)
    assert words in refusal(capfd, place.folder, place.compress(calib=name))
    assert words in refusal(capfd, place.folder, place.evaluate(text=name))
    held_out = place.compress("--eval", place.folder / name)
    assert words in refusal(capfd, place.folder, held_out)


DOCUMENTS = {
    "empty.txt": (b"", "has no tokens"),
    "blank.jsonl": (b"\n\n", "has no tokens"),
    "short.txt": (b"w1 w2 w3", "3 tokens do not fill one window"),
    "latin.txt": (b"caf\xe9", "line 1: not UTF-8"),
    "row.jsonl": (b'{"text": "w1"}\n{"texts": "w2"}\n', "line 2"),
    "broken.jsonl": (b'{"text": "w1"\n', "line 1"),
    "list.jsonl": (b"[1]\n", "line 1"),
    "deep.jsonl": (b"[" * 99999, "line 1: not JSON"),
    "high.txt": (b"w99 " * 200, "outside the model's vocabulary of 64"),
    "damaged.parquet": (b"PAR1", "parquet"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_that_cannot_be_used_are_refused(name, place, capfd):
    place.write("model/tokenizer.json", TOKENIZER)
    content, words = DOCUMENTS[name]
    place.write(name, content)
    assert words in refusal(capfd, place.folder, place.compress(calib=name))


def test_one_window_of_calibration_is_too_little(place, capfd):
    place.save("one.npy", make_tokens(1))
    line = refusal(capfd, place.folder, place.compress(calib="one.npy"))
    assert "1 calibration window, wanted 2 or more" in line
    assert "wanted 2 or more" in refusal(capfd, place.folder, place.compress("--windows", "1"))


# ---- options

OPTIONS = {
    ("--seqlen", "65"): "from 2 to 64",
    ("--seqlen", "1"): "from 2 to 64",
    ("--seqlen", "-3"): "from 2 to 64",
    ("--seqlen", "3.5"): "--seqlen",
    ("--windows", "x"): "--windows",
    ("--windows", "0"): "windows=0",
    ("--windows", "1e3"): "--windows",
    ("--val-ratio", "0"): "val_ratio is 0.0",
    ("--val-ratio", "1.5"): "val_ratio is 1.5",
    ("--val-ratio", "nan"): "val_ratio is nan",
    ("--seed", "-1"): "seed=-1",
    ("--seed", "4294967296"): "seed=4294967296",
    ("--seed", "one"): "--seed",
    ("--dtype", "float8"): "dtype='float8'",
    ("--mesh", "data=2,model=999"): "devices",
    ("--mesh", "data=0"): "at least 1",
    ("--mesh", "dta=2"): "did you mean 'data'",
    ("--mesh", "2x4"): "unknown key '2x4'",
    ("--mesh", "data=two"): "an integer was wanted",
    ("--set", "seqlen"): "name=value was wanted",
    ("--set", "sedd=3"): "did you mean 'seed'",
    ("--set", "seed=three"): "an integer was wanted",
    ("--set", "seed.low=3"): "has no parts",
    ("--set", "mesh.rows=3"): "unknown key 'rows'",
    ("--set", "recipe=rtm()"): "did you mean 'rtn'",
    ("--config", "/nowhere/c.yaml"): "cannot be read",
    ("--json", "/nowhere/r.json"): "cannot be written",
    ("--resume",): "no unfinished run",
    ("--windws", "3"): "--windws",
    ("--resume=maybe",): "--resume",
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_an_option_that_makes_no_sense_is_refused(options, place, capfd):
    assert OPTIONS[options] in refusal(capfd, place.folder, place.compress(*options))


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_dry_run_refuses_what_the_run_would(options, place, capfd):
    arguments = place.compress("--dry-run", *options)
    assert OPTIONS[options] in refusal(capfd, place.folder, arguments)


USAGES = {
    (): "no such usage",
    ("compres",): "Did you mean 'compress'",
    ("compress",): "Missing argument 'model'",
    ("compress", "a"): "Missing argument 'out'",
    ("compress", "a", "b"): "no recipe",
    ("compress", "a", "b", "--recipe", "svd"): "no calib",
    ("compress", "a", "b", "c"): "unexpected extra argument",
    ("compress", "a", "b", "--recipe"): "--recipe",
    ("eval", "a"): "Missing option '--text'",
    ("eval", "a", "--text", "b"): "Missing option '--seqlen'",
    ("inspect",): "Missing argument 'path'",
    ("doctor", "me"): "unexpected extra argument",
    ("--json",): "--json",
}


@pytest.mark.parametrize("arguments", list(USAGES)[1:], ids=" ".join)
def test_wrong_usage_is_one_line_too(arguments, place, capfd, monkeypatch):
    monkeypatch.chdir(place.folder)
    line = refusal(capfd, place.folder, list(arguments))
    assert USAGES[arguments].lower() in line.lower()


CONFIGS = {
    "seed: three": "seed is 'three'; an integer was wanted",
    "seed: true": "seed is True",
    "val_ratio: [1]": "a number was wanted",
    "recipe: 3": "recipe is 3; a string was wanted",
    "recipee: rtn()": "did you mean 'recipe'",
    "- a\n- b": "holds a list",
    "seed: 1\nwindows: [": "line 2: not YAML",
    "a: &a [*a]": "unknown key 'a'",
    "mesh: 3": "data=2,model=4 was wanted",
    "mesh: {data: 2, rows: 1}": "unknown key 'rows'",
    "3: 4": "unknown key 3",
    "!!python/object/apply:os.system ['touch hacked']": "not YAML",
    "[" * 1500: "not YAML",
    "seed: \x00": "not YAML",
}


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_file_that_makes_no_sense_is_refused(text, place, capfd, monkeypatch):
    monkeypatch.chdir(place.folder)
    place.write("c.yaml", text)
    assert CONFIGS[text] in refusal(capfd, place.folder, place.compress("--config", "c.yaml"))


# ---- the output


def test_an_output_that_is_there_stays_as_it_is(place, capfd):
    place.out.mkdir()
    place.write("out/lqec.json", "{}")
    place.write("out/mine.txt", "years of work")
    line = refusal(capfd, place.folder, place.compress())
    assert f"{place.out} exists" in line and "--overwrite" in line


@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_what_is_no_artifact_is_never_replaced(options, place, capfd):
    place.write("file", "a file")
    (place.folder / "mine").mkdir()
    place.write("mine/notes.txt", "years of work")
    (place.folder / "link").symlink_to(place.folder / "gone")
    for name in ("file", "mine", "link", "model", ""):
        line = refusal(capfd, place.folder, place.compress(*options, out=place.folder / name))
        assert "exists and is no lqec artifact" in line
    (place.folder / "out.partial").mkdir()
    place.write("out.partial/notes.txt", "not a run")
    assert "is no unfinished run" in refusal(capfd, place.folder, place.compress(*options))


def test_an_output_that_cannot_be_written_is_refused(place, capfd):
    inside_a_file = place.folder / "calib.npy" / "out"
    line = refusal(capfd, place.folder, place.compress(out=inside_a_file))
    assert "cannot be written" in line
    assert "File name too long" in refusal(capfd, place.folder, place.compress(out="x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(place, capfd):
    (place.folder / "theirs").mkdir(mode=0o555)
    line = refusal(capfd, place.folder, place.compress(out=place.folder / "theirs" / "out"))
    assert "cannot be written" in line


def test_an_unfinished_run_is_not_thrown_away(place, capfd):
    (place.folder / "out.partial").mkdir()
    place.write("out.partial/state.json", '{"fingerprint": {}, "phase": 0, "blocks": 1}')
    line = refusal(capfd, place.folder, place.compress())
    assert "--resume" in line and "--overwrite" in line
    place.write("out.partial/state.json", '{"phase": 0')
    assert "state.json" in refusal(capfd, place.folder, place.compress("--resume"))
    place.write("out.partial/state.json", '{"phase": "0"}')
    assert "is damaged" in refusal(capfd, place.folder, place.compress("--resume"))


# ---- eval


def test_eval_refuses_what_it_cannot_score(place, capfd):
    line = refusal(capfd, place.folder, place.evaluate("--protocol", "gtpq"))
    assert "did you mean 'gptq'" in line
    assert "from 2 to 64" in refusal(capfd, place.folder, place.evaluate(seqlen=65))
    assert "windows=0" in refusal(capfd, place.folder, place.evaluate("--windows", "0"))
    assert "dtype='half'" in refusal(capfd, place.folder, place.evaluate("--dtype", "half"))
    assert "cannot be written" in refusal(
        capfd, place.folder, place.evaluate("--json", place.folder)
    )
    other = write_checkpoint(place.folder / "other", num_hidden_layers=1, vocab_size=65)
    line = refusal(capfd, place.folder, place.evaluate("--against", other))
    assert "compare models of one vocabulary" in line
    assert "no folder" in refusal(capfd, place.folder, place.evaluate("--against", place.out))
