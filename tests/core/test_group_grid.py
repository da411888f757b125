"""A grid as a method's arguments describe it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import grids
from lqec_jax.core.grids import group_rows
from lqec_jax.core.group_grid import GroupGrid, make_grid
from lqec_jax.errors import InputError

W = jnp.asarray(np.random.RandomState(0).standard_normal((32, 6)), jnp.float32)
RMS = jnp.asarray(np.exp(np.random.RandomState(1).standard_normal(32)), jnp.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("search", "power"), [(None, None), ("weight", 2.4), ("output", 2.0)])
def test_fitting_rounding_and_packing_is_plain_rounding(symmetric, search, power):
    grid = GroupGrid(3, 8, symmetric, search)

    @jax.jit
    def both(w, rms):
        grouped = group_rows(w, grid.size("m", 32))
        scales, zeros = grid.fit(grouped, jnp.square(rms).reshape(-1, 8, 1))
        codes, w_hat = grid.round(grouped, scales, zeros)
        base = grid.pack(codes.reshape(w.shape), scales[:, 0], zeros[:, 0])
        said = {"symmetric": symmetric, "dtype": jnp.float16}
        if power is None:
            wanted = grids.fit_grid(*grids.find_range(grouped, symmetric=symmetric), 3, **said)
        else:
            weight = jnp.square(rms).reshape(-1, 8, 1) if power == 2 else jnp.ones((4, 8, 1))
            wanted = grids.search_clip(grouped, 3, weight, power=power, **said)
        rounded = grids.dequantize(grids.round_to_grid(grouped, *wanted, 3), *wanted)
        return base.dense(), w_hat.reshape(w.shape), rounded.reshape(w.shape)

    dense, w_hat, rounded = both(W, RMS)
    np.testing.assert_array_equal(dense, rounded)
    np.testing.assert_array_equal(w_hat, rounded)


def test_arguments_become_a_grid():
    said = {"bits": 2, "group_size": None, "symmetric": True}
    assert make_grid("m", **said) == GroupGrid(2, None, True, None, jnp.dtype("float16"))
    for search in (True, "weight"):
        assert make_grid("m", **said, clip_search=search).clip_search == "weight"
    assert make_grid("m", **said, clip_search="output").clip_search == "output"
    assert make_grid("m", **said).size("m", 48) == 48
    with pytest.raises(InputError, match="m: d_in=48 is not divisible by group_size=32"):
        GroupGrid(2, 32).size("m", 48)


@pytest.mark.parametrize("wrong", [{"bits": 0}, {"group_size": 0}, {"symmetric": None},
                                   {"clip_search": "mse"}, {"scale_dtype": "int8"}])  # fmt: skip
def test_other_arguments_are_refused(wrong):
    said = {"bits": 2, "group_size": 8, "symmetric": True} | wrong
    with pytest.raises(InputError, match=f"^m: {next(iter(wrong))}="):
        make_grid("m", **said)
