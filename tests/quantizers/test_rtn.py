"""Round to nearest: no point of a group's grid is nearer to any weight than the one chosen."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize, rtn
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.packing import unpack

D_IN, D_OUT, GROUP = 96, 64, 32


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def run(step, w, rms=None) -> tuple[CompressedLinear, np.ndarray]:
    """Returns a weight's rounding, as it is stored and dense."""
    stats = LinearStats(rms=None if rms is None else jnp.asarray(rms))
    problem = LinearProblem(jnp.asarray(w), stats, jax.random.key(0))

    @jax.jit
    def solve(problem):
        leaf = step.run(problem, CompressedLinear(Dense(problem.w)))
        return leaf, leaf.dense()

    leaf, dense = solve(problem)
    return leaf, np.asarray(dense)


@lru_cache
def gaussian(**arguments) -> tuple[np.ndarray, CompressedLinear, np.ndarray]:
    """Returns a random weight and its rounding, stored and dense."""
    w = draw(D_IN, D_OUT)
    return w, *run(rtn(group_size=GROUP, **arguments), w)


def parts(leaf: CompressedLinear) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (codes, scales, zeros), all [d_in, d_out] float64."""
    base = leaf.base
    words, scales, zeros = base.columns()
    codes = np.asarray(unpack(words, base.bits, base.d_in), np.float64)
    zeros = np.full(scales.shape, 2.0 ** (base.bits - 1)) if zeros is None else np.asarray(zeros)
    return codes, *(
        np.repeat(np.asarray(a, np.float64), base.group_size, axis=0) for a in (scales, zeros)
    )


@pytest.mark.parametrize(("symmetric", "wanted"), [(False, 3e-5), (True, 4e-5)])
def test_eight_bits_lose_almost_nothing(symmetric, wanted):
    w, _, dense = gaussian(bits=8, symmetric=symmetric, scale_dtype="float32")
    error = dense - w
    assert np.mean(error**2) < wanted
    # Half a step: s is at most 2·absmax / 255.
    assert np.abs(error).max() <= np.abs(w).max() / 255 * (1 + 1e-4)


@pytest.mark.parametrize("arguments", [{}, {"symmetric": True}, {"clip_search": True}])
def test_every_weight_goes_to_the_nearest_point_of_its_grid(arguments):
    w, leaf, _ = gaussian(bits=3, **arguments)
    codes, scales, zeros = parts(leaf)
    error = np.abs((codes - zeros) * scales - w)
    for code in range(8):
        assert (error <= np.abs((code - zeros) * scales - w) + 1e-6).all()
    inside = (w >= -zeros * scales) & (w <= (7 - zeros) * scales)
    assert (error[inside] <= 0.5 * scales[inside] * (1 + 1e-5)).all()
    assert inside.mean() > 0.5


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (4, True)])
def test_codes_scales_and_zeros_are_the_formulas(bits, symmetric):
    w, leaf, _ = gaussian(bits=bits, symmetric=symmetric)
    codes, scales, zeros = parts(leaf)
    grouped = w.reshape(-1, GROUP, D_OUT)
    lo, hi = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    if symmetric:
        hi = np.maximum(-lo, hi)
        lo = -hi
    step = (hi - lo) / (2**bits - 1)
    np.testing.assert_allclose(leaf.base.scales, step, rtol=2**-11 * 1.01)
    wanted = 2.0 ** (bits - 1) if symmetric else np.round(-np.repeat(lo, GROUP, axis=0) / scales)
    np.testing.assert_array_equal(zeros, np.broadcast_to(wanted, w.shape))
    # A compiler may divide with the last bit off, which tells only where w/s is half way.
    halfway = np.abs(np.abs(w / scales) % 1 - 0.5) < 1e-6
    assert halfway.sum() <= 3
    wanted = np.clip(np.round(w / scales) + zeros, 0, 2**bits - 1)
    np.testing.assert_array_equal(codes[~halfway], wanted[~halfway])


def test_codes_are_computed_against_the_scale_as_stored():
    w, half, _ = gaussian(bits=8)
    _, single, _ = gaussian(bits=8, scale_dtype="float32")
    assert half.base.scales.dtype == jnp.float16 and single.base.scales.dtype == jnp.float32
    codes, scales, zeros = parts(half)
    np.testing.assert_array_equal(codes, np.clip(np.round(w / scales) + zeros, 0, 255))
    exact_codes, exact_scales, exact_zeros = parts(single)
    assert (codes != exact_codes).any()
    # Codes of the exact scale, read with the stored one, would be off by more.
    stale = np.mean(((exact_codes - exact_zeros) * scales - w) ** 2)
    assert np.mean(((codes - zeros) * scales - w) ** 2) < stale


def test_a_symmetric_grid_stores_no_zeros():
    _, symmetric, _ = gaussian(bits=3, symmetric=True)
    _, asymmetric, _ = gaussian(bits=3)
    assert symmetric.base.zeros is None
    assert symmetric.bits_per_weight == 3 + 16 / GROUP
    assert asymmetric.bits_per_weight == 3 + (16 + 3) / GROUP


@pytest.mark.parametrize("sign", [1, -1])
def test_one_signed_groups_lose_no_half(sign):
    w = sign * (0.1 + np.abs(draw(GROUP, 32)))
    for symmetric in (False, True):
        leaf, dense = run(rtn(bits=4, group_size=GROUP, symmetric=symmetric), w)
        _, scales, _ = parts(leaf)
        # A float16 scale moves the ends of 16 codes by at most 15·2^-11 steps.
        assert (np.abs(dense - w) <= scales * (0.5 + 15 * 2**-11)).all()


def test_rounding_twice_is_rounding_once():
    _, _, once = gaussian(bits=3)
    _, twice = run(rtn(bits=3, group_size=GROUP), once)
    np.testing.assert_allclose(twice, once, atol=1e-6)


def test_a_symmetric_range_grows_when_it_is_fitted_anew():
    # absmax sits at code 0 = -2^(b-1), half a step beyond the range that it came from.
    _, leaf, dense = gaussian(bits=2, symmetric=True)
    again, _ = run(rtn(bits=2, group_size=GROUP, symmetric=True), dense)
    grown = np.asarray(again.base.scales, np.float32) / np.asarray(leaf.base.scales, np.float32)
    assert set(np.round(grown, 2).ravel()) <= {np.float32(1.33), np.float32(0.67)}


def test_a_search_is_never_worse_than_no_search_by_what_it_lowers():
    w, rms = draw(D_IN, D_OUT), np.exp(draw(D_IN, seed=1))

    def error_of(clip_search):
        return run(rtn(bits=2, group_size=GROUP, clip_search=clip_search), w, rms)[1] - w

    errors = {kind: error_of(kind) for kind in (False, "weight", "output")}

    def lowered(kind, power, weight):
        error = weight * np.abs(errors[kind]) ** power
        return error.reshape(-1, GROUP, D_OUT).sum(1)  # [groups, d_out]

    for kind, power, weight in (("weight", 2.4, 1.0), ("output", 2.0, rms[:, None] ** 2)):
        plain, searched = lowered(False, power, weight), lowered(kind, power, weight)
        assert (searched <= plain * (1 + 1e-5)).all()
        assert searched.sum() < 0.9 * plain.sum()
    assert lowered("output", 2.0, rms[:, None] ** 2).sum() < 0.9 * (
        lowered("weight", 2.0, rms[:, None] ** 2).sum()
    )


def test_a_step_reports_what_it_lowers():
    w, rms = draw(D_IN, D_OUT), np.exp(draw(D_IN, seed=1))
    problem = LinearProblem(jnp.asarray(w), LinearStats(rms=jnp.asarray(rms)), jax.random.key(0))
    by_output = rtn(bits=2, group_size=GROUP, clip_search="output")
    leaf, dense = run(by_output, w, rms)
    error, weight = dense - w, rms[:, None] ** 2
    by_output_error = np.sum(weight * error**2) / np.sum(weight * w**2)
    assert by_output.objective(problem, leaf) == pytest.approx(by_output_error, rel=1e-4)
    weight_error = np.sum(error**2) / np.sum(w**2)
    assert rtn(bits=2).objective(problem, leaf) == pytest.approx(weight_error, rel=1e-4)
    assert by_output_error < 0.9 * weight_error
    assert by_output.objective_name != rtn().objective_name


def test_statistics_are_asked_for_only_by_the_search_that_reads_them():
    assert rtn(clip_search="output").needs == {"rms"}
    assert rtn(clip_search="weight").needs == rtn(clip_search=True).needs == rtn().needs == set()


def test_the_rest_of_the_weight_is_kept():
    w = draw(D_IN, D_OUT)
    correction = LowRank(jnp.ones((D_IN, 1)), jnp.ones((1, D_OUT)))
    before = CompressedLinear(
        Dense(jnp.asarray(w)),
        (correction,),
        ChannelScale(jnp.ones(D_IN)),
        ChannelScale(jnp.ones(D_OUT)),
    )
    problem = LinearProblem(jnp.asarray(w), LinearStats(), jax.random.key(0))
    after = jax.jit(rtn(bits=2, group_size=GROUP).run)(problem, before)
    np.testing.assert_array_equal(after.corrections[0].a, correction.a)
    np.testing.assert_array_equal(after.input_transform.scale, before.input_transform.scale)
    np.testing.assert_array_equal(after.output_transform.scale, before.output_transform.scale)
    np.testing.assert_array_equal(after.base.codes, gaussian(bits=2)[1].base.codes)


def test_no_group_size_is_one_group_a_column():
    w = draw(D_IN, 3)
    one, dense = run(rtn(bits=4, group_size=None), w)
    assert one.base.scales.shape == (1, 3) and one.base.group_size == D_IN
    np.testing.assert_array_equal(dense, run(rtn(bits=4, group_size=D_IN), w)[1])


def test_a_stack_is_quantized_by_vmap():
    w = draw(3, D_IN, D_OUT)
    stack = jax.jit(jax.vmap(partial(quantize, grid=GroupGrid(3, GROUP))))(w)
    one = run(rtn(bits=3, group_size=GROUP), w[1])[0].base
    assert stack.codes.shape == (3, *one.codes.shape)
    for came, wanted in zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(came[1], wanted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 9}, "bits=9; an integer from 1 to 8"),
        ({"bits": 0}, "bits=0"),
        ({"group_size": -1}, "group_size=-1; an integer >= 1"),
        ({"symmetric": 1}, "symmetric=1; one of True, False"),
        ({"clip_search": "mse"}, "clip_search='mse'; one of True, False, 'weight', 'output'"),
        ({"scale_dtype": "bfloat16"}, "scale_dtype='bfloat16'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^rtn: ") as caught:
        rtn(**arguments)
    assert said in str(caught.value)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="rtn: d_in=96 is not divisible by group_size=64"):
        run(rtn(group_size=64), draw(D_IN, 4))
