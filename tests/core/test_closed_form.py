"""Low-rank factors in closed form: as good as the theorem says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.closed_form import (
    balance,
    find_directions,
    project,
    reduce_rank,
    regress,
    regression_error,
    sketch_directions,
    truncate,
)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_error_is_the_energy_of_the_tail(shape, rank):
    error = draw(*shape)
    a, b = (np.asarray(factor, np.float64) for factor in truncate(jnp.asarray(error), rank))
    assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
    spectrum = np.linalg.svd(error.astype(np.float64), compute_uv=False)
    left = np.sum((error - a @ b) ** 2)
    tail = np.sum(spectrum[rank:] ** 2)
    assert abs(left - tail) <= 1e-5 * np.sum(spectrum**2)
    np.testing.assert_allclose(np.linalg.svd(a @ b)[1][:rank], spectrum[:rank], rtol=1e-5)


def test_both_factors_carry_half_of_every_component():
    a, b = truncate(jnp.asarray(draw(30, 40)), 6)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-3)
    spectrum = np.linalg.svd(draw(30, 40), compute_uv=False)[:6]
    np.testing.assert_allclose(np.linalg.norm(a, axis=0) ** 2, spectrum, rtol=1e-5)


def test_half_precision_is_factored_in_float32():
    a, b = truncate(jnp.asarray(draw(8, 6), jnp.bfloat16), 6)
    assert a.dtype == b.dtype == jnp.float32
    wanted = np.asarray(jnp.asarray(draw(8, 6), jnp.bfloat16), np.float32)
    np.testing.assert_allclose(a @ b, wanted, atol=1e-5)


def test_nothing_is_factored_into_zeros():
    a, b = truncate(jnp.zeros((8, 6)), 3)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    np.testing.assert_array_equal(a @ b, np.zeros((8, 6)))


def test_balance_keeps_the_product_and_evens_the_halves():
    a, b = 1e3 * draw(2, 10, 4), 1e-4 * draw(2, 4, 7, seed=1)
    even_a, even_b = balance(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(even_a @ even_b, a @ b, atol=1e-5)
    norms = np.linalg.norm(even_a, axis=-2), np.linalg.norm(even_b, axis=-1)
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(
        norms[0] ** 2, np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1), rtol=1e-4
    )


def test_balance_leaves_a_component_with_a_zero_half_alone():
    a, b = draw(5, 3), draw(3, 4)
    a[:, 0], b[1] = 0, 0
    even_a, even_b = balance(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(even_a[:, :2], a[:, :2])
    np.testing.assert_array_equal(even_b[:2], b[:2])
    assert np.isfinite(even_a).all() and np.isfinite(even_b).all()


# The output-weighted form, in float64.

SHAPES = [(48, 20), (20, 48)]
RANK = 7
solve = jax.jit(reduce_rank, static_argnums=2)


def pose(d_in: int, d_out: int, tokens: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns an error, inputs of unequal size that are correlated, and their gram; float64."""
    rng = np.random.RandomState(d_in)
    mixing = np.eye(d_in) + rng.standard_normal((d_in, d_in)) / 4
    x = rng.standard_normal((tokens, d_in)) @ mixing * np.exp(rng.standard_normal(d_in))
    return rng.standard_normal((d_in, d_out)), x, x.T @ x / tokens


def reduce(error, gram, rank: int = RANK, dtype=np.float64) -> tuple[np.ndarray, np.ndarray]:
    with jax.enable_x64(True):
        a, b = solve(jnp.asarray(error, dtype), jnp.asarray(gram, dtype), rank)
        assert a.dtype == b.dtype == dtype
        return np.asarray(a, np.float64), np.asarray(b, np.float64)


def energy(error: np.ndarray, gram: np.ndarray) -> float:
    return float(np.sum(error * (gram @ error)))


