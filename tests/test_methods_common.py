"""The laws that every method keeps, over every row of the table.

One weight shape and one compilation a variant serve all laws. A new linear method adds its variants
to `tests/variants.py`; a law that it cannot keep it names in `EXCEPTIONS`, with the reason; a
training, and a linear method that goes on from one, has the test that covers it in `COVERED`.
"""

from dataclasses import fields
from functools import cache, lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import grids
from lqec_jax.core.types import CompressedLinear, LinearProblem, LinearStats, Step, run_linear
from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_jax.methods import METHODS, find_factory
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import apply_steps, preview_leaf
from lqec_kernels.formats import Affine, Dense
from lqec_kernels.packing import unpack
from tests.variants import BEGINS_AFTER, D_IN, D_OUT, GROUP, VARIANTS

COVERED = {"merge": "tests/compensation/test_merge.py"} | {
    name: "tests/test_trainings_common.py"
    for name, row in METHODS.items()
    if ".trainings." in row.factory
}
# How a statistic is computed from inputs x [tokens, d_in].
STATISTICS = {
    "rms": lambda x: np.sqrt(np.mean(x**2, axis=0)),
    "absmean": lambda x: np.mean(np.abs(x), axis=0),
    "gram": lambda x: x.T @ x / len(x),
    "fisher": lambda x: np.outer(np.mean(x**2, axis=0), draw(D_OUT, seed=4) ** 2),
}

# Law -> method -> why it does not keep it.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "outputs come in any order": {
        "squeezellm": "Fisher weights belong to outputs, and the law moves the weight alone",
        "lq_lora": "Fisher weights belong to outputs, and the law moves the weight alone",
        "hadamard": "every output has a sign of its own, or sums of another order",
        "e8p": "every output has a sign of its own",
        "nf": "with `double`, scales of adjacent outputs share one",
        "onebit": "input factors are sums over outputs, whose last places depend on their order",
        "quantize_adapter": "adjacent outputs share a scale",
    },
    "a compensation lowers what it says": {
        "quantize_adapter": "it makes adapters smaller, for which it pays in error",
    },
    "what is lost is a part of the whole": {"quantize_input": "weights stay as they are"},
    "a power of two goes through": {},
    "rounding is never better": {
        "nf": "at 2 bits one of four levels is -1 and none is in between",
        "slim_quant": "one scale for all, where rounding has one a group",
        "ternary": "three levels, where rounding has sixteen",
        "onebit": "two levels, where rounding has sixteen",
    },
    "more bits, more bytes": {
        "hadamard": "a rotation stores no bits but the signs",
        "quantize_input": "inputs are not stored",
        "magnitude": "a mask is a bit a weight, however many of them are set",
        "wanda": "a mask is a bit a weight, however many of them are set",
        "sparsegpt": "a mask is a bit a weight, however many of them are set",
    },
}

EVERY = [
    f"{name}({arguments})"
    for name, variants in VARIANTS.items()
    for arguments in (*variants.rungs, *variants.others)
]


def method_of(text: str) -> str:
    return text.partition("(")[0]


def made_by(folder: str) -> list[str]:
    """Returns the variants of the methods in one folder: a method's kind is where it lives."""
    return [t for t in EVERY if METHODS[method_of(t)].factory.split(".")[1] == folder]


def that_keep(law: str, texts: list[str]) -> list[str]:
    return [text for text in texts if method_of(text) not in EXCEPTIONS[law]]


QUANTIZERS, SPARSIFIERS = made_by("quantizers"), made_by("sparsifiers")
COMPENSATIONS = made_by("compensation")


def over(texts: list[str]):
    """Runs a law over variants. All laws of one follow each other, and share what is compiled."""
    return pytest.mark.parametrize("text", texts, scope="module")


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


@lru_cache(maxsize=8)  # those of one method: a worker with all of them would hold 3 GB
def compiled(text: str):
    """Returns the one compilation of a variant: the leaf, its weight, the objective's change."""
    step = step_of(text)

    def solve(problem: LinearProblem, start: CompressedLinear):
        leaf, _ = run_linear(step, problem, start)
        return leaf, leaf.dense(), step.objective(problem, start), step.objective(problem, leaf)

    return jax.jit(solve)


