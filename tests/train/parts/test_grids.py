"""A grid in training: scales, zeros and the weights on it, each read as it will be stored."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.scales import smallest
from lqec_jax.errors import InputError
from lqec_jax.train.parts import Grid, Scales, Zeros
from lqec_jax.train.parts.grids import OnGrid
from lqec_jax.train.rates import Rates
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import Affine, CompressedLinear, Dense, LowRank
from lqec_kernels.packing import unpack
from lqec_kernels.sparse import Masked

KEY = jax.random.key(0)
W = jnp.asarray(np.random.RandomState(0).standard_normal((32, 8)), jnp.float32)
CODES = jnp.asarray(np.random.RandomState(1).randint(0, 4, (32, 8)), jnp.uint8)
SCALES = jnp.asarray(np.random.RandomState(2).uniform(0.1, 1, (2, 8)), jnp.float16)
WHOLE = jnp.asarray(np.random.RandomState(3).randint(0, 4, (2, 8)), jnp.uint8)


def affine(zeros=WHOLE, scales=SCALES) -> CompressedLinear:
    return CompressedLinear(Affine.from_codes(CODES, scales, zeros, bits=2, group_size=16))


def labelled(part, leaf) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(leaf)
    return [jax.tree_util.keystr(path) for path, array in paths if part.label(path, array)]


def move(part, leaf, by: float) -> CompressedLinear:
    """Adds to what moves, as an update would, in float32."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: a.astype(jnp.float32) + by if part.label(path, a) else a, leaf
    )


# Scales


def test_scales_alone_move_and_are_stored_as_they_came():
    part, leaf = Scales(), replace(affine(), corrections=(LowRank(W[:, :2], W[:2]),))
    assert part.begin(leaf, KEY) is part.read(leaf) is leaf
    assert labelled(part, leaf) == [".base.scales"]
    moved = move(part, leaf, 0.25)
    kept = part.keep(moved, leaf)
    np.testing.assert_array_equal(kept.base.scales, (SCALES.astype(jnp.float32) + 0.25).astype(
        jnp.float16))  # fmt: skip
    for name in ("codes", "zeros"):
        assert getattr(kept.base, name) is getattr(leaf.base, name)
    assert part.count(leaf) == 16


def test_scales_stay_within_what_their_dtype_holds_and_keep_their_sign():
    """None becomes zero, or infinite: the nearest that is neither stands for it."""
    moved = jnp.array([[0.0, 1e-9, 1e6, -1e-9, -1e6, 0.3, -0.3, 1.0]])
    codes = jnp.zeros((16, 8), jnp.uint8)
    given = CompressedLinear(
        Affine.from_codes(codes, jnp.ones((1, 8), jnp.float16), None, bits=2, group_size=16)
    )
    trained = replace(given, base=replace(given.base, scales=moved))
    least, most = smallest(jnp.float16), 65504.0
    wanted = np.array([[least, least, most, -least, -most, 0.3, -0.3, 1.0]], np.float16)
    np.testing.assert_array_equal(Scales().keep(trained, given).base.scales, wanted)
    exact = replace(given, base=replace(given.base, scales=jnp.ones((1, 8))))
    assert Scales().keep(trained, exact).base.scales is moved


def test_a_base_s_own_names_of_scales_are_found():
    planes = BitPlanes(jnp.zeros((1, 8), jnp.uint32), jnp.ones((1, 1, 8)), None, 1, 32, 32)
    leaf = CompressedLinear(Masked.from_mask(affine().base, W > 0))
    assert labelled(Scales(), leaf) == [".base.inner.scales"]
    assert labelled(Scales(), CompressedLinear(planes)) == [".base.alphas"]
    with pytest.raises(InputError, match="a_method: a Dense base has no scales to train; put a"):
        Scales().named("a_method").begin(CompressedLinear(Dense(W)), KEY)


# Zeros


