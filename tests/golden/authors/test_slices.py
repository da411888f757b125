"""One group of one output of the authors' numbers, kept here, so that some run without ../shared.

`slices.json` is cut out of the files that the other tests here read whole.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax
from lqec_jax.core.types import LinearStats
from lqec_kernels.formats import CompressedLinear, Dense
from tests.golden.authors.problems import codes_of, run
from tests.golden.authors.test_clipping import read
from tests.golden.authors.test_efficientqat import gradients

SLICES = json.loads((Path(__file__).parent / "slices.json").read_text())


def column(values: list, size: int | None = None) -> np.ndarray:
    return np.asarray(values[:size], np.float32)[:, None]


def group(name: str) -> tuple[dict, np.ndarray]:
    """Returns the numbers of a method and the weight of their group, [inputs, 1]."""
    part = SLICES[name]
    return part, column(SLICES["hqq"]["w"], part.get("group_size"))


def one(value: float) -> np.ndarray:
    return np.full((1, 1), value, np.float32)


def quantize(name: str, recipe: str):
    part, w = group(name)
    sizes = f"bits={part['bits']}, group_size={part['group_size']}, scale_dtype='float32'"
    return part, lqec_jax.quantize(w, recipe.format(sizes)).base


@pytest.mark.parametrize(("name", "recipe"), [("rtn", "rtn({})"), ("hqq", "hqq({}, rounds=0)")])
def test_a_uniform_grid_is_theirs(name, recipe):
    part, base = quantize(name, recipe)
    np.testing.assert_array_equal(codes_of(base)[:, 0], part["codes"])
    assert float(base.scales.reshape(())) == pytest.approx(part["scale"], rel=1e-6)
    zero = np.asarray(base.columns()[2], np.float32).reshape(())
    assert float(zero) == pytest.approx(part["zero"], abs=1e-5)


def test_normal_floats_are_theirs():
    part, base = quantize("nf", "nf({})")
    wanted = np.asarray(part["levels"])[part["codes"]] * part["absmax"]
    np.testing.assert_allclose(base.dense()[:, 0], wanted, atol=1e-6)


def test_a_clipped_grid_and_its_gradients_are_theirs():
    part, w = group("clipping")
    clips = {"upper": one(part["upper"]), "lower": one(part["lower"])}
    w_hat, slopes, base = read(w, column(part["upstream"]), part["bits"], clips)
    np.testing.assert_array_equal(codes_of(base)[:, 0], part["codes"])
    wanted = part["scale"] * (np.asarray(part["codes"]) - part["zero"])
    np.testing.assert_allclose(w_hat[:, 0], wanted, atol=1e-6)
    for name in ("upper", "lower"):
        assert float(slopes[name].reshape(())) == pytest.approx(part[f"grad_{name}"], rel=2e-5)


def test_gradients_of_a_trained_grid_are_theirs():
    part, w = group("efficientqat")
    upstream = column(SLICES["clipping"]["upstream"])
    came = gradients(w, one(part["scale"]), one(part["zero"]), upstream, part["bits"])
    w_hat, _, of_scale, of_zero = came
    zero = np.clip(np.round(part["zero"]), 0, 2 ** part["bits"] - 1)
    wanted = part["scale"] * (np.asarray(part["codes"]) - zero)
    np.testing.assert_allclose(w_hat[:, 0], wanted, atol=1e-6)
    assert float(of_scale.reshape(())) == pytest.approx(part["grad_scale"], rel=2e-5)
    assert float(of_zero.reshape(())) == pytest.approx(part["grad_zero"], rel=2e-5)


def test_two_of_four_are_theirs():
    part = SLICES["wanda"]
    w = column(SLICES["hqq"]["w"], len(part["keep"]))
    stats = LinearStats(rms=jnp.sqrt(jnp.asarray(part["scaler_row"], jnp.float32)))
    start = CompressedLinear(Dense(jnp.asarray(w)))
    leaf = run(f"wanda(sparsity='{part['pattern']}')", w, stats, start)
    np.testing.assert_array_equal(leaf.base.kept()[:, 0], np.asarray(part["keep"], bool))


def test_slices_are_of_the_files(linear, golden):
    np.testing.assert_allclose(linear.w[:64, 3], SLICES["hqq"]["w"], rtol=1e-8)
    files = {
        "rtn": ("qera", "base.codes"),
        "hqq": ("hqq", "w2_axis1_floatzero_noopt.codes"),
        "nf": ("loftq", "nf4.it1.codes"),
        "clipping": ("lwc_quantizer", "w3_asym.rand.codes"),
        "efficientqat": ("efficientqat_quantizer", "w3_moved.codes"),
    }
    for name, (file, key) in files.items():
        codes = SLICES[name]["codes"]
        np.testing.assert_array_equal(golden(file)[key][: len(codes), 3], codes)
