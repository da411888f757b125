"""GPTQ beside its usual form: the same codes, by a sweep that only looks back."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import LinearProblem, LinearStats, output_error
from lqec_jax.errors import InputError
from lqec_jax.quantizers import rtn
from lqec_jax.quantizers.gptq import gptq, quantize
from lqec_jax.runs.linears import _jitted, apply_steps
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense
from lqec_kernels.packing import unpack
from lqec_kernels.sparse import Masked, Sparse24

D_IN, D_OUT, GROUP, BITS = 96, 40, 16, 3
RNG = np.random.default_rng(0)
W = RNG.standard_normal((D_IN, D_OUT))
X = RNG.standard_normal((500, D_IN)) @ (np.eye(D_IN) + 0.15 * RNG.standard_normal((D_IN, D_IN)))
X *= np.exp(0.5 * RNG.standard_normal(D_IN))
GRAM = X.T @ X / len(X)


def rounding(w: jax.Array) -> Affine:
    return rtn.quantize(w, GroupGrid(BITS, GROUP, dtype=jnp.float32))


def damp(gram: np.ndarray) -> np.ndarray:
    return gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(len(gram))


def fit(w: np.ndarray, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """The grid of one group, in float32 as scales are stored: (scale, zero), [d_out] each."""
    w = w.astype(np.float32)
    lo, hi = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    if symmetric:
        hi = np.maximum(-lo, hi)
        lo = -hi
    scale = (hi - lo) / np.float32(2**BITS - 1)
    zero = np.full_like(scale, 2 ** (BITS - 1)) if symmetric else np.round(-lo / scale)
    return scale.astype(np.float64), zero.astype(np.float64)


def sweep_right_looking(gram: np.ndarray, symmetric=False, fixed=None) -> np.ndarray:
    """GPTQ as published: float64, the inverse's factor, errors pushed into all later rows.

    With fixed scales the rows come by falling energy.
    """
    order = np.arange(D_IN) if fixed is None else np.argsort(-np.diagonal(gram), kind="stable")
    r = np.linalg.cholesky(np.linalg.inv(damp(gram)[np.ix_(order, order)])).T
    w, codes = W[order].copy(), np.empty(W.shape)
    for i, row in enumerate(order):
        if fixed is not None:
            scale, zero = fixed[row // GROUP], 2 ** (BITS - 1)
        elif i % GROUP == 0:
            scale, zero = fit(w[i : i + GROUP], symmetric)
        codes[row] = np.clip(np.round(w[i] / scale) + zero, 0, 2**BITS - 1)
        error = (w[i] - scale * (codes[row] - zero)) / r[i, i]
        w[i:] -= np.outer(r[i, i:], error)
    return codes


@lru_cache
def compiled(grid: GroupGrid, act_order: bool):
    return jax.jit(lambda w, gram, keep: quantize(w, gram, grid, act_order=act_order, keep=keep))


def run(w, gram, *, bits=BITS, symmetric=False, act_order=False, search=None, keep=None) -> Affine:
    grid = GroupGrid(bits, GROUP, symmetric, search, jnp.dtype("float32"))
    return compiled(grid, act_order)(w, gram, keep)[0]


def codes_of(base: Affine) -> np.ndarray:
    return np.asarray(unpack(base.codes, base.bits, base.d_in))


def loss(base, w=W, gram=GRAM) -> float:
    error = w - np.asarray(base.dense(), np.float64)
    return np.sum(error * (gram @ error)) / np.sum(w * (gram @ w))


def test_codes_are_those_of_the_right_looking_form():
    with jax.enable_x64(True):
        came = codes_of(run(jnp.asarray(W), jnp.asarray(GRAM)))
    np.testing.assert_array_equal(came, sweep_right_looking(GRAM))


def test_any_order_is_swept_on_groups_of_neighbours():
    with jax.enable_x64(True):
        base = run(jnp.asarray(W), jnp.asarray(GRAM), symmetric=True, act_order=True)
    # The largest weight of a symmetric group lies half way, so the scale's last place decides.
    fixed = np.asarray(base.scales, np.float64)
    np.testing.assert_array_equal(codes_of(base), sweep_right_looking(GRAM, True, fixed))
    wanted = [fit(W[first : first + GROUP], True)[0] for first in range(0, D_IN, GROUP)]
    np.testing.assert_allclose(fixed, wanted, rtol=1e-6)


def narrow(**arguments) -> Affine:
    return run(jnp.asarray(W, jnp.float32), jnp.asarray(GRAM, jnp.float32), **arguments)


def test_float32_gives_the_same_codes():
    wanted = sweep_right_looking(GRAM)
    base = narrow()
    assert np.mean(codes_of(base) == wanted) >= 0.999
    scales, zeros = np.asarray(base.scales), np.asarray(base.columns()[2])
    w_hat = (wanted - zeros.repeat(GROUP, 0)) * scales.repeat(GROUP, 0)
    error = W - w_hat
    exact = np.sum(error * (GRAM @ error)) / np.sum(W * (GRAM @ W))
    assert loss(base) == pytest.approx(exact, rel=1e-3)


def test_independent_inputs_make_it_plain_rounding():
    w = jnp.asarray(W, jnp.float32)
    gram = jnp.diag(jnp.asarray(np.exp(RNG.standard_normal(D_IN)), jnp.float32))
    wanted = rounding(w)
    for act_order in (False, True):
        came = run(w, gram, act_order=act_order)
        for c, r in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(c, r)


def test_it_beats_rounding_and_each_option_helps_here():
    rounded = loss(rounding(jnp.asarray(W, jnp.float32)))
    plain, searched = loss(narrow()), loss(narrow(search="output"))
    assert 0.2 * rounded < plain < 0.7 * rounded
    assert searched < 0.97 * plain
    assert loss(narrow(act_order=True)) < 0.7 * rounded


def test_grids_are_fitted_on_what_the_sweep_left():
    """A group's range is that of its targets, which no fixed grid of the weights has."""
    base = narrow()
    fixed = np.stack([fit(W[first : first + GROUP], False)[0] for first in range(0, D_IN, GROUP)])
    np.testing.assert_allclose(base.scales[0], fixed[0], rtol=1e-6)
    assert np.mean(np.abs(base.scales[1:] / fixed[1:] - 1) > 1e-3) > 0.9
    np.testing.assert_allclose(narrow(act_order=True).scales, fixed, rtol=1e-6)


