"""The flax reader on a tree worked out by hand."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lqec_jax.errors import InputError
from lqec_jax.io.verify import flax

AFFINE = {"base": {"format": "affine", "bits": 2, "group_size": 16, "d_in": 32},
          "corrections": [], "input_transform": None, "output_transform": None}  # fmt: skip


def write(folder, said=AFFINE, **more):
    """Two blocks in two segments; one packed weight [32, 1] of which two codes are not 0."""
    (folder / "config.json").write_text("{}")
    (folder / "flax_weights.json").write_text(json.dumps({"blocks/0/q": said}))
    words = np.zeros((1, 2, 1), np.uint32)
    words[0, :, 0] = 0b1101, 0b11
    tensors = {
        "blocks/0/q/base/codes": words,
        "blocks/0/q/base/scales": np.array([[[1.0], [2.0]]], np.float16),
        "blocks/0/q/bias": np.array([[5.0]], np.float32),
        "blocks/1/n/scale": np.array([[1.0], [2.0]], np.float32),
        "norm/scale": np.array([3.0], np.float32),
    }
    save_file(tensors | more, folder / "model.safetensors")
    return {name: thunk() for name, thunk in flax.read(folder, {}).items()}


def test_blocks_are_counted_over_segments(tmp_path):
    found = write(tmp_path)
    assert sorted(found) == ["blocks/0/q/bias", "blocks/0/q/kernel", "blocks/1/n/scale",
                             "blocks/2/n/scale", "norm/scale"]  # fmt: skip
    assert [float(found[f"blocks/{i}/n/scale"][0]) for i in (1, 2)] == [1.0, 2.0]
    assert found["norm/scale"].tolist() == [3.0] and found["blocks/0/q/bias"].tolist() == [5.0]


def test_a_symmetric_grid_stands_around_its_middle(tmp_path):
    w = write(tmp_path)["blocks/0/q/kernel"][:, 0]
    assert w.tolist() == [-1.0, 1.0] + [-2.0] * 14 + [2.0] + [-4.0] * 15


def test_zeros_may_be_integers_or_numbers(tmp_path):
    packed = np.zeros((1, 2, 2), np.uint32)
    packed[0, :, 0] = 3, 1  # two words hold 32 outputs' zeros, of which there is one
    w = write(tmp_path, **{"blocks/0/q/base/zeros": packed})["blocks/0/q/kernel"][:, 0]
    assert w.tolist() == [-2.0, 0.0] + [-3.0] * 14 + [4.0] + [-2.0] * 15
    half = np.full((1, 2, 1), 0.5, np.float16)
    w = write(tmp_path, **{"blocks/0/q/base/zeros": half})["blocks/0/q/kernel"][:, 0]
    assert w.tolist() == [0.5, 2.5] + [-0.5] * 14 + [5.0] + [-1.0] * 15


def test_transforms_and_corrections_are_part_of_the_weight(tmp_path):
    said = AFFINE | {"corrections": [{"format": "low_rank"}],
                     "input_transform": {"format": "channel_scale"}}  # fmt: skip
    more = {
        "blocks/0/q/input_transform/scale": np.full((1, 32), 2.0, np.float32),
        "blocks/0/q/corrections/0/a": np.eye(32, 1, dtype=np.float16)[None],
        "blocks/0/q/corrections/0/b": np.full((1, 1, 1), 10.0, np.float16),
    }
    w = write(tmp_path, said, **more)["blocks/0/q/kernel"][:, 0]
    assert w.tolist() == [8.0, 2.0] + [-4.0] * 14 + [4.0] + [-8.0] * 15


def test_an_unknown_part_is_refused(tmp_path):
    for part in ({"base": {"format": "lattice"}}, {"input_transform": {"format": "rotation"}},
                 {"corrections": [{"format": "sponge"}]}):  # fmt: skip
        with pytest.raises(InputError, match="is not read here"):
            write(tmp_path, AFFINE | part)


def test_input_grids_are_those_of_blocks_counted_over_all_segments(tmp_path):
    grid = {"kind": "int", "bits": 8, "per": "token"}
    write(tmp_path)
    assert flax.read_inputs(tmp_path) == {}
    weights = {"blocks/1/n": AFFINE | {"input_grid": grid}, "blocks/0/q": AFFINE}
    (tmp_path / "flax_weights.json").write_text(json.dumps(weights))
    assert flax.read_inputs(tmp_path) == {"blocks/1/n/kernel": grid, "blocks/2/n/kernel": grid}