def pose(text: str, w, x=INPUTS["gaussian"]) -> tuple[LinearProblem, CompressedLinear]:
    """Returns a problem with the statistics that the step asks for, and where it begins.

    A quantizer and a sparsifier begin at the weight, a compensation at its rounding to two bits,
    unless it goes on where another method ended.
    """
    stats = {name: jnp.asarray(STATISTICS[name](x)) for name in step_of(text).needs}
    problem = LinearProblem(jnp.asarray(w), LinearStats(**stats), jax.random.key(0))
    start = CompressedLinear(Dense(problem.w))
    if text in COMPENSATIONS:
        before = BEGINS_AFTER.get(method_of(text), EVERY[0])
        start = compiled(before)(*pose(before, w))[0]
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
    assert VARIANTS.keys() | COVERED.keys() == METHODS.keys() and not set(VARIANTS) & set(COVERED)
    # Pooled adapters, which merging begins with, are made by trainings alone.
    assert {name for name in COVERED if scopes[name] == "linear"} == {"merge"}
    for test in COVERED.values():
        assert (Path(__file__).parents[1] / test).is_file()
    assert set(STATISTICS) == {field.name for field in fields(LinearStats)}
    for name in VARIANTS:
        assert len(VARIANTS[name].rungs) >= 3
        assert "objective" in find_factory(name)().__dict__


@over(EVERY)
def test_same_key_same_bytes(text):
    assert_same(solve(text), solve(text))


# Run op by op, a variant compiles some twenty programs. Rungs differ by a number alone, and the one
# in the middle packs codes of three bits.
RUN_EAGERLY = [f"{name}({variants.rungs[1]})" for name, variants in VARIANTS.items()] + [
    pytest.param(f"{name}({arguments})", marks=pytest.mark.thorough)
    for name, variants in VARIANTS.items()
    for arguments in variants.others
]


@over(RUN_EAGERLY)
def test_jit_equals_eager(text):
    problem, start = pose(text, GAUSSIAN)
    eager, _ = run_linear(step_of(text), problem, start)
    assert_same(compiled(text)(problem, start)[0], eager, ulps=1)


@over(that_keep("outputs come in any order", EVERY))
def test_outputs_may_come_in_any_order(text):
    order = np.random.RandomState(3).permutation(D_OUT)
    dense, permuted = solve(text)[1], solve(text, GAUSSIAN[:, order])[1]
    if text not in COMPENSATIONS:
        np.testing.assert_array_equal(permuted, dense[:, order])
    else:  # factors are rounded to their dtype after a decomposition of another matrix
        np.testing.assert_allclose(permuted, dense[:, order], atol=2e-3)


@over(EVERY)
def test_a_leaf_is_a_tree(text):
    leaf = solve(text)[0]
    arrays, structure = jax.tree.flatten(leaf)
    assert_same(jax.tree.unflatten(structure, arrays), leaf)
    assert hash(structure) == hash(jax.tree.structure(solve(text, -GAUSSIAN)[0]))
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), leaf)
    assert_same(jax.tree.map(lambda array: array[1], stack), leaf)
    assert (stack.d_in, stack.d_out) == (leaf.d_in, leaf.d_out) == (D_IN, D_OUT)


@over(EVERY)
def test_bits_per_weight_are_the_bytes_held(text):
    leaf = solve(text)[0]
    held = sum(np.asarray(array).nbytes for array in jax.tree.leaves(leaf))
    assert leaf.bits_per_weight == 8 * held / (D_IN * D_OUT)


@over(EVERY)
def test_every_weight_gets_a_finite_answer(text):
    for name, w in WEIGHTS.items():
        leaf, dense, *objectives = solve(text, w)
        assert dense.shape == w.shape and dense.dtype == jnp.float32
        for array in jax.tree.leaves((leaf, dense, objectives)):
            assert np.isfinite(array).all(), name
    np.testing.assert_array_equal(solve(text, WEIGHTS["zero"])[1], 0.0)


@over([text for text in EVERY if step_of(text).needs])
def test_every_input_gets_a_finite_answer(text):
    for name, x in INPUTS.items():
        for array in jax.tree.leaves(solve(text, GAUSSIAN, x)):
            assert np.isfinite(array).all(), name


@over([f"{name}({variants.rungs[-1]})" for name, variants in VARIANTS.items()])
def test_a_finer_rung_is_never_worse(text):
    name = method_of(text)
    texts = [f"{name}({arguments})" for arguments in VARIANTS[name].rungs]
    sizes = [solve(text)[0].stored_bits() for text in texts]
    if name not in EXCEPTIONS["more bits, more bytes"]:
        assert sizes == sorted(set(sizes))
    for w in (GAUSSIAN, WEIGHTS["positive"], WEIGHTS["one column alone"]):
        reached = [float(solve(text, w)[3]) for text in texts]
        for coarse, fine in zip(reached, reached[1:], strict=False):
            # Where nothing is left to gain, factors still lose their last places.
            assert fine < coarse or coarse < 1e-7


@over(that_keep("a compensation lowers what it says", COMPENSATIONS))
def test_a_compensation_lowers_what_it_says_it_lowers(text):
    _, _, before, after = solve(text)
    assert after < 0.95 * before


