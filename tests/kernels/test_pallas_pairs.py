"""Weights opened by twos: exact in bfloat16, each at its input's place, sums as of float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels import repack_for_kernels
from lqec_kernels.pallas_matmul import pallas_matmul
from lqec_kernels.pallas_pairs import can_pair, interleave, multiply_pairs, open_pairs
from lqec_kernels.planes import join_planes
from tests.kernels.products import assert_near, draw, draw_affine, multiply_densely


def test_the_halves_of_a_unit_lie_one_in_the_other():
    x = np.asarray(interleave(jnp.arange(512.0).reshape(1, 512)))[0]
    np.testing.assert_array_equal(x[:6], [0, 128, 1, 129, 2, 130])
    np.testing.assert_array_equal(x[254:258], [127, 255, 256, 384])
    assert sorted(x) == list(range(512))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_is_what_stands_behind_the_point_of_its_number(bits):
    base = repack_for_kernels(draw_affine(bits, 512, 5, group=64))

    @jax.jit
    def read(planes):
        refs = [jax.new_ref(plane) for plane in planes]
        return [open_pairs(refs, jnp.int32(step), bits) for step in range(2)]

    opened = jnp.concatenate(read(base.planes))
    assert opened.dtype == jnp.bfloat16
    codes = join_planes(base.planes, bits, 256, 512).astype(jnp.float32)
    np.testing.assert_array_equal(opened, interleave(1 + codes.T / 2**bits).T)


# bits, kind, d_in, group, rows: one number of a unit, several, and one for several units.
CASES = {
    "2 bits, four groups": (2, "floating", 1280, 64, 3),
    "3 bits, groups of 384": (3, "packed", 768, 384, 1),
    "4 bits, symmetric": (4, "symmetric", 512, 128, 16),
    "2 bits, one group": (2, "packed", 512, 512, 5),
    "4 bits, groups of two units": (4, "floating", 1024, 512, 2),
    "3 bits, half a unit too few": (3, "floating", 640, 32, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_float32(case):
    bits, kind, d_in, group, m = CASES[case]
    base = repack_for_kernels(draw_affine(bits, d_in, 130, group=group, kind=kind))
    x = jnp.asarray(draw(m, d_in), jnp.bfloat16)
    assert can_pair(base, m, x.dtype)

    @jax.jit
    def multiply(x, columns):
        x = interleave(jnp.pad(x, ((0, 0), (0, -d_in % 256))))
        refs = [jax.new_ref(array) for array in columns if array is not None]
        return multiply_pairs(jax.new_ref(x[None]), refs, base.layout)

    wanted = np.asarray(x, np.float64) @ np.asarray(base.dense(), np.float64)
    assert_near(multiply(x, base.columns()), jnp.asarray(wanted, jnp.float32), 1e-6)


def test_is_taken_for_few_rows_of_bfloat16_only():
    base = repack_for_kernels(draw_affine(2, 512, 5, group=64))
    assert can_pair(base, 16, jnp.bfloat16) and not can_pair(base, 17, jnp.bfloat16)
    assert can_pair(repack_for_kernels(draw_affine(2, 512, 5, group=512)), 64, jnp.bfloat16)
    assert not can_pair(base, 1, jnp.float32)
    assert not can_pair(repack_for_kernels(draw_affine(8, 512, 5, group=64)), 1, jnp.bfloat16)
    assert not can_pair(repack_for_kernels(draw_affine(2, 64, 5, group=64)), 1, jnp.bfloat16)


@pytest.mark.parametrize("m", [1, 20])
def test_the_kernel_takes_it_where_it_can(m):
    base = repack_for_kernels(draw_affine(2, 320, 130, group=64, kind="floating"))
    a, b = jnp.asarray(draw(320, 4) / 8), jnp.asarray(draw(4, 130, seed=1) / 8)
    x = jnp.asarray(draw(m, 320), jnp.bfloat16)
    # x beside itself interleaved is what is multiplied by pairs.
    assert (f"bf16[2,{m},512]" in str(jax.make_jaxpr(pallas_matmul)(x, base, (a, b)))) == (m == 1)
    whole = partial(multiply_densely, x, base)()
    y = jax.jit(pallas_matmul)(x, base, (a, b))
    added = jnp.asarray(x, jnp.float32) @ a @ b
    assert_near(y, (whole.astype(jnp.float32) + added).astype(jnp.bfloat16), 1e-2)
