"""vmap of a product that nothing can look into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.batching import join_rows
from tests.kernels.products import draw


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, None), (None, 0, None), (0, None, 0)])
def test_rows_join_and_weights_take_turns(axes):
    calls = []

    def multiply(rows, weight, layer):
        calls.append(rows.shape)
        return rows @ weight["w"] * (1 if layer is None else layer)

    shapes = ((4, 3), (3, 2), ())
    x, w, layer = (
        jnp.asarray(draw(*shape) if axis is None else draw(5, *shape))
        for shape, axis in zip(shapes, axes, strict=True)
    )
    came = jax.vmap(join_rows(multiply), in_axes=axes)(x, {"w": w}, layer)
    wanted = jax.vmap(lambda x, w, layer: x @ w * layer, in_axes=axes)(x, w, layer)
    np.testing.assert_allclose(came, wanted, rtol=1e-6)
    assert calls[-1] == ((20, 3) if axes == (0, None, None) else (4, 3))


def test_batches_of_batches_and_of_nothing():
    run = join_rows(lambda rows, weight, layer: rows @ weight)
    x, w = jnp.asarray(draw(2, 5, 4, 3)), jnp.asarray(draw(3, 2))
    twice = jax.vmap(jax.vmap(run, in_axes=(0, None, None)), in_axes=(0, None, None))
    np.testing.assert_allclose(twice(x, w, None), x @ w, rtol=1e-6)
    assert jax.vmap(run, in_axes=(0, None, None))(x[0, :, :0], w, None).shape == (5, 0, 2)
