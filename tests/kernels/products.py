"""What every implementation of the product must do: equal the reference, forward and backward."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

import lqec_kernels
from lqec_kernels.api import packed_matmul
from lqec_kernels.codebook import Codebook, DoubleScales
from lqec_kernels.formats import Affine, LowRank
from lqec_kernels.sparse import Sparse24

# Op by op, either compiles a dozen programs.
prepare = jax.jit(lqec_kernels.prepare)
dense_of = jax.jit(lambda base: base.dense())
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@cache
def draw_affine(
    bits: int, d_in: int, d_out: int, *, group: int, kind: str = "packed", lead: tuple = ()
) -> Affine:
    """Returns a weight of random codes; zeros are None, integers or floating by its kind."""
    random = np.random.RandomState(bits + d_in)
    shape = (*lead, d_in // group, d_out)
    zeros = {
        "symmetric": None,
        "packed": random.randint(0, 2**bits, shape).astype(np.uint8),
        "floating": (random.rand(*shape) * 2**bits).astype(np.float16),
    }[kind]
    scales = (0.01 + random.rand(*shape) / d_in).astype(np.float16)
    codes = random.randint(0, 2**bits, (*lead, d_in, d_out)).astype(np.uint8)
    return jax.jit(partial(Affine.from_codes, bits=bits, group_size=group))(codes, scales, zeros)


@cache
def draw_codebook(
    bits: int, d_in: int, d_out: int, *, group: int = 0, double: bool = False, lead: tuple = ()
) -> Codebook:
    """Returns NormalFloat codes with scales, plain or double; without groups, levels a column."""
    random = np.random.RandomState(bits + d_in)
    codes = random.randint(0, 2**bits, (*lead, d_in, d_out)).astype(np.uint8)
    if not group:
        levels = jnp.asarray(random.standard_normal((*lead, 2**bits, d_out)), jnp.float32)
        return Codebook.from_levels(codes, levels, bits=bits)
    scales = jnp.asarray(0.5 + random.rand(*lead, d_in // group, d_out), jnp.float32)
    make = partial(Codebook.from_codes, table=f"nf{bits}", group_size=group, d_in=d_in)
    return jax.jit(make)(codes, jax.jit(DoubleScales.from_scales)(scales) if double else scales)


@cache
def draw_sparse(
    bits: int, d_in: int, d_out: int, *, group: int, kind: str = "packed", lead: tuple = ()
) -> Sparse24:
    """Returns a weight of which two of every four inputs are kept."""
    base = draw_affine(bits, d_in, d_out, group=group, kind=kind, lead=lead)
    order = np.random.RandomState(0).rand(*lead, d_in // 4, 4, d_out).argsort(axis=-2)
    return jax.jit(Sparse24.from_mask)(base, (order < 2).reshape(*lead, d_in, d_out))


def draw_adapter(d_in: int, d_out: int, rank: int, pool: int = 1) -> LowRank:
    a, b = draw(d_in // pool, rank, seed=rank) / 8, draw(rank, d_out, seed=9)
    return LowRank(jnp.asarray(a), jnp.asarray(b), pool)


def assert_near(came, wanted, tolerance: float) -> None:
    """Compares trees of arrays, each relative to its largest entry."""
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert (c.shape, c.dtype) == (w.shape, w.dtype)
        c, w = np.asarray(c, np.float64), np.asarray(w, np.float64)
        assert np.abs(c - w).max() <= tolerance * np.abs(w).max()


@jax.jit
def multiply_densely(x: jax.Array, base, corrections=()) -> jax.Array:
    """The product by its definition: one dense matrix, float32, rounded once."""
    w = base.dense(x.dtype).astype(jnp.float32)
    for correction in corrections:
        w = w + correction.dense()
    y = jnp.matmul(x.astype(jnp.float32), w, precision="highest")
    return y.astype(x.dtype)


def assert_equals_the_reference(implementation, x, base, corrections=()) -> None:
    """Compares one product with its definition, to the accuracy of x's dtype."""

    @jax.jit
    def both(x, base, corrections):
        y = packed_matmul(x, base, corrections=corrections, implementation=implementation)
        return y, multiply_densely(x, base, corrections)

    came, wanted = both(x, base, tuple(corrections))
    assert came.dtype == x.dtype
    assert_near(came, wanted, TOLERANCE[x.dtype.name])


def assert_gradients_are_the_references(implementation, x, base, corrections) -> None:
    """Compares gradients for x, adapters and the base's floating arrays; codes get none."""

    def gradients(multiply, *arguments):
        def loss(*arguments):
            return jnp.sum(jnp.sin(multiply(*arguments)))

        return jax.grad(loss, (0, 1, 2), allow_int=True)(*arguments)

    def kernel(x, base, corrections):
        return packed_matmul(x, base, corrections=corrections, implementation=implementation)

    arguments = (x, base, tuple(corrections))
    run = jax.jit(lambda *a: _keep_floats((gradients(kernel, *a), gradients(multiply_densely, *a))))
    came, wanted = run(*arguments)
    assert_near(came, wanted, 1e-4)
    whole = jax.eval_shape(lambda *a: gradients(kernel, *a)[1], *arguments)
    for leaf, gradient in zip(jax.tree.leaves(base), jax.tree.leaves(whole), strict=True):
        is_code = not jnp.issubdtype(leaf.dtype, jnp.floating)
        assert (gradient.dtype == jax.dtypes.float0) == is_code


def _keep_floats(tree):
    return jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, tree)
