"""The GPTQ reader on tensors worked out by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io.verify import gptq


def write(folder, version="gptq", zero_word=0b0010, **said):
    """Two outputs of 16 two-bit codes each, groups of 8; only the first two codes are not 0."""
    said = {"quant_method": "gptq", "bits": 2, "checkpoint_format": version} | said
    (folder / "config.json").write_text(json.dumps({"quantization_config": said}))
    tensors = {
        "m.qweight": np.array([[0b1101, 0b0011]], np.int32),  # [1, 2]: codes (1, 3) and (3, 0)
        # One word a group, an output's zero at bits 2o: stored (2, 0) and (0, 0).
        "m.qzeros": np.array([[zero_word], [0]], np.int32),
        "m.scales": np.array([[0.5, 2.0], [1.0, 4.0]], np.float16),  # [groups, d_out]
        "m.g_idx": np.repeat(np.arange(2, dtype=np.int32), 8),
        "n.weight": np.array([7.0], np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    return gptq.read(folder, {})


def test_version_1_adds_one_to_zeros(tmp_path):
    found = write(tmp_path)
    assert sorted(found) == ["m.weight", "n.weight"]
    w = found["m.weight"]()
    assert w.shape == (2, 16) and w.dtype == np.float32
    # Zeros: 3 and 1 in the first group, 1 and 1 in the second.
    assert w[0].tolist() == [-1.0, 0.0] + [-1.5] * 6 + [-1.0] * 8
    assert w[1].tolist() == [4.0, -2.0] + [-2.0] * 6 + [-4.0] * 8


def test_version_2_takes_zeros_as_they_are(tmp_path):
    w = write(tmp_path, "gptq_v2")["m.weight"]()
    assert w[0].tolist() == [-0.5, 0.5] + [-1.0] * 6 + [0.0] * 8
    assert w[1].tolist() == [6.0] + [0.0] * 15


def test_groups_follow_the_index(tmp_path):
    write(tmp_path, "gptq_v2")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["m.g_idx"] = np.array([1, 0] * 8, np.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    w = gptq.read(tmp_path, {})["m.weight"]()
    assert w[0].tolist() == [1.0, 0.5] + [0.0, -1.0] * 7


def test_another_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="not gptq's"):
        write(tmp_path, "marlin")
