"""The pack-quantized reader on tensors worked out by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io.verify import compressed_tensors


def write(folder, *, symmetric=True, targets=("Linear",), ignore=(), groups=1):
    """Two outputs of 4 two-bit codes, groups of 2."""
    weights = {"num_bits": 2, "symmetric": symmetric, "group_size": 2}
    schemes = {f"g{i}": {"targets": list(targets), "weights": weights} for i in range(groups)}
    said = {"format": "pack-quantized", "ignore": list(ignore), "config_groups": schemes}
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    tensors = {
        "m.weight_packed": np.array([[0b11_10_01_00], [0b00_00_11_10]], np.int32),
        "m.weight_scale": np.array([[1.0, 2.0], [0.5, 4.0]], np.float32),  # [d_out, groups]
        "m.weight_shape": np.array([2, 4], np.int64),
        "n.weight": np.array([7.0], np.float32),
    }
    if not symmetric:  # packed along the output: one word a group, output o at bits 2o
        tensors["m.weight_zero_point"] = np.array([[0b1001, 0b1100]], np.int32)
    save_file(tensors, folder / "model.safetensors")
    return compressed_tensors.read(folder, {})


def test_symmetric_codes_stand_around_two(tmp_path):
    found = write(tmp_path)
    assert sorted(found) == ["m.weight", "n.weight"]
    # Stored codes 0 1 2 3 are -2 -1 0 1.
    assert found["m.weight"]().tolist() == [[-2.0, -1.0, 0.0, 2.0], [0.0, 0.5, -8.0, -8.0]]


def test_zero_points_are_taken_off(tmp_path):
    # Zeros (1, 2) in the first group, (0, 3) in the second, in the same code space.
    w = write(tmp_path, symmetric=False)["m.weight"]()
    assert w.tolist() == [[-1.0, 0.0, 4.0, 6.0], [0.0, 0.5, -12.0, -12.0]]


@pytest.mark.parametrize("targets", [("m",), ("re:^m$",)])
def test_a_target_may_be_a_name_or_a_pattern(tmp_path, targets):
    assert write(tmp_path, targets=targets)["m.weight"]()[0, 0] == -2.0


@pytest.mark.parametrize("change", [{"targets": ("n",)}, {"ignore": ("m",)}, {"groups": 2}])
def test_a_module_has_one_scheme(tmp_path, change):
    with pytest.raises(InputError, match="schemes name m; wanted one"):
        write(tmp_path, **change)