# Steps


def pose(w=W, x=X, leaf=None) -> tuple[LinearProblem, CompressedLinear]:
    w = jnp.asarray(w, jnp.float32)
    gram = jnp.asarray(x.T @ x / len(x), jnp.float32)
    return LinearProblem(w, LinearStats(gram=gram), jax.random.key(0)), leaf or (
        CompressedLinear(Dense(w))
    )


STEP = gptq(bits=BITS, group_size=GROUP)
RUN = jax.jit(STEP.run)


def notes_of(x=X, gram=None) -> tuple[list[str], np.ndarray]:
    problem, leaf = pose(x=x)
    if gram is not None:
        stats = LinearStats(gram=jnp.asarray(gram, jnp.float32))
        problem = LinearProblem(problem.w, stats, problem.key)
    leaf, entry = apply_steps("w", [STEP], problem, leaf)
    return entry["steps"][0]["notes"], np.asarray(leaf.dense())


def test_a_good_gram_is_not_talked_about():
    assert notes_of()[0] == []


def test_too_few_tokens_and_dead_channels_are_rounded():
    for x, said in (
        (X[:2], []),
        (X * (np.arange(D_IN) % 8 > 0), [f"gram: {D_IN // 8} of the channels are dead"]),
        (X * 0, [f"gram: {D_IN} of the channels are dead"]),
    ):
        notes, dense = notes_of(x)
        assert notes == said
        assert np.isfinite(dense).all() and np.abs(dense - W).max() < 2