@over(that_keep("what is lost is a part of the whole", QUANTIZERS + SPARSIFIERS))
def test_what_is_lost_is_a_part_of_the_whole(text):
    _, _, before, after = solve(text)
    assert before == 0 < after < 1


@over(that_keep("rounding is never better", QUANTIZERS))
def test_a_quantizer_is_no_worse_than_rounding_at_what_it_says_it_lowers(text):
    arguments = step_of(text).arguments
    plain = [f"{n}={arguments[n]!r}" for n in ("bits", "group_size", "symmetric") if n in arguments]
    problem, _ = pose(text, GAUSSIAN)
    rounded = solve(f"rtn({', '.join(plain)})")[0]
    reached = jax.jit(step_of(text).objective)(problem, rounded)
    assert solve(text)[3] <= reached * (1 + 1e-6)


@over(that_keep("a power of two goes through", QUANTIZERS))
def test_a_power_of_two_goes_through(text):
    np.testing.assert_array_equal(solve(text, 32 * GAUSSIAN)[1], 32 * solve(text)[1])


def test_weights_of_every_size_are_stored_alike():
    # One recipe a format: what is computed in units of the weight is the same for every method.
    for text in (
        "rtn(bits=2, group_size=16)", "hqq(bits=4, group_size=16)", "nf(bits=4)",
        "bcq(bits=2, group_size=16)", "squeezellm(bits=2, weights='ones')",
        "rtn(bits=2, group_size=16) | svd(rank=4) | quantize_adapter(bits=4)",
    ):  # fmt: skip
        errors = {std: store_and_measure(text, std) for std in (1, 1e-30, 1e-7, 1e-5, 1e5, 1e30)}
        for error in errors.values():
            assert error == pytest.approx(errors[1], rel=0.02), (text, errors)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_stores_weights_of_every_size(name):
    text = f"{name}({VARIANTS[name].rungs[0]})"
    if text in COMPENSATIONS:
        text = " | ".join({EVERY[0]: 1, BEGINS_AFTER.get(name, EVERY[0]): 1, text: 1})
    for std in (1e-7, 1e-5, 1e5):
        assert store_and_measure(text, std) <= 1.02 * store_and_measure(text, 1.0) + 1e-6


def store_and_measure(recipe: str, std: float) -> float:
    """Returns ||w - ŵ||² / ||w||² of what the driver stores of a weight of this size."""
    w, x = np.float32(std) * GAUSSIAN, INPUTS["gaussian"]
    stats = {name: jnp.asarray(of(x)) for name, of in STATISTICS.items()}
    problem = LinearProblem(jnp.asarray(w), LinearStats(**stats), jax.random.key(0))
    steps = parse_recipe(recipe).steps
    leaf, report = apply_steps("w", steps, problem, CompressedLinear(Dense(problem.w)))
    dense, exact = np.asarray(leaf.dense(), np.float64), np.asarray(w, np.float64)
    error = np.sum((exact - dense) ** 2) / np.sum(exact**2)
    assert report["relative_error"] == pytest.approx(error, rel=1e-3, abs=1e-9)
    return error


@over(EVERY)
def test_a_leaf_comes_back_from_its_arrays(text):
    leaf = jax.device_get(solve(text)[0])
    assert_same(unflatten(*flatten({"q": {"kernel": leaf}}))["q"]["kernel"], leaf)


def is_affine(text: str) -> bool:
    return isinstance(preview_leaf(parse_recipe(text), D_IN, D_OUT).base, Affine)


@over([text for text in QUANTIZERS if is_affine(text)])
def test_codes_come_back_from_their_words(text):
    base = solve(text)[0].base
    words, scales, zeros = base.columns()
    codes = unpack(words, base.bits, base.d_in)
    assert codes.max() < 2**base.bits
    if zeros is not None and base.zeros.dtype == jnp.uint32:
        again = Affine.from_codes(
            codes, base.scales, zeros, bits=base.bits, group_size=base.group_size
        )
        assert_same(again, base)


@over([t for t in EVERY if method_of(t) == "rtn"])
def test_what_lies_on_the_grid_stays(text):
    leaf, dense, *_ = solve(text)
    words, scales, zeros = leaf.base.columns()
    zeros = jnp.full(scales.shape, 2.0 ** (leaf.base.bits - 1)) if zeros is None else zeros
    grouped = grids.group_rows(dense, leaf.base.group_size)
    codes = grids.round_to_grid(grouped, scales[:, None], zeros[:, None], leaf.base.bits)
    codes = codes.reshape(D_IN, D_OUT)  # [d_in, d_out]
    np.testing.assert_array_equal(codes, unpack(words, leaf.base.bits, D_IN))