def roots(x: np.ndarray, gram: np.ndarray) -> dict[str, np.ndarray]:
    """Returns four T with Tᵀ T = G."""
    values, vectors = np.linalg.eigh(gram)
    _, s, vt = np.linalg.svd(x / np.sqrt(len(x)), full_matrices=False)
    return {
        "symmetric": (vectors * np.sqrt(values)) @ vectors.T,
        "eigenspace": np.sqrt(values)[:, None] * vectors.T,
        "cholesky": np.linalg.cholesky(gram).T,
        "inputs": s[:, None] * vt,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, RANK, 20])
def test_the_output_error_is_the_energy_of_the_tail(shape, rank):
    error, _, gram = pose(*shape)
    spectrum = np.linalg.svd(np.linalg.cholesky(gram).T @ error, compute_uv=False)
    tail, whole = np.sum(spectrum[rank:] ** 2), np.sum(spectrum**2)
    a, b = reduce(error, gram, rank)
    assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
    assert energy(error - a @ b, gram) == pytest.approx(tail, rel=1e-10, abs=1e-12 * whole)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_loses_its_last_places_only(shape):
    error, _, gram = pose(*shape)
    best, single = reduce(error, gram), reduce(error, gram, dtype=np.float32)
    left, least = (energy(error - a @ b, gram) for a, b in (single, best))
    assert left == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_four_roots_of_a_gram_have_one_solution(shape):
    error, x, gram = pose(*shape)
    a, b = reduce(error, gram)
    for root in roots(x, gram).values():
        np.testing.assert_allclose(root.T @ root, gram, atol=1e-10 * np.trace(gram))
        u, s, vt = np.linalg.svd(root @ error, full_matrices=False)
        explicit = np.linalg.solve(root, (u[:, :RANK] * s[:RANK]) @ vt[:RANK])
        np.testing.assert_allclose(a @ b, explicit, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_factors_are_stationary_and_no_step_away_is_better(shape):
    error, _, gram = pose(*shape)
    a, b = reduce(error, gram)
    seen = gram @ (error - a @ b)
    size = np.abs(gram @ error).max()
    np.testing.assert_allclose(a.T @ seen, 0, atol=1e-10 * size * np.abs(a).max())
    np.testing.assert_allclose(seen @ b.T, 0, atol=1e-10 * size * np.abs(b).max())
    least = energy(error - a @ b, gram)
    rng = np.random.RandomState(1)
    for size in np.repeat([1e-3, 1e-1], 100):
        other = (part + size * rng.standard_normal(part.shape) for part in (a, b))
        assert energy(error - np.matmul(*other), gram) > least


@pytest.mark.parametrize("shape", SHAPES)
def test_a_singular_gram_is_as_good_as_its_pseudo_inverse(shape):
    error, x, gram = pose(*shape, tokens=12)
    root = x / np.sqrt(len(x))
    u, s, vt = np.linalg.svd(root @ error, full_matrices=False)
    minimal = np.linalg.pinv(root) @ ((u[:, :RANK] * s[:RANK]) @ vt[:RANK])
    a, b = reduce(error, gram)
    left = energy(error - a @ b, gram)
    assert left == pytest.approx(np.sum(s[RANK:] ** 2), rel=1e-10)
    assert left == pytest.approx(energy(error - minimal, gram), rel=1e-10)
    np.testing.assert_allclose(x @ a @ b, x @ minimal, atol=1e-9)
    # More components than the inputs span: nothing is left that they see.
    a, b = reduce(error, gram, 15)
    assert energy(error - a @ b, gram) < 1e-12 * energy(error, gram)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_input_has_a_larger_error_than_before(shape):
    error, _, gram = pose(*shape)
    a, b = reduce(error, gram)
    before, after = (np.linalg.norm(e, axis=1) for e in (error, error - a @ b))
    assert (after < before).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_diagonal_stands_for_its_matrix(shape):
    error, _, gram = pose(*shape)
    diagonal = np.diagonal(gram).copy()
    diagonal[3] = 0.0
    product, whole = (np.matmul(*reduce(error, g)) for g in (diagonal, np.diag(diagonal)))
    np.testing.assert_allclose(product, whole, atol=1e-12)
    alike = np.matmul(*reduce(error, np.ones(shape[0])))
    np.testing.assert_allclose(alike, np.matmul(*truncate(error, RANK)), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_units_do_not_matter(shape):
    error, _, gram = pose(*shape)
    single = partial(reduce, dtype=np.float32)
    product = np.matmul(*single(error, gram))
    for unit in (2.0**-90, 2.0**60):
        np.testing.assert_allclose(np.matmul(*single(error, unit * gram)), product, atol=1e-5)
        np.testing.assert_allclose(
            np.matmul(*single(unit * error, gram)) / unit, product, atol=1e-5
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_any_gram_has_a_finite_answer(shape):
    error, _, gram = pose(*shape)
    indefinite = gram - 2 * np.mean(np.diagonal(gram)) * np.eye(shape[0])
    one = np.zeros_like(gram)
    one[5, 5] = 1.0
    for name, g in {"indefinite": indefinite, "no trace": -gram, "one input": one}.items():
        for factor in reduce(error, g, dtype=np.float32):
            assert np.isfinite(factor).all(), name
    for nothing in (0 * gram, 0 * gram[0]):
        product = np.matmul(*reduce(error, nothing))
        np.testing.assert_allclose(product, np.matmul(*truncate(error, RANK)), atol=1e-5)
    for factor in reduce(0 * error, gram):
        assert np.isfinite(factor).all()
    np.testing.assert_array_equal(np.matmul(*reduce(0 * error, gram)), 0.0)


def test_layers_of_one_shape_are_solved_together():
    error, _, gram = pose(48, 20)
    errors, grams = (np.float32([part, 2 * part[::-1]]) for part in (error, gram @ gram.T))
    stacked = jax.vmap(partial(reduce_rank, rank=RANK))(errors, grams)
    for layer in range(2):
        alone = solve(errors[layer], grams[layer], RANK)
        product = np.matmul(*(factor[layer] for factor in map(np.asarray, stacked)))
        np.testing.assert_allclose(product, np.matmul(*map(np.asarray, alone)), atol=1e-4)


def test_both_halves_of_a_component_have_one_norm():
    a, b = reduce(*pose(48, 20)[::2])
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-10)
    np.testing.assert_allclose(b @ b.T, np.diag(np.linalg.norm(b, axis=1) ** 2), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_directions_are_orthonormal_and_the_spectrum_is_whole(shape):
    error, _, gram = pose(*shape)
    with jax.enable_x64(True):
        found = find_directions(jnp.asarray(error), jnp.asarray(gram), RANK)
    spectrum, basis = map(np.asarray, found)
    wanted = np.linalg.svd(np.linalg.cholesky(gram).T @ error, compute_uv=False)
    np.testing.assert_allclose(spectrum, wanted, rtol=1e-8)
    np.testing.assert_allclose(basis.T @ basis, np.eye(RANK), atol=1e-12)


# The randomized form.

sketch = jax.jit(sketch_directions, static_argnums=(2, 4))


def test_a_sketch_leaves_little_more_than_the_least():
    """Of a spectrum as flat as one comes, that of normal errors and inputs."""
    error, gram = draw(160, 96), np.eye(160, dtype=np.float32)
    least = np.sum(np.linalg.svd(error, compute_uv=False)[8:] ** 2)
    excess = {}
    for passes in (0, 2, 8):
        spectrum, basis = sketch(error, gram, 8, jax.random.key(0), passes)
        a, b = (np.asarray(factor, np.float64) for factor in project(jnp.asarray(error), basis))
        left = np.sum((error - a @ b) ** 2)
        assert left == pytest.approx(
            float(np.sum(error**2) - np.sum(np.square(spectrum))), rel=1e-5
        )
        excess[passes] = left / least - 1
    assert 0 <= excess[8] < 5e-4 < 5e-3 < excess[2] < 2e-2 < excess[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sketch_of_all_columns_is_exact(shape):
    error, _, gram = pose(*shape)
    with jax.enable_x64(True):
        arguments = jnp.asarray(error), jnp.asarray(gram)
        found = [sketch(*arguments, 12, jax.random.key(0), 2), find_directions(*arguments, 12)]
    (spectrum, basis), (wanted, directions) = (tuple(map(np.asarray, pair)) for pair in found)
    np.testing.assert_allclose(spectrum, wanted[:12], rtol=1e-8)
    np.testing.assert_allclose(basis @ basis.T, directions @ directions.T, atol=1e-8)


def test_a_sketch_of_nothing_is_finite():
    for error, gram in ((np.zeros((48, 20)), np.eye(48)), (draw(48, 20), np.zeros((48, 48)))):
        error, gram = (np.asarray(part, np.float32) for part in (error, gram))
        for array in sketch(error, gram, RANK, jax.random.key(0), 2):
            assert np.isfinite(array).all()


# Regression on other inputs than the weight's, outputs weighed.

predict = jax.jit(regress, static_argnums=2)
predict_error = jax.jit(regression_error, static_argnums=3)


def ask(make, *arguments, outputs=None, dtype=np.float64):
    with jax.enable_x64(True):
        arguments = [a if isinstance(a, int) else jnp.asarray(a, dtype) for a in arguments]
        outputs = None if outputs is None else jnp.asarray(outputs, dtype)
        out = make(*arguments, outputs=outputs)
        assert {part.dtype for part in jax.tree.leaves(out)} == {np.dtype(dtype)}
        return jax.tree.map(partial(np.asarray, dtype=np.float64), out)


def pose_regression(d_in: int, d_out: int, tokens: int = 200) -> tuple:
    """Returns what a weight reads, what its output lacks (not all of it a function of that), H."""
    error, x, _ = pose(d_in, d_out, tokens)
    rng = np.random.RandomState(d_out)
    x_hat = x + rng.standard_normal(x.shape) * np.std(x, 0) / 3
    outputs = np.cov(rng.standard_normal((d_out, 3 * d_out)))
    return x_hat, x @ error + rng.standard_normal((tokens, d_out)), outputs


def lose(x_hat, lacks, product, outputs) -> float:
    """Returns E[(e - x̂ M) H (e - x̂ M)ᵀ]."""
    left = lacks - x_hat @ product
    return float(np.sum(left * (left @ outputs))) / len(left)


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_are_the_weights_own_need_no_regression(shape):
    error, _, gram = pose(*shape)
    product = np.matmul(*ask(predict, gram, gram @ error, RANK))
    wanted = np.matmul(*reduce(error, gram))
    np.testing.assert_allclose(product, wanted, atol=1e-10)
    diagonal = np.diagonal(gram)
    product = np.matmul(*ask(predict, diagonal, diagonal[:, None] * error, RANK))
    np.testing.assert_allclose(product, np.matmul(*reduce(error, diagonal)), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_diagonals_are_the_error_scaled_on_both_sides(shape):
    error, _, gram = pose(*shape)
    rows, columns = np.diagonal(gram), np.exp(draw(shape[1], seed=5)).astype(np.float64)
    a, b = reduce(error * np.sqrt(columns), rows)
    came = ask(predict, rows, rows[:, None] * error, RANK, outputs=columns)
    np.testing.assert_allclose(np.matmul(*came), a @ (b / np.sqrt(columns)), atol=1e-10)
    whole = ask(predict, np.diag(rows), rows[:, None] * error, RANK, outputs=np.diag(columns))
    np.testing.assert_allclose(np.matmul(*whole), np.matmul(*came), atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, RANK, 20])
def test_the_least_loss_is_the_energy_but_what_is_explained(shape, rank):
    x_hat, lacks, outputs = pose_regression(*shape)
    gram, cross = x_hat.T @ x_hat / len(x_hat), x_hat.T @ lacks / len(x_hat)
    for weight, matrix in ((outputs, outputs), (None, np.eye(shape[1]))):
        a, b = ask(predict, gram, cross, rank, outputs=weight)
        assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
        whole = lose(x_hat, lacks, 0 * a @ b, matrix)
        least = ask(predict_error, whole, gram, cross, rank, outputs=weight)
        assert lose(x_hat, lacks, a @ b, matrix) == pytest.approx(float(least), rel=1e-10)
        assert least < whole


@pytest.mark.parametrize("shape", SHAPES)
def test_a_regression_is_stationary_and_no_step_away_is_better(shape):
    x_hat, lacks, outputs = pose_regression(*shape)
    gram, cross = x_hat.T @ x_hat / len(x_hat), x_hat.T @ lacks / len(x_hat)
    a, b = ask(predict, gram, cross, RANK, outputs=outputs)
    seen = (cross - gram @ a @ b) @ outputs
    size = np.abs(cross @ outputs).max()
    np.testing.assert_allclose(a.T @ seen, 0, atol=1e-10 * size * np.abs(a).max())
    np.testing.assert_allclose(seen @ b.T, 0, atol=1e-10 * size * np.abs(b).max())
    least = lose(x_hat, lacks, a @ b, outputs)
    rng = np.random.RandomState(1)
    for size in np.repeat([1e-3, 1e-1], 50):
        other = (part * (1 + size * rng.standard_normal(part.shape)) for part in (a, b))
        assert lose(x_hat, lacks, np.matmul(*other), outputs) > least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_regression_on_too_few_tokens_is_the_pseudo_inverse(shape, dtype):
    """Inputs of unequal size, dead ones, and half of the outputs that count nothing."""
    x_hat, lacks, outputs = pose_regression(*shape, tokens=12)
    x_hat *= np.exp(3 * draw(shape[0], seed=9)) * (np.arange(shape[0]) != 3)
    half = np.arange(shape[1]) % 2
    outputs = outputs * half * half[:, None]
    gram, cross = x_hat.T @ x_hat / len(x_hat), x_hat.T @ lacks / len(x_hat)
    a, b = ask(predict, gram, cross, RANK, outputs=outputs, dtype=dtype)
    values, vectors = np.linalg.eigh(outputs)
    root = vectors * np.sqrt(np.maximum(values, 0))
    basis = np.linalg.svd(x_hat, full_matrices=False)[0]
    basis = basis[:, np.linalg.svd(x_hat, compute_uv=False) > 1e-9]
    seen = np.linalg.svd(basis.T @ lacks @ root, compute_uv=False)
    least = (np.sum((lacks @ root) ** 2) - np.sum(seen[:RANK] ** 2)) / len(x_hat)
    near = 1e-9 if dtype == np.float64 else 1e-3
    assert lose(x_hat, lacks, a @ b, outputs) == pytest.approx(least, rel=near)
    np.testing.assert_array_equal((a @ b)[3], 0)
    np.testing.assert_allclose((a @ b)[:, half == 0], 0, atol=1e-12 if near < 1e-6 else 1e-6)


def test_any_regression_has_a_finite_answer():
    _, _, gram = pose(48, 20)
    cross, ones = gram[:, :20], np.eye(20)
    zero = np.zeros_like(gram)
    for g, c, h in ((zero, cross, ones), (gram, 0 * cross, ones), (gram, cross, 0 * ones),
                    (gram - np.trace(gram) * np.eye(48), cross, -ones)):  # fmt: skip
        for factor in ask(predict, g, c, RANK, outputs=h, dtype=np.float32):
            assert np.isfinite(factor).all()
    # Powers of two, so that only the exponents differ.
    single = partial(ask, predict, dtype=np.float32)
    product = np.matmul(*single(gram, cross, RANK, outputs=ones))
    for unit in (2.0**-80, 2.0**60):
        scaled = single(unit * gram, unit * cross, RANK, outputs=unit * ones)
        np.testing.assert_allclose(np.matmul(*scaled), product, atol=1e-5)


def test_regressions_of_one_shape_are_solved_together():
    _, _, gram = pose(48, 20)
    grams, crosses = (np.float32([part, 2 * part]) for part in (gram, gram[:, 20:40]))
    stacked = jax.vmap(partial(regress, rank=RANK))(grams, crosses)
    for layer in range(2):
        alone = predict(grams[layer], crosses[layer], RANK)
        product = np.matmul(*(factor[layer] for factor in map(np.asarray, stacked)))
        np.testing.assert_allclose(product, np.matmul(*map(np.asarray, alone)), atol=1e-4)