REAL = jnp.asarray(np.random.RandomState(4).uniform(0, 3, (2, 8)), jnp.float32)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("zeros", [WHOLE, None, WHOLE.astype(jnp.float16)])
def test_zeros_begin_as_what_they_were_and_are_stored_as_they_were_read(zeros, whole):
    part, leaf = Zeros(whole=whole), affine(zeros)
    begun = part.begin(leaf, KEY)
    assert begun.base.zeros.dtype == jnp.float32 and part.count(leaf) == 16
    assert labelled(part, begun) == [".base.zeros"]
    np.testing.assert_array_equal(part.read(begun).dense(), leaf.dense())
    np.testing.assert_array_equal(part.unmoved(begun, leaf).dense(), leaf.dense())
    moved = move(part, begun, 0.6)
    kept, read = part.keep(moved, leaf), part.read(moved)
    if whole:
        assert kept.base.zeros.dtype == jnp.uint32
        np.testing.assert_array_equal(kept.dense(), read.dense())
        whole_numbers = np.asarray(read.base.zeros)
        np.testing.assert_array_equal(whole_numbers, np.clip(np.round(whole_numbers), 0, 3))
    else:  # 11 bits of a number below 8, times a scale
        assert kept.base.zeros.dtype == jnp.float16
        np.testing.assert_allclose(kept.dense(), read.dense(), rtol=0, atol=8 * 2.0**-12)
    for name in ("codes", "scales"):
        assert getattr(kept.base, name) is getattr(leaf.base, name)


def test_integers_come_back_in_their_words():
    leaf = affine()
    part = Zeros(whole=True)
    np.testing.assert_array_equal(part.unmoved(part.begin(leaf, KEY), leaf).base.zeros,
                                  leaf.base.zeros)  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_real_zeros_stay_in_the_dtype_they_came_in(dtype):
    leaf = affine(REAL.astype(dtype))
    part = Zeros()
    kept = part.unmoved(part.begin(leaf, KEY), leaf)
    assert kept.base.zeros.dtype == dtype
    np.testing.assert_array_equal(kept.base.zeros, leaf.base.zeros)


def test_gradients_pass_the_rounding_of_zeros():
    part, begun = Zeros(whole=True), Zeros(whole=True).begin(affine(REAL), KEY)

    def total(zeros):
        return jnp.sum(part.read(replace(begun, base=replace(begun.base, zeros=zeros))).dense())

    # w = (u - z) s, so a group's sum falls by 16 s as its zero rises by one.
    np.testing.assert_allclose(jax.grad(total)(begun.base.zeros), -16 * SCALES.astype(jnp.float32))


def test_stacks_have_zeros_too():
    leaf = jax.tree.map(lambda a: jnp.stack([a, a]), affine())
    for part in (Zeros(), Zeros(whole=True)):
        kept = part.unmoved(part.begin(leaf, KEY), leaf)
        one = part.unmoved(part.begin(affine(), KEY), affine())
        np.testing.assert_array_equal(kept.base.zeros[1], one.base.zeros)
        np.testing.assert_array_equal(kept.dense(), leaf.dense())


def test_a_base_without_zeros_is_refused():
    with pytest.raises(InputError, match="a_method: a Dense base has no zeros to train; put a un"):
        Zeros().named("a_method").begin(CompressedLinear(Dense(W)), KEY)


# Weights, scales and zeros together


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_grid_is_read_as_it_is_stored(symmetric):
    part = Grid(grid=GroupGrid(2, 16, symmetric))
    leaf = CompressedLinear(Dense(W), (LowRank(jnp.ones((32, 2)), jnp.ones((2, 8)) / 9),))
    begun = part.begin(leaf, KEY)
    assert isinstance(begun.base, OnGrid) and (begun.base.d_in, begun.base.d_out) == (32, 8)
    assert part.count(leaf) == 32 * 8 + 2 * 8 * (1 if symmetric else 2)
    moved = move(part, begun, 0.3)
    kept, read = part.keep(moved, leaf), part.read(moved)
    np.testing.assert_array_equal(kept.base.dense(), read.base.dense())
    assert kept.corrections is moved.corrections
    first = part.keep(begun, leaf)
    assert bool(jnp.any(unpack(first.base.codes, 2, 32) != unpack(kept.base.codes, 2, 32)))


def test_weights_and_the_grid_have_rates_of_their_own():
    part = Grid(grid=GroupGrid(2, 16), rates=Rates(0.1, "constant"),
                grid_rates=Rates(0.02, "constant"))  # fmt: skip
    begun = part.begin(CompressedLinear(Dense(W)), KEY)
    labels = {part.label(path, a) for path, a in jax.tree_util.tree_leaves_with_path(begun)}
    assert labels == {None, "weights", "grid"}
    for name, rate in (("weights", 0.1), ("grid", 0.02)):
        optimizer = part.optimizers(64, 10)[name]
        step, _ = optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)), jnp.ones(3))
        np.testing.assert_allclose(step, -rate, rtol=1e-4)
