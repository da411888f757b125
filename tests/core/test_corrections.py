"""Turns of a base and factors: one loop, the best pair, whatever stands around the base."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.bases import mask_base, replace_base
from lqec_jax.core.closed_form import truncate
from lqec_jax.core.corrections import (
    Turns,
    alternate,
    base_weight,
    keep_best,
    make_correction,
    requantize,
    store,
)
from lqec_jax.core.types import LinearProblem, LinearStats, LinearStep, weight_error
from lqec_jax.errors import InputError
from lqec_jax.trainings.rilq import rilq
from lqec_kernels.formats import (
    Affine,
    ChannelScale,
    CompressedLinear,
    Dense,
    Hadamard,
    LowRank,
)

D_IN, D_OUT, RANK = 32, 16, 3


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
PROBLEM = LinearProblem(jnp.asarray(W), LinearStats(), jax.random.key(0))
LEAF = CompressedLinear(Dense(PROBLEM.w))


def on_grid(step: float | None = None, bits: int = 8, **fields) -> LinearStep:
    """Makes a quantizer to multiples of `step`; None takes what fits each column."""

    def run(problem: LinearProblem, leaf: CompressedLinear):
        w = leaf.base.dense()
        most = 2 ** (bits - 1) - 1
        fitting = jnp.max(jnp.abs(w), axis=0, keepdims=True) / most
        scales = fitting if step is None else jnp.full((1, w.shape[1]), step)
        scales = jnp.maximum(scales, 1e-30)
        codes = jnp.clip(jnp.round(w / scales), -most, most) + 2 ** (bits - 1)
        base = Affine.from_codes(
            codes.astype(jnp.uint8), scales, None, bits=bits, group_size=leaf.d_in
        )
        new = replace_base(leaf, base)
        return (new, jnp.sum(w)) if fields.get("notes") else new

    return LinearStep("on_grid", run, {"step": step}, **fields)


def correct(error, rank: int = RANK):
    return store(*truncate(error, rank), "float32"), ()


def take_turns(quantizer: LinearStep, leaf: CompressedLinear = LEAF, **fields):
    turns = Turns("a_method", quantizer, **fields)
    return jax.jit(lambda p, leaf: alternate(p, leaf, turns, correct, weight_error))(PROBLEM, leaf)


# The loop


def go_through(errors: list[float], keep: str = "best") -> tuple:
    errors = jnp.asarray(errors, jnp.float32)

    def iterate(number):
        return number + 1, {"number": number, "square": number**2}, errors[number]

    best, seen, won = keep_best(iterate, jnp.int32(0), len(errors), keep)
    np.testing.assert_array_equal(seen, errors)
    assert int(best["number"]) == int(won) and int(best["square"]) == int(won) ** 2
    return int(won)


def test_the_first_of_the_least_errors_is_kept():
    assert go_through([3.0, 1.0, 2.0, 1.0]) == 1
    assert go_through([1.0]) == 0
    assert go_through([1.0, 2.0, 3.0], keep="last") == 2


def test_what_is_not_finite_is_kept_only_where_nothing_is():
    nan, inf = np.nan, np.inf
    assert go_through([nan, 5.0, nan, 6.0]) == 1
    assert go_through([2.0, nan, -inf + nan]) == 0
    assert go_through([inf, nan]) == 0


def test_what_is_compiled_does_not_grow_with_the_turns():
    def size(iters: int) -> int:
        turns = Turns("a_method", on_grid(), iters)
        run = jax.jit(lambda p, leaf: alternate(p, leaf, turns, correct, weight_error))
        return len(run.lower(PROBLEM, LEAF).as_text().splitlines())

    assert size(3) == size(40)


# Turns


def test_on_a_grid_that_stays_no_turn_raises_the_error():
    leaf, (_, errors, won, _) = take_turns(on_grid(step=0.8), iters=8)
    assert (np.diff(errors) <= 1e-7).all() and errors[-1] < 0.9 * errors[0]
    assert int(won) == int(np.argmin(errors))
    assert float(weight_error(PROBLEM, leaf)) == pytest.approx(float(errors[won]), rel=1e-5)
    codes = np.asarray(leaf.base.dense()) / 0.8
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)


def test_where_scales_follow_the_best_pair_is_kept_and_it_is_no_worse_than_the_first():
    quantizer = on_grid(bits=2)
    best, (_, errors, won, _) = take_turns(quantizer, iters=12)
    assert 0 < int(won) < 11 and np.diff(errors).max() > 0, "the law is not put to a test"
    assert errors[won] == errors.min() < errors[0]
    assert float(weight_error(PROBLEM, best)) == pytest.approx(float(errors[won]), rel=1e-5)
    shorter, _ = take_turns(quantizer, iters=int(won) + 1, keep="last")
    np.testing.assert_allclose(shorter.dense(), best.dense(), atol=1e-5)
    last, (_, again, at, _) = take_turns(quantizer, iters=12, keep="last")
    assert int(at) == 11 and float(weight_error(PROBLEM, last)) > float(errors[won])
    np.testing.assert_allclose(again, errors, rtol=1e-6)


def test_factors_may_come_first():
    leaf, (_, errors, _, _) = take_turns(on_grid(bits=2), iters=1, first="factors")
    start, _ = correct(PROBLEM.w)
    base, _ = requantize("a_method", on_grid(bits=2), PROBLEM, LEAF, PROBLEM.w - start.dense())
    np.testing.assert_allclose(leaf.base.dense(), base.dense(), atol=1e-6)
    assert float(errors[0]) == pytest.approx(float(weight_error(PROBLEM, leaf)), rel=1e-5)


# What stands around the base

KEY = jax.random.key(1)
AROUND = {
    "nothing": CompressedLinear(Dense(PROBLEM.w)),
    "scales": CompressedLinear(
        Dense(PROBLEM.w),
        (),
        ChannelScale(jnp.exp(draw(D_IN, seed=2) / 4)),
        ChannelScale(jnp.exp(draw(D_OUT, seed=3) / 4)),
    ),
    "rotations": CompressedLinear(
        Dense(PROBLEM.w), (), Hadamard.draw(KEY, D_IN, 16), Hadamard.draw(KEY, D_OUT, 8)
    ),
    "an inverse rotation": CompressedLinear(
        Dense(PROBLEM.w), (), None, Hadamard.draw(KEY, D_OUT, 16, inverse=True)
    ),
    "a correction": CompressedLinear(
        Dense(PROBLEM.w), (LowRank(jnp.asarray(draw(D_IN, 2)) / 4, jnp.asarray(draw(2, D_OUT))),)
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_base_is_remade_behind_what_stands_around_it(name):
    leaf = AROUND[name]
    w = base_weight(PROBLEM, leaf)
    new, facts = requantize("a_method", on_grid(bits=8), PROBLEM, leaf, w)
    assert isinstance(new.base, Affine) and facts == ()
    assert float(weight_error(PROBLEM, new)) < 2e-4
    assert jax.tree.structure(new.input_transform) == jax.tree.structure(leaf.input_transform)
    assert len(new.corrections) == len(leaf.corrections)
    leaf, (_, errors, _, _) = take_turns(on_grid(bits=2), leaf, iters=3)
    assert float(weight_error(PROBLEM, leaf)) == pytest.approx(float(errors.min()), rel=1e-5)
    assert isinstance(leaf.base, Affine) and errors.min() < 0.5


def test_zeros_of_the_base_stay():
    keep = jnp.asarray(draw(D_IN, D_OUT, seed=5) > -0.5)
    leaf, _ = take_turns(on_grid(bits=4), mask_base(LEAF, keep), iters=3)
    np.testing.assert_array_equal(leaf.base.dense() == 0, ~keep | (leaf.base.inner.dense() == 0))
    np.testing.assert_array_equal(leaf.base.kept(), keep)


def test_the_quantizers_own_corrections_come_after_the_leafs():
    extra = LowRank(jnp.ones((D_IN, 1)), jnp.ones((1, D_OUT)))

    def run(problem, leaf):
        new = on_grid(bits=2).run(problem, leaf)
        return dataclasses.replace(new, corrections=(*new.corrections, extra))

    leaf, _ = take_turns(LinearStep("shifted", run, {}), AROUND["a correction"], iters=2)
    assert [c.rank for c in leaf.corrections] == [2, 1, RANK]
    left = W - sum(np.asarray(c.dense()) for c in leaf.corrections[:2]) - leaf.base.dense()
    _, spectrum, _ = np.linalg.svd(left)
    assert float(weight_error(PROBLEM, leaf)) == pytest.approx(
        np.sum(spectrum[RANK:] ** 2) / np.sum(W**2), rel=1e-4
    )


# The step


def make(arguments: dict, notes=None) -> LinearStep:
    def solve(error, problem, rank):
        return store(*truncate(error, rank), "float32"), jnp.sum(error)

    return make_correction(
        "a_method", {"rank": RANK, **arguments}, solve, weight_error, "words", frozenset({"rms"}),
        notes,
    )  # fmt: skip


def test_a_step_asks_for_what_both_ask_for_and_says_what_both_say():
    quantizer = on_grid(bits=2, needs=frozenset({"gram"}), notes=lambda facts: ("it",))
    step = make({"quantizer": quantizer, "iters": 3}, notes=lambda facts: ("own",))
    assert step.needs == {"rms", "gram"}
    leaf, facts = jax.jit(step.run)(PROBLEM, LEAF)
    errors = np.asarray(facts[1])
    own, turns, it = step.notes(jax.device_get(facts))
    assert (own, it) == ("own", "it")
    assert turns == (
        f"turns: pair {int(facts[2]) + 1} of 3 kept, its error {errors.min():.4g}, "
        f"{errors[0]:.4g} after the first and {errors[2]:.4g} after the last"
    )
    once = make({"quantizer": quantizer, "iters": 1})
    assert once.notes(jax.device_get(jax.jit(once.run)(PROBLEM, LEAF)[1])) == ("it",)


def test_without_a_quantizer_the_base_stays():
    step = make({"quantizer": None, "iters": 3})
    assert step.needs == {"rms"} and step.notes is None
    leaf = CompressedLinear(Dense(jnp.round(PROBLEM.w)))
    new = jax.jit(step.run)(PROBLEM, leaf)
    np.testing.assert_array_equal(new.base.w, leaf.base.w)
    assert float(weight_error(PROBLEM, new)) < 0.8 * float(weight_error(PROBLEM, leaf))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 0}, "rank=0"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"iters": 0}, "iters=0"),
        ({"first": "both"}, "first='both'"),
        ({"keep": "first"}, "keep='first'"),
        ({"quantizer": "nf"}, "quantizer='nf'; a method that quantizes single weights was wanted"),
        (
            {"quantizer": rilq()},
            "quantizer=rilq, a model step; a method that quantizes single weights",
        ),
    ],
)
def test_other_arguments_are_refused(arguments, words):
    with pytest.raises(InputError, match=f"^a_method: {words}"):
        make(arguments)


def test_a_quantizer_that_makes_no_base_is_refused_on_shapes():
    halve = LinearStep("halve", lambda problem, leaf: leaf, {})
    for leaf in (LEAF, mask_base(LEAF, jnp.asarray(W > 0))):
        run = partial(make({"quantizer": halve}).run, PROBLEM)
        with pytest.raises(InputError, match="quantizer=halve leaves the weight dense; one that"):
            jax.eval_shape(run, leaf)
