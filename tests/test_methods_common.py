"""The laws that every method keeps, over every row of the table.

One weight shape and one compilation a variant serve all laws. A new linear method adds its variants
to `VARIANTS`; a block or model method names the test that covers it in `COVERED`.
"""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import grids
from lqec_jax.core.types import CompressedLinear, LinearProblem, LinearStats, Step
from lqec_jax.methods import METHODS, find_factory
from lqec_jax.recipe import parse_recipe
from lqec_kernels.formats import Affine, Dense
from lqec_kernels.packing import unpack

D_IN, D_OUT, GROUP = 64, 32, 16


class Variants(NamedTuple):
    """Arguments of a method: rungs go from coarse to fine, the others stand alone."""

    rungs: tuple[str, ...]
    others: tuple[str, ...] = ()


VARIANTS = {
    "rtn": Variants(
        tuple(f"bits={bits}, group_size={GROUP}" for bits in (2, 3, 4)),
        (
            "bits=2, group_size=None, symmetric=True",
            f"bits=3, group_size={GROUP}, symmetric=True, clip_search=True",
            f"bits=2, group_size={GROUP}, clip_search='output', scale_dtype='float32'",
        ),
    ),
    "svd": Variants(("rank=2", "rank=4", "rank=8"), ("rank=0.25, dtype='float32'",)),
}
COVERED = {"rilq": "tests/compensation/test_rilq.py"}
# How a statistic is computed from inputs x [tokens, d_in].
STATISTICS = {"rms": lambda x: np.sqrt(np.mean(x**2, axis=0))}

EVERY = [
    f"{name}({arguments})"
    for name, variants in VARIANTS.items()
    for arguments in (*variants.rungs, *variants.others)
]
QUANTIZERS = [text for text in EVERY if METHODS[text.partition("(")[0]].bits != "-"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


GAUSSIAN = draw(D_IN, D_OUT)
WEIGHTS = {
    "gaussian": GAUSSIAN,
    "zero": np.zeros_like(GAUSSIAN),
    "constant": np.full_like(GAUSSIAN, 0.3),
    "positive": np.abs(GAUSSIAN),
    "negative": -np.abs(GAUSSIAN) - 1,
    "one column alone": GAUSSIAN * (np.arange(D_OUT) == 5),
    "one entry alone": np.eye(D_IN, D_OUT, dtype=np.float32) * (np.arange(D_OUT) == 5),
    "tiny": 1e-6 * GAUSSIAN,
    "as large as float16": np.clip(3e4 * GAUSSIAN, -65504, 65504),
    "larger than float16": 1e6 * GAUSSIAN,
}
INPUTS = {
    "gaussian": draw(128, D_IN, seed=1) * np.exp(draw(D_IN, seed=2)),
    "a dead channel": draw(128, D_IN, seed=1) * (np.arange(D_IN) != 3),
    "a dead group": draw(128, D_IN, seed=1) * (np.arange(D_IN) >= GROUP),
    "nothing": np.zeros((128, D_IN), np.float32),
}


@cache
def step_of(text: str) -> Step:
    (step,) = parse_recipe(text).steps
    return step


@cache
def compiled(text: str):
    """Returns the one compilation of a variant: the leaf, its weight, the objective's change."""
    step = step_of(text)

    def solve(problem: LinearProblem, start: CompressedLinear):
        leaf = step.run(problem, start)
        return leaf, leaf.dense(), step.objective(problem, start), step.objective(problem, leaf)

    return jax.jit(solve)


def pose(text: str, w, x=INPUTS["gaussian"]) -> tuple[LinearProblem, CompressedLinear]:
    """Returns a problem with the statistics that the step asks for, and where it begins.

    A quantizer begins at the weight, a compensation at its rounding to two bits.
    """
    stats = {name: jnp.asarray(STATISTICS[name](x)) for name in step_of(text).needs}
    problem = LinearProblem(jnp.asarray(w), LinearStats(**stats), jax.random.key(0))
    start = CompressedLinear(Dense(problem.w))
    if text not in QUANTIZERS:
        start = compiled(EVERY[0])(*pose(EVERY[0], w))[0]
    return problem, start


def solve(text: str, w=GAUSSIAN, x=INPUTS["gaussian"]):
    return compiled(text)(*pose(text, w, x))


def assert_same(came, wanted, ulps: int = 0) -> None:
    """Compares trees: integers and structure exactly, floats to 1e-6 or so many last places."""
    assert jax.tree.structure(came) == jax.tree.structure(wanted)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert (c.shape, c.dtype) == (w.shape, w.dtype)
        if ulps and jnp.issubdtype(c.dtype, jnp.floating):
            last = float(jnp.finfo(c.dtype).eps) * ulps
            np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (c, w)), last, 1e-6)
        else:
            np.testing.assert_array_equal(c, w)


def test_every_row_is_under_these_laws_or_names_its_test():
    scopes = {name: row.scope for name, row in METHODS.items()}
    assert set(VARIANTS) == {name for name, scope in scopes.items() if scope == "linear"}
    assert set(COVERED) == {name for name, scope in scopes.items() if scope != "linear"}
    for test in COVERED.values():
        assert (Path(__file__).parents[1] / test).is_file()
    assert set(STATISTICS) == {field.name for field in fields(LinearStats)}
    for name in VARIANTS:
        assert len(VARIANTS[name].rungs) >= 3
        assert "objective" in find_factory(name)().__dict__


