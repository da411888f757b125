"""The plain module: ordinary parameters, checked by linen, and the decoder's own logits."""

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import forward, init_params, model_fns
from lqec_jax.models.flax_module import Decoder

CONFIG = ModelConfig("llama", vocab_size=16, d_model=8, d_ff=8, layers=2, heads=2, kv_heads=2,
                     head_dim=4, max_length=8)  # fmt: skip
TOKENS = np.arange(12).reshape(2, 6)


def build(values, weights):
    assert weights == {"bits": (2,)}
    return {**values, "blocks": (values["blocks"]["0"],)}


@pytest.fixture(scope="module")
def plain():
    params = init_params(CONFIG, jax.random.key(0))
    return {**params, "blocks": {"0": params["blocks"][0]}}


@pytest.fixture(scope="module")
def module(plain):
    def freeze(node):
        if isinstance(node, dict):
            return FrozenDict({key: freeze(value) for key, value in node.items()})
        return jax.ShapeDtypeStruct(node.shape, node.dtype)

    return Decoder(model_fns(CONFIG), freeze(plain), FrozenDict({"bits": (2,)}), build)


def test_apply_gives_the_decoders_logits(module, plain):
    wanted = forward(CONFIG, build(plain, {"bits": (2,)}), TOKENS)
    got = jax.jit(module.apply)({"params": plain}, TOKENS)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_init_gives_zeros_of_the_same_tree(module, plain):
    made = jax.eval_shape(module.init, jax.random.key(0), TOKENS)["params"]
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), made, plain)
    assert jax.tree.all(same)


def test_linen_checks_the_shapes(module, plain):
    wrong = {**plain, "norm": {"scale": jnp.ones(9)}}
    with pytest.raises(flax.errors.ScopeParamShapeError, match="scale"):
        module.apply({"params": wrong}, TOKENS)
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match="scale"):
        module.apply({"params": {**plain, "norm": {}}}, TOKENS)


def test_it_is_hashable_and_equal_to_its_like(module):
    assert hash(module) == hash(module.clone()) and module == module.clone()


def test_it_is_differentiable(module, plain):
    def loss(scale):
        return module.apply({"params": {**plain, "norm": {"scale": scale}}}, TOKENS).sum()

    slope = jax.grad(loss)(plain["norm"]["scale"])
    assert float(jnp.abs(slope).max()) > 0.1
