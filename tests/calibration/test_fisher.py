"""The diagonal Fisher, block by block, is that of the whole model's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.calibration import fisher
from lqec_jax.core import walking
from lqec_jax.core.tree import get_at, unstack_blocks
from lqec_jax.models.decoder import model_fns
from tests.train.tiny import draw_decoder, make_config

WINDOWS = np.random.RandomState(0).randint(0, 64, (5, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    """A decoder of two blocks, its linears dense."""
    config = make_config(layers=2, d=32, d_ff=64, kv_heads=2)
    params = draw_decoder(config, (2,))
    fns = model_fns(config, remat=False)
    (segment,) = params["blocks"]
    for path in fns.linears:
        part, name = path.split("/")
        segment[part][name]["kernel"] = segment[part][name]["kernel"].dense()
    return fns, jax.tree.map(jnp.asarray, params)


def square_whole_gradients(fns, params):
    """Returns the mean over windows of the squared gradient of a window's summed loss."""

    def loss(blocks, tokens):
        post_norm = fns.hidden({**params, "blocks": blocks}, tokens[None])[1]
        logits = jax.nn.log_softmax(fns.head(params, post_norm)[0, :-1])
        return -jnp.sum(jnp.take_along_axis(logits, tokens[1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))
    squares = [jax.tree.map(jnp.square, gradient(params["blocks"], t)) for t in WINDOWS]
    return jax.tree.map(lambda *several: sum(several) / len(several), *squares)


def test_it_is_the_mean_square_of_the_whole_model_s_gradient(model, tmp_path, monkeypatch):
    fns, params = model
    # Two windows together, and one that is left over.
    monkeypatch.setattr(walking, "STREAM_TOKENS", 24)
    blocks = unstack_blocks(params["blocks"])
    found = fisher.diagonal_fisher(fns, params, lambda layer: blocks[layer], 2, WINDOWS, tmp_path)
    found = dict(found)
    assert list(found) == [1, 0]
    assert not list(tmp_path.iterdir())
    expected = unstack_blocks(square_whole_gradients(fns, params))
    for layer in range(2):
        assert set(found[layer]) == set(fns.linears)
        for path in fns.linears:
            wanted = get_at(expected[layer], f"{path}/kernel")
            came = found[layer][path]
            assert came.dtype == np.float32 and float(wanted.max()) > 0
            np.testing.assert_allclose(came, wanted, rtol=1e-3, atol=1e-4 * float(wanted.max()))
