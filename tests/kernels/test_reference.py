"""The tiled product: equal to the dense one forward and backward, and never dense in memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from lqec_kernels.formats import Affine, Dense
from lqec_kernels.packing import words_for
from lqec_kernels.reference import TILE_ELEMENTS, _cut, _forward_elements, tiled_matmul
from tests.compiling import options_for_memory

D_IN, GROUP = 64, 16
KINDS = ("symmetric", "packed", "floating")


def draw_base(d_out: int, kind: str = "packed", lead: tuple = ()) -> Affine:
    """Returns a 2-bit weight; any words are codes, so they are drawn as they are."""
    random = np.random.RandomState(d_out)
    groups = D_IN // GROUP

    def words(*shape: int) -> np.ndarray:
        return random.randint(0, 2**32, (*lead, *shape), dtype=np.uint32)

    zeros = {
        "symmetric": None,
        "packed": words(groups, words_for(d_out, 2)),
        "floating": (random.rand(*lead, groups, d_out) * 3).astype(np.float32),
    }[kind]
    scales = (0.1 + random.rand(*lead, groups, d_out)).astype(np.float32)
    base = Affine(words(words_for(D_IN, 2), d_out), scales, zeros, 2, GROUP, D_IN)
    return jax.tree.map(jnp.asarray, base)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def dense_matmul(x: jax.Array, base) -> jax.Array:
    return jnp.matmul(x, base.dense(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


@partial(jax.jit, static_argnames="shards")
def both_ways(x, dy, base, shards=1):
    """Returns ((y, dx) tiled, (y, dx) dense)."""

    def run(multiply):
        y, pull = jax.vjp(lambda x: multiply(x, base), x)
        return y, pull(dy)[0]

    return run(partial(tiled_matmul, shards=shards)), run(dense_matmul)


def assert_near(came, wanted, tolerance: float) -> None:
    """Compares trees of arrays, each relative to its largest entry."""
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert (c.shape, c.dtype) == (w.shape, w.dtype)
        c, w = np.asarray(c, np.float64), np.asarray(w, np.float64)
        assert np.abs(c - w).max() <= tolerance * np.abs(w).max()


@pytest.mark.parametrize(
    ("d_out", "dtype", "tolerance"),
    [(d_out, "float32", 1e-4) for d_out in (1, 12, 31, 45)] + [(31, "bfloat16", 1e-2)],
)
def test_equals_the_dense_product_both_ways(d_out, dtype, tolerance):
    x, dy = jnp.asarray(draw(5, D_IN), dtype), jnp.asarray(draw(5, d_out), dtype)
    came, wanted = both_ways(x, dy, draw_base(d_out))
    assert came[0].dtype == came[1].dtype == dtype
    assert_near(came, wanted, tolerance)


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [
        ((4096, 11008), 64, 688),
        ((11008, 4096), 32, 256),
        ((128, 352), 176, 176),  # small ones are cut in two
        ((768, 1006), 503, 503),  # 2 · 503: no narrow tiles for want of others
        ((4096, 2 * 5003), 2, 2),  # none but those are small enough
        ((48, 7), 1, 1),
    ],
)
def test_forward_tiles_fit_a_cache_and_backward_ones_are_few(shape, forward, backward):
    widths = [_cut(*shape, 1, 2, e).width for e in (_forward_elements(shape[0]), TILE_ELEMENTS)]
    assert widths == [forward, backward]
    assert _cut(*shape, 1, 4, TILE_ELEMENTS).tiles >= min(4, shape[1])


def test_passes_that_are_cut_differently_agree():
    x, dy, w = draw(2, 1024), draw(2, 256), draw(1024, 256, seed=1)
    assert _cut(1024, 256, 1, 2, _forward_elements(1024)).tiles == 4
    y, pull = jax.vjp(lambda x: tiled_matmul(x, Dense(w)), x)
    assert_near((y, pull(dy)[0]), (x @ w, dy @ w.T), 1e-5)


@pytest.mark.parametrize(("shards", "d_out"), [(2, 16), (4, 24), (4, 18)])
def test_shards_change_nothing(shards, d_out):
    # 18 columns are not 4 equal shares; they are then walked as one.
    came, wanted = both_ways(draw(3, D_IN), draw(3, d_out), draw_base(d_out), shards=shards)
    assert_near(came, wanted, 1e-5)


@pytest.mark.parametrize(
    ("kind", "d_out", "shards"),
    [*((kind, 13, 1) for kind in KINDS), ("floating", 12, 2)],
)
def test_gradients_of_scales_and_zeros_equal_dense_autodiff(kind, d_out, shards):
    base, x = draw_base(d_out, kind), draw(2, 3, D_IN)

    @partial(jax.jit, static_argnums=0)
    def gradients(multiply, base, x):
        def loss(floats, x):
            scales, zeros = floats if kind == "floating" else (floats[0], base.zeros)
            whole = Affine(base.codes, scales, zeros, 2, GROUP, D_IN)
            return jnp.sum(jnp.sin(multiply(x, whole)))

        return jax.grad(loss, (0, 1))((base.scales, base.zeros)[: 1 + (kind == "floating")], x)

    came = gradients(partial(tiled_matmul, shards=shards), base, x)
    wanted = gradients(dense_matmul, base, x)
    assert len(jax.tree.leaves(came)) == (3 if kind == "floating" else 2)
    assert_near(came, wanted, 1e-5)


def test_codes_and_packed_zeros_get_float0():
    base, x = draw_base(6), draw(2, D_IN)
    grad = jax.grad(lambda base: jnp.sum(tiled_matmul(x, base)), allow_int=True)(base)
    assert (grad.codes.dtype, grad.codes.shape) == (jax.dtypes.float0, base.codes.shape)
    assert (grad.zeros.dtype, grad.zeros.shape) == (jax.dtypes.float0, base.zeros.shape)
    assert np.abs(grad.scales).max() > 0


def test_a_dense_base_is_trained_through_it():
    w, x = draw(D_IN, 6), draw(4, D_IN, seed=1)
    came = jax.jit(jax.grad(lambda w: jnp.sum(tiled_matmul(x, Dense(w)) ** 2)))(w)
    assert_near(came, (2 * x.T @ (x @ w)), 1e-5)


def test_leading_axes_are_batch():
    base, x = draw_base(12), draw(2, 3, 4, D_IN)
    came, wanted = both_ways(x, draw(2, 3, 4, 12), base)
    assert came[0].shape == (2, 3, 4, 12)
    assert_near(came, wanted, 1e-5)
    one = jax.jit(tiled_matmul)(x[0, 1, 2], base)
    assert_near(one, came[0][0, 1, 2], 1e-6)


def test_vmap_over_a_stack_with_gradients():
    stack, x = draw_base(12, "floating", lead=(3,)), draw(3, 5, D_IN)

    @partial(jax.jit, static_argnums=0)
    def gradients(multiply, scales, x):
        def loss(scales, x):
            layers = Affine(stack.codes, scales, stack.zeros, 2, GROUP, D_IN)
            return jnp.sum(jnp.sin(jax.vmap(multiply)(x, layers)))

        return jax.grad(loss, (0, 1))(scales, x)

    came = gradients(tiled_matmul, stack.scales, x)
    assert_near(came, gradients(dense_matmul, stack.scales, x), 1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_a_stack_with_gradients(remat):
    stack, x = draw_base(D_IN, lead=(3,)), draw(4, D_IN)

    @jax.jit
    def answers(x):
        def run(multiply):
            def layer(x, base):
                return jnp.tanh(multiply(x, base) / 30), None

            step = jax.checkpoint(layer) if remat else layer
            return jax.value_and_grad(lambda x: jnp.sum(jax.lax.scan(step, x, stack)[0] ** 2))(x)

        return run(tiled_matmul), run(dense_matmul)

    came, wanted = answers(x)
    assert_near(came, wanted, 1e-4)


def test_a_product_that_nothing_differentiates_adds_no_gradient():
    base, x = draw_base(12), draw(2, D_IN)

    def loss(x):
        return jnp.sum(x**2) + jnp.sum(jax.lax.stop_gradient(tiled_matmul(x, base)))

    assert_near(jax.jit(jax.grad(loss))(x), 2 * x, 0.0)


def test_what_is_not_finite_stays_in_its_own_row():
    x, dy = draw(3, D_IN), draw(3, 12)
    came, _ = both_ways(x, dy, draw_base(12))
    x[1, 0], dy[2, 0] = np.nan, np.inf
    (y, dx), _ = both_ways(x, dy, draw_base(12))
    assert np.isnan(y[1]).all() and not np.isfinite(dx[2]).any()
    np.testing.assert_array_equal(y[::2], came[0][::2])
    np.testing.assert_array_equal(dx[:2], came[1][:2])


def test_under_shard_map_with_a_weight_that_every_device_holds():
    if jax.device_count() < 2:
        pytest.skip("one device")
    base, x = draw_base(12, "floating"), draw(4, D_IN)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    @partial(jax.jit, static_argnums=0)
    def gradients(multiply, floats, x):
        def loss(floats, x):
            whole = Affine(base.codes, *floats, 2, GROUP, D_IN)
            return jnp.sum(jnp.sin(multiply(x, whole)))

        return jax.grad(loss, (0, 1))(floats, x)

    def split(x, whole):
        share = jax.shard_map(
            tiled_matmul, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec()),
            out_specs=PartitionSpec("data"),
        )  # fmt: skip
        return share(x, whole)

    floats = (base.scales, base.zeros)
    assert_near(gradients(split, floats, x), gradients(dense_matmul, floats, x), 1e-5)


def test_neither_direction_holds_the_dense_weight():
    random = np.random.RandomState(0)
    d, layers = 512, 4
    codes = random.randint(0, 2**32, (layers, words_for(d, 2), d), dtype=np.uint32)
    scales = (random.rand(layers, d // GROUP, d) / d).astype(np.float16)
    stack = Affine(codes, scales, None, 2, GROUP, d)

    def temporary(multiply) -> int:
        def loss(x, stack):
            layer = lambda x, base: (jnp.tanh(multiply(x, base)), None)  # noqa: E731
            return jnp.sum(jax.lax.scan(layer, x, stack)[0])

        lowered = jax.jit(jax.grad(loss)).lower(draw(2, d), stack)
        compiled = lowered.compile(compiler_options=options_for_memory())
        return compiled.memory_analysis().temp_size_in_bytes

    one_matrix = 4 * d * d
    tiled, dense = temporary(tiled_matmul), temporary(dense_matmul)
    assert tiled < one_matrix
    assert dense > 2 * one_matrix


def test_accelerators_take_fewer_larger_tiles(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    elements = _forward_elements(4096)
    assert _cut(4096, 11008, 1, 2, elements).tiles == 4
    assert _cut(4096, 4096, 1, 2, elements).tiles == 2