@pytest.mark.parametrize("text", EVERY)
def test_jit_equals_eager(text):
    problem, start = pose(text, GAUSSIAN)
    assert_same(compiled(text)(problem, start)[0], step_of(text).run(problem, start), ulps=1)


@pytest.mark.parametrize("text", EVERY)
def test_same_key_same_bytes(text):
    assert_same(solve(text), solve(text))


@pytest.mark.parametrize("text", EVERY)
def test_outputs_may_come_in_any_order(text):
    order = np.random.RandomState(3).permutation(D_OUT)
    dense, permuted = solve(text)[1], solve(text, GAUSSIAN[:, order])[1]
    if text in QUANTIZERS:
        np.testing.assert_array_equal(permuted, dense[:, order])
    else:  # factors are rounded to their dtype after a decomposition of another matrix
        np.testing.assert_allclose(permuted, dense[:, order], atol=2e-3)


@pytest.mark.parametrize("text", EVERY)
def test_a_leaf_is_a_tree(text):
    leaf = solve(text)[0]
    arrays, structure = jax.tree.flatten(leaf)
    assert_same(jax.tree.unflatten(structure, arrays), leaf)
    assert hash(structure) == hash(jax.tree.structure(solve(text, -GAUSSIAN)[0]))
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), leaf)
    assert_same(jax.tree.map(lambda array: array[1], stack), leaf)
    assert (stack.d_in, stack.d_out) == (leaf.d_in, leaf.d_out) == (D_IN, D_OUT)


@pytest.mark.parametrize("text", EVERY)
def test_bits_per_weight_are_the_bytes_held(text):
    leaf = solve(text)[0]
    held = sum(np.asarray(array).nbytes for array in jax.tree.leaves(leaf))
    assert leaf.bits_per_weight == 8 * held / (D_IN * D_OUT)


@pytest.mark.parametrize("text", EVERY)
def test_every_weight_gets_a_finite_answer(text):
    for name, w in WEIGHTS.items():
        leaf, dense, *objectives = solve(text, w)
        assert dense.shape == w.shape and dense.dtype == jnp.float32
        for array in jax.tree.leaves((leaf, dense, objectives)):
            assert np.isfinite(array).all(), name
    np.testing.assert_array_equal(solve(text, WEIGHTS["zero"])[1], 0.0)


@pytest.mark.parametrize("text", [text for text in EVERY if step_of(text).needs])
def test_every_input_gets_a_finite_answer(text):
    for name, x in INPUTS.items():
        for array in jax.tree.leaves(solve(text, GAUSSIAN, x)):
            assert np.isfinite(array).all(), name


@pytest.mark.parametrize("name", VARIANTS)
def test_a_finer_rung_is_never_worse(name):
    texts = [f"{name}({arguments})" for arguments in VARIANTS[name].rungs]
    sizes = [solve(text)[0].stored_bits() for text in texts]
    assert sizes == sorted(set(sizes))
    for w in (GAUSSIAN, WEIGHTS["positive"], WEIGHTS["one column alone"]):
        reached = [float(solve(text, w)[3]) for text in texts]
        for coarse, fine in zip(reached, reached[1:], strict=False):
            # Where nothing is left to gain, factors still lose their last places.
            assert fine < coarse or coarse < 1e-7


@pytest.mark.parametrize("text", EVERY)
def test_a_step_lowers_what_it_says_it_lowers(text):
    _, _, before, after = solve(text)
    if text not in QUANTIZERS:
        assert after < 0.95 * before
        return
    assert before == 0 < after < 1
    arguments = step_of(text).arguments
    plain = [f"{n}={arguments[n]!r}" for n in ("bits", "group_size", "symmetric") if n in arguments]
    problem, start = pose(text, GAUSSIAN)
    rounded = step_of(f"rtn({', '.join(plain)})").run(problem, start)
    assert after <= step_of(text).objective(problem, rounded) * (1 + 1e-6)


@pytest.mark.parametrize("text", QUANTIZERS)
def test_a_power_of_two_goes_through(text):
    np.testing.assert_array_equal(solve(text, 32 * GAUSSIAN)[1], 32 * solve(text)[1])


@pytest.mark.parametrize("text", QUANTIZERS)
def test_codes_come_back_from_their_words(text):
    base = solve(text)[0].base
    words, scales, zeros = base.columns()
    codes = unpack(words, base.bits, base.d_in)
    assert codes.max() < 2**base.bits
    again = Affine.from_codes(codes, scales, zeros, bits=base.bits, group_size=base.group_size)
    assert_same(again, base)


@pytest.mark.parametrize("text", QUANTIZERS)
def test_what_lies_on_the_grid_stays(text):
    leaf, dense, *_ = solve(text)
    words, scales, zeros = leaf.base.columns()
    zeros = jnp.full(scales.shape, 2.0 ** (leaf.base.bits - 1)) if zeros is None else zeros
    grouped = grids.group_rows(dense, leaf.base.group_size)
    codes = grids.round_to_grid(grouped, scales[:, None], zeros[:, None], leaf.base.bits)
    codes = codes.reshape(D_IN, D_OUT)  # [d_in, d_out]
    np.testing.assert_array_equal(codes, unpack(words, leaf.base.bits, D_IN))
