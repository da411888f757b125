"""What a machine multiplies fastest by: the rule, and that nothing else changes."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels import dense_copy as module
from lqec_kernels.dense_copy import DenseCopy, ready
from lqec_kernels.formats import Affine, CompressedLinear, Dense, LowRank
from lqec_kernels.planes import Planes


def draw_leaf(d_in: int, d_out: int, layers: int = 2) -> CompressedLinear:
    random = np.random.RandomState(0)
    codes = random.randint(0, 4, (layers, d_in, d_out)).astype(np.uint8)
    scales = random.rand(layers, d_in // 32, d_out).astype(np.float16)
    base = Affine.from_codes(codes, scales, None, bits=2, group_size=32)
    factors = jnp.ones((layers, d_in, 2)), jnp.ones((layers, 2, d_out))
    return CompressedLinear(base, (LowRank(*factors),))


def test_on_a_cpu_small_weights_become_dense_and_large_ones_stay(monkeypatch, caplog):
    monkeypatch.setattr(module, "DENSE_ELEMENTS", 64 * 32)
    tree = {"small": draw_leaf(64, 32), "large": draw_leaf(64, 48), "norm": jnp.ones(3)}
    with caplog.at_level(logging.INFO, "lqec_kernels.dense_copy"):
        made = ready(tree, dtype=jnp.bfloat16, platform="cpu")
    assert caplog.messages == [
        "1 stacks of weights become dense copies on a CPU",
        "1 stacks of weights stay as they are on a CPU",
    ]
    small = made["small"]
    assert isinstance(small.base, DenseCopy) and small.base.w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(small.base.w, tree["small"].base.dense(jnp.bfloat16))
    assert small.corrections is tree["small"].corrections
    assert made["large"] is tree["large"] and made["norm"] is tree["norm"]
    assert ready(made, platform="cpu")["small"] is small


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_elsewhere_weights_are_in_the_order_of_the_kernels(platform):
    leaf = draw_leaf(64, 32)
    made = ready(leaf, platform=platform, dtype=jnp.bfloat16)
    assert isinstance(made.base, Planes)
    np.testing.assert_array_equal(made.dense(), leaf.dense())
    on_tpu = platform == "tpu"
    assert made.base.scales.dtype == (jnp.float32 if on_tpu else jnp.float16)
    assert made.base.planes[0].dtype == jnp.uint32
    assert made.corrections[0].a.dtype == (jnp.bfloat16 if on_tpu else jnp.float32)


def test_it_takes_the_platform_that_jax_runs_on():
    leaf = CompressedLinear(Dense(jnp.ones((4, 4))))
    assert jax.default_backend() == "cpu" and ready(leaf) is leaf
    assert isinstance(ready(draw_leaf(32, 8)).base, DenseCopy)
