"""A good model and a good text in a folder, for a test to spoil, and how a refusal looks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from lqec_jax.cli import main
from tests.golden.tiny_checkpoint import RAW, RTN, SEQLEN, hash_folder

TOKENIZER = json.dumps({
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "Whitespace"},
    "model": {"type": "WordLevel", "unk_token": "w0",
              "vocab": {f"w{i}": i for i in range(100)}},
})  # fmt: skip


class Place(NamedTuple):
    """A good model and a good text in a folder of their own, for a test to spoil."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def save(self, name: str, array: np.ndarray) -> Path:
        np.save(self.folder / name, array)
        return self.folder / name

    def change_config(self, **changes) -> None:
        raw = {**RAW, "num_hidden_layers": 2, **changes}
        raw = {name: value for name, value in raw.items() if value is not ...}
        self.write("model/config.json", json.dumps(raw))

    def change_weights(self, change: Callable[[dict], None]) -> None:
        path = self.model / "model.safetensors"
        arrays = load_file(path)
        change(arrays)
        save_file(arrays, path)

    def compress(self, *more, model=None, out=None, recipe=RTN, calib="calib.npy") -> list[str]:
        words = ["compress", model or self.model, out or self.out, "--recipe", recipe, "--calib",
                 self.folder / calib, "--seqlen", SEQLEN, "--windows", 4, *more]  # fmt: skip
        return [str(word) for word in words]

    def evaluate(self, *more, model=None, text="calib.npy", seqlen=SEQLEN) -> list[str]:
        words = ["eval", model or self.model, "--text", self.folder / text, "--seqlen", seqlen]
        return [str(word) for word in (*words, *more)]


def put_nan(arrays):
    arrays["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan


def refusal(capfd, folder: Path, arguments: list[str]) -> str:
    """Runs a command that must be refused; returns its one line."""
    before = hash_folder(folder), sorted(folder.rglob("*"))
    code = main(arguments)
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert (hash_folder(folder), sorted(folder.rglob("*"))) == before
    return err
