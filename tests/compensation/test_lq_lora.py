"""LQ-LoRA: factors that the loss's curvature weighs on both sides, in turns with a base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.compensation.lq_lora import lq_lora, sides_error, weigh_sides
from lqec_jax.core.closed_form import truncate
from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.errors import InputError
from lqec_jax.quantizers.nf import nf
from lqec_kernels.formats import CompressedLinear, Dense

D_IN, D_OUT, RANK = 48, 32, 5


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
ROUNDED = np.round(W)
FISHER = np.exp(2 * (draw(D_IN, 1, seed=3) + draw(D_OUT, seed=7)) + draw(D_IN, D_OUT, seed=8))
PROBLEM = LinearProblem(jnp.asarray(W), LinearStats(fisher=jnp.asarray(FISHER)), jax.random.key(0))
LEAF = CompressedLinear(Dense(jnp.asarray(ROUNDED)))
WHOLE = CompressedLinear(Dense(PROBLEM.w))


def solve(step, leaf: CompressedLinear = LEAF, problem: LinearProblem = PROBLEM) -> tuple:
    return jax.jit(lambda problem, leaf: run_linear(step, problem, leaf))(problem, leaf)


def seen(error) -> np.ndarray:
    rows, columns = np.sqrt(FISHER.mean(1)), np.sqrt(FISHER.mean(0))
    return rows[:, None] * np.asarray(error, np.float64) * columns


def test_it_is_the_best_between_its_two_sides():
    step = lq_lora(rank=RANK, dtype="float32")
    leaf, _ = solve(step)
    spectrum = np.linalg.svd(seen(W - ROUNDED), compute_uv=False)
    left = np.sum(seen(W - leaf.dense()) ** 2)
    assert left == pytest.approx(np.sum(spectrum[RANK:] ** 2), rel=1e-5)
    assert float(step.objective(PROBLEM, leaf)) == pytest.approx(
        left / np.sum(seen(W) ** 2), rel=1e-4
    )
    a, b = truncate(PROBLEM.w - ROUNDED, RANK)
    assert left < 0.9 * np.sum(seen(W - ROUNDED - a @ b) ** 2)
    (correction,) = leaf.corrections
    np.testing.assert_allclose(
        np.linalg.norm(correction.a, axis=0), np.linalg.norm(correction.b, axis=1), rtol=1e-5
    )


def test_fisher_information_of_rank_one_is_taken_exactly():
    """Then no step away lowers Σ F Δ², which is hard for any other F."""
    fisher = np.outer(FISHER.mean(1), FISHER.mean(0))
    problem = LinearProblem(PROBLEM.w, LinearStats(fisher=jnp.asarray(fisher)), PROBLEM.key)
    leaf, _ = solve(lq_lora(rank=RANK, dtype="float32"), problem=problem)
    (correction,) = leaf.corrections
    a, b = (np.asarray(half, np.float64) for half in (correction.a, correction.b))
    least = np.sum(fisher * (W - ROUNDED - a @ b) ** 2)
    rng = np.random.RandomState(0)
    for size in np.repeat([1e-2, 1e-1], 50):
        other = (part * (1 + size * rng.standard_normal(part.shape)) for part in (a, b))
        assert np.sum(fisher * (W - ROUNDED - np.matmul(*other)) ** 2) > least
    gradient = fisher * (W - ROUNDED - a @ b)
    np.testing.assert_allclose(a.T @ gradient, 0, atol=1e-4 * np.abs(fisher).max())


def test_the_two_sides_have_no_units_and_never_vanish():
    fisher = np.outer([0.0, 1.0, 4.0], [1.0, 9.0])
    for unit in (1.0, 1e-20):
        rows, columns = weigh_sides(LinearStats(fisher=jnp.asarray(unit * fisher, jnp.float32)))
        mean = 5 / 3 * 5
        np.testing.assert_allclose(rows, np.maximum(np.sqrt(fisher.mean(1) / mean), 1e-4), 1e-6)
        np.testing.assert_allclose(columns, np.sqrt(fisher.mean(0) / mean), rtol=1e-6)
    for side in weigh_sides(LinearStats(fisher=jnp.zeros((3, 2)))):
        np.testing.assert_array_equal(side, 1.0)


# Turns

QUANTIZER = nf(bits=2, group_size=16)


@pytest.mark.parametrize("first", ["factors", "base"])
def test_turns_lower_what_one_step_leaves(first):
    step = lq_lora(rank=RANK, quantizer=QUANTIZER, iters=6, first=first)
    assert step.needs == {"fisher"}
    leaf, facts = solve(step, WHOLE)
    errors, won = np.asarray(facts[1]), int(facts[2])
    assert errors[won] == errors.min() < 0.97 * errors[0]
    assert float(sides_error(PROBLEM, leaf)) == pytest.approx(errors[won], rel=1e-4)
    base, _ = solve(QUANTIZER, WHOLE)
    once, _ = solve(lq_lora(rank=RANK), base)
    assert errors.min() < 0.97 * float(sides_error(PROBLEM, once))


def test_scales_of_the_information_do_not_matter_and_constant_information_is_loftq():
    step = lq_lora(rank=RANK, quantizer=QUANTIZER, iters=3)
    one, _ = solve(step, WHOLE)
    stats = LinearStats(fisher=PROBLEM.stats.fisher * 2**10)
    other, _ = solve(step, WHOLE, LinearProblem(PROBLEM.w, stats, PROBLEM.key))
    np.testing.assert_allclose(one.dense(), other.dense(), atol=1e-3)
    alike = LinearProblem(PROBLEM.w, LinearStats(fisher=jnp.ones((D_IN, D_OUT))), PROBLEM.key)
    same, facts = solve(
        lq_lora(rank=RANK, quantizer=QUANTIZER, iters=2, first="base"), WHOLE, alike
    )
    a = jnp.zeros((D_IN, 1), jnp.float16)
    product = a.astype(jnp.float32) @ jnp.zeros((1, D_OUT))
    for error in np.asarray(facts[1]):
        base = QUANTIZER.run(PROBLEM, CompressedLinear(Dense(PROBLEM.w - product)))
        factors = truncate(PROBLEM.w - base.dense(), RANK)
        product = jnp.matmul(*(f.astype(jnp.float16).astype(jnp.float32) for f in factors))
        left = np.sum(np.square(W - base.dense() - product))
        assert error == pytest.approx(left / np.sum(W**2), rel=1e-3)


def test_arguments_are_refused():
    for arguments in ({"rank": 0}, {"iters": 0}, {"first": "b"}, {"keep": "b"}, {"dtype": "b"}):
        (name,) = arguments
        with pytest.raises(InputError, match=f"^lq_lora: {name}="):
            lq_lora(**arguments)
    with pytest.raises(InputError, match="^lq_lora: quantizer='nf'; a method that quantizes"):
        lq_lora(quantizer="nf")
