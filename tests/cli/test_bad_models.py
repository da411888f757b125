"""Every way a model's folder can be damaged: one line, exit code 2, and nothing lost."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lqec_jax.cli import main
from tests.cli.spoiled import TOKENIZER, Place, put_nan, refusal
from tests.golden.tiny_checkpoint import write_checkpoint, write_tokens

# ---- checkpoints


def cut_weights(place, *, keep: float):
    data = (place.model / "model.safetensors").read_bytes()
    place.write("model/model.safetensors", data[: int(keep * len(data))])


def put_inf_bfloat16(arrays):
    for name in arrays:
        arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)
    arrays["model.norm.weight"][0] = np.inf


def drop(name):
    return lambda arrays: arrays.pop(name)


def add(name, shape):
    return lambda arrays: arrays.update({name: np.zeros(shape, np.float32)})


def write_fp8(arrays):
    for name in arrays:
        arrays[name] = arrays[name].astype(ml_dtypes.float8_e4m3fn)


DOWN = "model.layers.0.mlp.down_proj.weight"
HEADER = struct.pack("<Q", 1 << 40)

MODELS = {
    "empty folder": (lambda p: (p.model / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda p: (p.model / "model.safetensors").unlink(), "neither"),
    "cut weights": (lambda p: cut_weights(p, keep=0.7), "not copied in full"),
    "cut header": (lambda p: cut_weights(p, keep=0.001), "download it again"),
    "empty weights": (lambda p: p.write("model/model.safetensors", b""), "not a safetensors file"),
    "hostile header": (lambda p: p.write("model/model.safetensors", HEADER * 9), "not a safetens"),
    "text as weights": (lambda p: p.write("model/model.safetensors", "x" * 99), "not a safetensor"),
    "deep header": (
        lambda p: p.write("model/model.safetensors", struct.pack("<Q", 99999) + b"[" * 99999),
        "damaged",
    ),
    "LFS pointer": (
        lambda p: p.write("model/model.safetensors", "version https://git-lfs\n" * 9),
        "git lfs pull",
    ),
    "NaN": (lambda p: p.change_weights(put_nan), "non-finite"),
    "Inf in bfloat16": (lambda p: p.change_weights(put_inf_bfloat16), "non-finite"),
    "float8": (lambda p: p.change_weights(write_fp8), "float8_e4m3fn"),
    "missing tensor": (lambda p: p.change_weights(drop(DOWN)), "missing"),
    "extra tensor": (lambda p: p.change_weights(add("model.layers.0.extra", 3)), "does not have"),
    "other shape": (lambda p: p.change_weights(add(DOWN, (32, 63))), "config.json asks for"),
    "config: no JSON": (lambda p: p.write("model/config.json", '{"a": 1,\n oops}'), "line 2"),
    "config: cut": (lambda p: p.write("model/config.json", '{"model_type": "lla'), "not JSON"),
    "config: a list": (lambda p: p.write("model/config.json", "[1]"), "holds a list"),
    "config: not text": (lambda p: p.write("model/config.json", b"\xff\xfe{}"), "not UTF-8"),
    "config: deep": (lambda p: p.write("model/config.json", "[" * 99999), "config.json"),
    "unknown model_type": (lambda p: p.change_config(model_type="lama"), "did you mean 'llama'"),
    "strange model_type": (lambda p: p.change_config(model_type=["llama"]), "not supported"),
    "no model_type": (lambda p: p.change_config(model_type=...), "model_type is missing"),
    "unknown config key": (lambda p: p.change_config(logit_scale=2.0), "logit_scale"),
    "quantized already": (lambda p: p.change_config(quantization_config={"a": 1}), "already quan"),
    "layers as text": (lambda p: p.change_config(num_hidden_layers="two"), "num_hidden_layers"),
    "too many layers": (lambda p: p.change_config(num_hidden_layers=10**9), "missing"),
    "a layer too many": (lambda p: p.change_config(num_hidden_layers=3), "missing"),
    "huge vocabulary": (
        lambda p: p.change_config(vocab_size=10**12),
        "config.json asks for",
    ),
    "config: huge number": (
        lambda p: p.write("model/config.json", '{"vocab_size": ' + "9" * 5000 + "}"),
        "cannot be read as JSON",
    ),
    "heads do not divide": (lambda p: p.change_config(num_attention_heads=5), "does not divide"),
    "damaged index": (
        lambda p: (
            (p.model / "model.safetensors").unlink(),
            p.write("model/model.safetensors.index.json", '{"weight_map": '),
        ),
        "not JSON",
    ),
    "index out of the folder": (
        lambda p: (
            (p.model / "model.safetensors").unlink(),
            p.write(
                "model/model.safetensors.index.json",
                json.dumps({"weight_map": {"a": "../../etc/passwd"}}),
            ),
        ),
        "no file name in this folder",
    ),
    "tokenizer: no JSON": (lambda p: p.write("model/tokenizer.json", "{"), "tokenizer.json"),
    "tokenizer: empty": (lambda p: p.write("model/tokenizer.json", "{}"), "not a tokenizer"),
    "tokenizer_config: no JSON": (
        lambda p: (
            p.write("model/tokenizer.json", TOKENIZER),
            p.write("model/tokenizer_config.json", "nope"),
        ),
        "tokenizer_config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_is_refused_in_one_line(name, place, capfd):
    spoil, words = MODELS[name]
    spoil(place)
    assert words in refusal(capfd, place.folder, place.compress())
    assert words in refusal(capfd, place.folder, place.evaluate())


def test_a_model_that_is_not_there_is_named(place, capfd):
    missing = place.folder / "nothing"
    line = refusal(capfd, place.folder, place.compress(model=missing))
    assert f"no folder {missing}" in line
    assert "no folder" in refusal(capfd, place.folder, place.evaluate(model=missing))
    assert "no folder" in refusal(capfd, place.folder, ["inspect", str(missing)])
    assert "is a file" in refusal(capfd, place.folder, ["inspect", str(place.folder / "calib.npy")])


# ---- artifacts


def spoil_meta(**changes):
    def spoil(folder: Path) -> None:
        meta = json.loads((folder / "lqec.json").read_text())
        (folder / "lqec.json").write_text(json.dumps(meta | changes))

    return spoil


def spoil_weight(change: Callable[[dict], None]):
    def spoil(folder: Path) -> None:
        meta = json.loads((folder / "lqec.json").read_text())
        change(meta["weights"]["blocks/1/attn/q"])
        (folder / "lqec.json").write_text(json.dumps(meta))

    return spoil


def spoil_arrays(change: Callable[[dict], None]):
    def spoil(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        save_file(arrays, folder / "model.safetensors")

    return spoil


def cut_file(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def spoil_report(**changes):
    def spoil(folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text())
        (folder / "report.json").write_text(json.dumps(report | changes))

    return spoil


CODES = "blocks.1.attn.q.base.codes"

ARTIFACTS = {
    "lqec.json cut": (cut_file("lqec.json"), "not JSON"),
    "weights cut": (cut_file("model.safetensors"), "not copied in full"),
    "config.json cut": (cut_file("config.json"), "not JSON"),
    "config.json gone": (lambda folder: (folder / "config.json").unlink(), "is missing"),
    "newer format": (spoil_meta(format_version=99), "upgrade lqec-jax"),
    "no recipe": (spoil_meta(recipe=None), "recipe is missing"),
    "no weights": (spoil_meta(weights=[]), "weights is missing"),
    "weights of another shape": (spoil_meta(weights={"blocks/0/attn/q": 3}), "belong together"),
    "unknown format": (spoil_weight(lambda w: w["base"].update(format="magic")), "magic"),
    "other group_size": (spoil_weight(lambda w: w["base"].update(group_size=7)), "belong together"),
    "other d_in": (spoil_weight(lambda w: w["base"].update(d_in=64)), "belong together"),
    "bits as text": (spoil_weight(lambda w: w["base"].update(bits="3")), "belong together"),
    "no base": (spoil_weight(lambda w: w.pop("base")), "belong together"),
    "codes gone": (spoil_arrays(lambda a: a.pop(CODES)), "is missing"),
    "codes cut": (spoil_arrays(lambda a: a.update({CODES: a[CODES][:, :-1]})), "belong together"),
    "norm gone": (spoil_arrays(lambda a: a.pop("norm.scale")), "belong together"),
    "report.json cut": (cut_file("report.json"), "not JSON"),
    "stages no list": (spoil_report(stages=3), "report.json: stages is '3'"),
    "a linear without a path": (spoil_report(linears=[{}]), "linears[0] has no path"),
    "block too many": (
        spoil_arrays(lambda a: a.update({"blocks.2.x": a["norm.scale"]})),
        "belong together",
    ),
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("artifact"))
    write_checkpoint(place.model, num_hidden_layers=2)
    write_tokens(place.folder / "calib.npy", 4)
    assert main(place.compress("--quiet")) == 0
    return place.out


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_damaged_artifact_is_refused(name, artifact, place, capfd):
    place.out.mkdir()
    for path in artifact.iterdir():
        place.write(f"out/{path.name}", path.read_bytes())
    spoil, words = ARTIFACTS[name]
    spoil(place.out)
    assert words in refusal(capfd, place.folder, ["inspect", str(place.out)])
    assert words in refusal(capfd, place.folder, place.evaluate(model=place.out))


def test_an_artifact_is_not_compressed_again(artifact, place, capfd):
    line = refusal(capfd, place.folder, place.compress(model=artifact))
    assert "is compressed already" in line


def test_a_real_process_prints_the_same_line_and_nothing_else(place):
    place.change_weights(put_nan)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "lqec_jax", *place.compress()],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "'model.layers.1.mlp.down_proj.weight' holds 1 non-finite" in done.stderr
    assert not place.out.exists() and not (place.folder / "out.partial").exists()
