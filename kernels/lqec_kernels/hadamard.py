"""Hadamard matrices of the orders that models have, and products with them.

An n x n matrix of ±1 with H Hᵀ = n I. Built from

    [[1, 1], [1, -1]]            order 2 (Sylvester 1867)
    Paley I  (Paley 1933)        order q + 1, q a prime power, q = 3 mod 4
    Paley II (Paley 1933)        order 2 (q + 1), q a prime power, q = 1 mod 4
    their Kronecker products

which reach every multiple of 4 below 92 and, with few exceptions, the widths that models have. A
product with a Kronecker factor of order m costs m multiply-adds a number; `factor` chooses the
cheapest.
"""

from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np


def largest_order(size: int, limit: int | None = None) -> int:
    """Returns the largest divisor of `size`, at most `limit`, of which there is a matrix here."""
    largest = min(size, limit or size)
    return next(n for n in range(largest, 0, -1) if size % n == 0 and factor(n) is not None)


@cache
def factor(order: int) -> tuple[int, ...] | None:
    """Returns the orders whose Kronecker product is cheapest to apply, or None if there is none.

    The order 1 is the empty product.
    """
    if order == 1:
        return ()
    best = None
    for first in _divisors(order):
        rest = factor(order // first) if _is_built(first) else None
        if rest is not None and (best is None or first + sum(rest) < sum(best)):
            best = tuple(sorted((first, *rest), reverse=True))
    return best


def build(order: int) -> np.ndarray:
    """Builds a matrix, int8 [order, order]; of any order that `factor` knows.

    Raises:
      ValueError: no construction here has this order.
    """
    orders = factor(order)
    if orders is None:
        raise ValueError(f"no Hadamard matrix of order {order} is built here")
    matrix = np.ones((1, 1), np.int8)
    for part in orders:
        matrix = np.kron(matrix, _build_one(part))
    return matrix


def multiply(x: jax.Array, order: int, *, transpose: bool = False) -> jax.Array:
    """Multiplies blocks of the last axis by H / √order, or by its transpose.

    Args:
      x: floating [..., n · order]; sums are float32 or wider.
      order: one that `factor` knows.
    Returns:
      x (I ⊗ H) / √order in x's dtype; row vectors from the left.
    Cost: the sum of the factors' orders per number, in one pass over x for each factor.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(-1)  # [numbers]
    right = order
    for part in factor(order):
        right //= part
        y = y.reshape(-1, part, right)  # [left, part, right]
        y = _sum_and_difference(y) if part == 2 else _times(y, part, transpose)
    return (y.reshape(x.shape) / np.sqrt(order).astype(np.float32)).astype(x.dtype)


def _sum_and_difference(y: jax.Array) -> jax.Array:
    return jnp.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], axis=1)


def _times(y: jax.Array, order: int, transpose: bool) -> jax.Array:
    """Returns Σ_k y[l, k, r] H[k, j] as [l, j, r]."""
    matrix = build(order).T if transpose else build(order)
    return jnp.einsum("lkr,kj->ljr", y, jnp.asarray(matrix, y.dtype), precision="highest")


def _divisors(order: int) -> list[int]:
    return [n for n in range(2, order + 1) if order % n == 0]


def _is_built(order: int) -> bool:
    return order == 2 or _paley_field(order) is not None


@cache
def _paley_field(order: int) -> tuple[int, int, int] | None:
    """Returns (prime, power, type) of the field that gives this order, or None."""
    candidates = [(order - 1, 1)] + ([(order // 2 - 1, 2)] if order % 2 == 0 else [])
    for size, kind in candidates:
        root = _prime_root(size) if size % 4 == {1: 3, 2: 1}[kind] else None
        if root is not None:
            return (*root, kind)
    return None


def _prime_root(size: int) -> tuple[int, int] | None:
    """Returns (p, k) with p prime and p^k = size, or None."""
    prime = next((p for p in range(2, int(size**0.5) + 1) if size % p == 0), size)
    power, left = 0, size
    while prime > 1 and left % prime == 0:
        left, power = left // prime, power + 1
    return (prime, power) if left == 1 and power else None


@cache
def _build_one(order: int) -> np.ndarray:
    """Builds one of the three kinds, int8 [order, order]."""
    if order == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    prime, power, kind = _paley_field(order)
    residues = _residue_matrix(prime, power)
    size = len(residues)
    border = np.zeros((size + 1, size + 1), np.int8)
    border[0, 1:] = 1
    border[1:, 0] = 1 if kind == 2 else -1
    border[1:, 1:] = residues
    if kind == 1:
        return border + np.eye(size + 1, dtype=np.int8)
    ones, turned = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(border, ones) + np.kron(np.eye(size + 1, dtype=np.int8), turned)


def _residue_matrix(prime: int, power: int) -> np.ndarray:
    """Returns χ(a - b) for all a, b of the field: 0 on the diagonal, 1 for squares, -1 else.

    An element is the polynomial Σ c_k t^k over the integers mod p, numbered Σ c_k p^k.
    """
    elements = np.array(list(product(range(prime), repeat=power)))[:, ::-1]  # [size, power]
    place = prime ** np.arange(power)
    squares = {int(_multiply_in_field(a, a, prime, power) @ place) for a in elements[1:]}
    character = np.array([0] + [1 if n in squares else -1 for n in range(1, prime**power)])
    numbers = np.zeros((len(elements), len(elements)), int)
    for k in range(power):
        numbers += (elements[:, None, k] - elements[None, :, k]) % prime * prime**k
    return character[numbers].astype(np.int8)


def _multiply_in_field(a: np.ndarray, b: np.ndarray, prime: int, power: int) -> np.ndarray:
    """Multiplies two polynomials modulo the field's own."""
    whole = np.convolve(a, b) % prime
    modulus = _irreducible(prime, power)
    for k in range(len(whole) - 1, power - 1, -1):
        whole[k - power : k + 1] -= whole[k] * modulus
        whole %= prime
    return whole[:power]


@cache
def _irreducible(prime: int, power: int) -> np.ndarray:
    """Returns the first monic polynomial of this degree that no other divides, lowest term first.

    Found by crossing out the products of smaller ones.
    """
    if power == 1:
        return np.array([0, 1])

    def monic(degree: int) -> list[np.ndarray]:
        return [np.array([*low, 1]) for low in product(range(prime), repeat=degree)]

    crossed = {
        tuple(np.convolve(a, b) % prime)
        for degree in range(1, power // 2 + 1)
        for a in monic(degree)
        for b in monic(power - degree)
    }
    return next(p for p in monic(power) if tuple(p) not in crossed)