@pytest.mark.parametrize(
    ("least", "said"),
    [(-0.05, "gram: damped by 0.1, rung 1"), (-3.0, "gram: forgotten at rung 3")],
)
def test_the_report_names_the_rung_of_an_indefinite_gram(least, said):
    q, _ = np.linalg.qr(RNG.standard_normal((D_IN, D_IN)))
    gram = q * np.linspace(least, 2 - least, D_IN) @ q.T
    notes, dense = notes_of(gram=gram)
    assert len(notes) == 1 and notes[0].startswith(said)
    assert np.isfinite(dense).all()
    if least < -1:
        wanted = rtn.quantize(
            jnp.asarray(W, jnp.float32), GroupGrid(BITS, GROUP, dtype=jnp.float32)
        )
        came = run(jnp.asarray(W, jnp.float32), jnp.asarray(gram, jnp.float32))
        np.testing.assert_array_equal(came.codes, wanted.codes)


def test_one_shape_is_compiled_once():
    count = _jitted(STEP)._cache_size()
    for w in (W, -W, 2 * W):
        problem, leaf = pose(w)
        apply_steps("w", [STEP], problem, leaf)
    assert _jitted(STEP)._cache_size() == max(count, 1)


def test_behind_a_transform_it_rounds_what_the_inputs_meet():
    scale = jnp.asarray(np.exp(0.3 * RNG.standard_normal(D_IN)), jnp.float32)
    inner = jnp.asarray(W, jnp.float32) / scale[:, None]
    problem, leaf = pose(leaf=CompressedLinear(Dense(inner), (), ChannelScale(scale)))
    came, _ = RUN(problem, leaf)
    assert came.input_transform is not None
    seen, plain = pose(np.asarray(inner), X * np.asarray(scale))
    wanted, _ = RUN(seen, plain)
    assert np.mean(codes_of(came.base) == codes_of(wanted.base)) > 0.999


def test_zeros_stay_zero_and_are_made_up_for():
    keep = RNG.random(W.shape) < 0.5
    w = jnp.asarray(np.where(keep, W, 0), jnp.float32)
    problem, leaf = pose(w, leaf=CompressedLinear(Masked.from_mask(Dense(w), jnp.asarray(keep))))
    came, _ = RUN(problem, leaf)
    assert isinstance(came.base, Masked) and isinstance(came.base.inner, Affine)
    dense = np.asarray(came.dense())
    np.testing.assert_array_equal(dense[~keep], 0)
    blind = run(problem.w, problem.stats.gram)
    masked = CompressedLinear(Masked.from_mask(blind, jnp.asarray(keep)))
    assert output_error(problem, came) < 0.95 * output_error(problem, masked)


def test_two_of_four_become_room_saved():
    keep = jnp.asarray(np.arange(D_IN) % 4 < 2)[:, None] & jnp.ones(W.shape, bool)
    w = jnp.where(keep, jnp.asarray(W, jnp.float32), 0)
    problem, leaf = pose(w, leaf=CompressedLinear(Masked.from_mask(Dense(w), keep, "2:4")))
    came, _ = RUN(problem, leaf)
    assert isinstance(came.base, Sparse24)
    np.testing.assert_array_equal(came.base.kept(), keep)
    again, _ = RUN(problem, came)
    assert isinstance(again.base, Sparse24)
    np.testing.assert_array_equal(again.base.kept(), keep)


def test_no_group_size_is_one_group_a_column():
    problem, leaf = pose()
    came, _ = jax.jit(gptq(bits=BITS, group_size=None).run)(problem, leaf)
    assert came.base.scales.shape == (1, D_OUT) and came.base.group_size == D_IN
    rounded = CompressedLinear(rtn.quantize(problem.w, GroupGrid(BITS, None)))
    assert output_error(problem, came) < 0.8 * output_error(problem, rounded)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 9}, "bits=9; an integer from 1 to 8"),
        ({"group_size": 0}, "group_size=0; an integer >= 1"),
        ({"damp": 0}, "damp=0; a number from 1e-06 to 1"),
        ({"act_order": 1}, "act_order=1; one of True, False"),
        ({"clip_search": "mse"}, "clip_search='mse'; one of True, False, 'weight', 'output'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^gptq: ") as caught:
        gptq(**arguments)
    assert said in str(caught.value)


def test_a_group_that_does_not_divide_is_refused():
    problem, leaf = pose()
    with pytest.raises(InputError, match="gptq: d_in=96 is not divisible by group_size=64"):
        gptq(group_size=64).run(problem, leaf)
