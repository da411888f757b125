"""A packed model as a plain linen module: here, in a new process, and through nnx."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.flax import load
from tests.io.packed_models import make_model

TOKENS = np.arange(32).reshape(2, 16)
APPLY = """
import sys
import jax
import numpy as np
import lqec_jax
folder, out = sys.argv[1:]
module, params = lqec_jax.load_flax(folder)
tokens = np.arange(32).reshape(2, 16)
np.save(out, jax.jit(module.apply)({"params": params}, tokens))
"""


@pytest.fixture(scope="module")
def model():
    """Two structures, so two segments."""
    return make_model((2, 3), (2, 1), False)


@pytest.fixture(scope="module")
def logits(model):
    return np.asarray(lqec.logits(model, TOKENS))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return export_model(model, tmp_path_factory.mktemp("flax") / "out", "flax").folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load(folder)


def test_the_tree_is_plain_and_packed(model, loaded):
    _, params = loaded
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {type(jnp.ones(1))}
    q = params["blocks"]["1"]["attn"]["q"]
    assert q["base"]["codes"].dtype == jnp.uint32 and q["base"]["codes"].shape == (1, 3, 32)
    assert q["corrections"]["0"]["a"].shape == (1, 32, 1)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]))
    assert stored == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["blocks"]))


def test_apply_gives_the_models_logits(loaded, logits):
    module, params = loaded
    got = np.asarray(jax.jit(module.apply)({"params": params}, TOKENS))
    assert np.abs(got - logits).max() <= 1e-5 < np.abs(logits).max()


def test_so_it_does_in_a_new_process(folder, logits, tmp_path):
    subprocess.run(
        [sys.executable, "-c", APPLY, str(folder), str(tmp_path / "logits.npy")],
        env={"PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=300,
    )
    assert np.abs(np.load(tmp_path / "logits.npy") - logits).max() <= 1e-5


def test_so_it_does_through_nnx(loaded, logits):
    nnx = pytest.importorskip("flax.nnx")
    module, params = loaded

    def init():
        return nnx.bridge.ToNNX(module).lazy_init(TOKENS, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(init)
    nnx.update(model, nnx.State(params))
    got = nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS)
    assert np.abs(np.asarray(got) - logits).max() <= 1e-5


def test_unpacked_it_is_the_same_model(model, logits, tmp_path):
    folder = export_model(model, tmp_path / "out", "flax", dense=True).folder
    module, params = load(folder)
    assert params["blocks"]["1"]["attn"]["q"]["kernel"].shape == (1, 32, 32)
    got = np.asarray(jax.jit(module.apply)({"params": params}, TOKENS))
    assert np.abs(got - logits).max() <= 1e-4


def test_a_dtype_leaves_codes_alone(model, tmp_path):
    _, params = load(export_model(model, tmp_path / "out", "flax", dtype="bfloat16").folder)
    q = params["blocks"]["0"]["attn"]["q"]
    assert (q["base"]["codes"].dtype, q["base"]["scales"].dtype) == (jnp.uint32, jnp.bfloat16)


def test_another_folder_is_refused(model, tmp_path):
    folder = export_model(model, tmp_path / "out", "hf").folder
    with pytest.raises(InputError, match="no flax export"):
        load(folder)
