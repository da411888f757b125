"""The dense reader gives what safetensors wrote, as float32."""

import json

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.verify import dense


def test_every_tensor_is_read_as_float32(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    narrow = np.array([[1.5, -2.0]], ml_dtypes.bfloat16)
    save_file({"a": narrow, "b": np.array([3.0], np.float16)}, tmp_path / "model.safetensors")
    found = {name: thunk() for name, thunk in dense.read(tmp_path, {}).items()}
    assert {array.dtype.name for array in found.values()} == {"float32"}
    assert found["a"].tolist() == [[1.5, -2.0]] and found["b"].tolist() == [3.0]


def test_weights_in_several_tensors_are_opened_by_their_module_and_all_else_is_dense(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    names = ("m.codes", "m.scale", "n.codes", "n.scale", "n.bias", "codes_of.weight")
    tensors = {name: np.array([i], np.float16) for i, name in enumerate(names)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = dense.read_beside(Checkpoint.open(tmp_path), ("codes", "scale"), lambda m: lambda: m)
    came = {name: thunk() for name, thunk in found.items()}
    assert came == {"m.weight": "m", "n.weight": "n", "n.bias": 4.0, "codes_of.weight": 5.0}
