"""Block-AP: it begins at rounding, moves weights, scales and zeros, and stores what it trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.train.parts import Grid
from lqec_jax.trainings.block_ap import block_ap
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.packing import unpack
from tests.train.tiny import make_block_problem

OPTIONS = {"bits": 2, "group_size": 16, "batch": 4}
STEP = block_ap(**OPTIONS, epochs=6, weight_lr=0.02, scale_lr=0.02)


@pytest.fixture(scope="module")
def problem():
    return make_block_problem(windows=34)


@pytest.fixture(scope="module")
def solution(problem):
    return STEP.run(problem)


def leaf_of(block) -> CompressedLinear:
    return block["mix"]["kernel"]


def assert_equal_leaves(came, wanted):
    assert jax.tree.structure(came) == jax.tree.structure(wanted)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(c, w)


@pytest.mark.parametrize("symmetric", [False, True])
def test_untrained_it_is_rounding(problem, symmetric):
    leaf = leaf_of(problem.block)
    (rtn,) = parse_recipe(f"rtn(bits=2, group_size=16, symmetric={symmetric})").steps
    rounded = rtn.run(LinearProblem(leaf.base.w, LinearStats(), problem.work.key), leaf)
    step = block_ap(**OPTIONS, symmetric=symmetric)
    assert_equal_leaves(step.preview(leaf), rounded)
    assert jax.eval_shape(step.preview, leaf).stored_bits() == rounded.stored_bits()
    # Weights, a scale a group, and a zero.
    assert step.count(leaf) == 32 * 32 + 2 * 32 * (1 if symmetric else 2)


def test_training_lowers_the_loss_far_below_rounding(solution):
    losses = {point.update: point.val_loss for point in solution.history}
    assert losses[solution.best_update] == min(losses.values()) < 0.6 * losses[0]


def test_codes_scales_and_zeros_all_move(problem, solution):
    first, last = STEP.preview(leaf_of(problem.block)).base, leaf_of(solution.params).base
    codes = [unpack(base.codes, 2, 32) for base in (first, last)]
    assert 0.02 < float(jnp.mean(codes[0] != codes[1])) < 0.9
    assert float(jnp.mean(first.scales != last.scales)) > 0.9
    ratio = last.scales.astype(jnp.float32) / first.scales.astype(jnp.float32)
    assert 0.5 < float(ratio.min()) < 1 < float(ratio.max()) < 1.5
    assert last.scales.dtype == jnp.float16 and last.zeros.dtype == jnp.uint32


def test_what_is_stored_is_what_was_scored(problem, solution):
    block = jax.jit(problem.fns.block)
    stored = {"mix": {"kernel": leaf_of(solution.params).dense()}}
    own = np.asarray(block(problem.dense, problem.teacher)[0])
    came = np.asarray(block(stored, problem.student)[0])
    error = np.mean((own - came)[problem.train :] ** 2)
    added = np.mean((own - problem.teacher)[: problem.train] ** 2)
    best = min(point.val_loss for point in solution.history)
    assert best == pytest.approx(error / added, rel=1e-4)


def test_gradients_reach_weights_scales_and_zeros():
    """∂ŵ/∂(scale), in units of the first, is s0 (code - z - w/s) inside and s0 (u - z) outside."""
    w = np.random.RandomState(0).standard_normal((16, 4)).astype(np.float32)
    leaf = CompressedLinear(Dense(jnp.asarray(w)))
    part = Grid(grid=GroupGrid(2, 16))
    start = part.begin(leaf, jax.random.key(0))
    trained = {"moved": start.base.moved, "scales": 0.6 * start.base.scales,  # a smaller grid clips
               "zeros": start.base.zeros}  # fmt: skip

    def read(trained):
        return part.read(
            dataclasses.replace(start, base=dataclasses.replace(start.base, **trained))
        )

    found = jax.grad(lambda t: jnp.sum(read(t)))(trained)
    first = np.asarray(part.keep(start, leaf).base.scales, np.float32)
    s, z = (0.6 * first).astype(np.float16).astype(np.float32), np.asarray(start.base.zeros)[:, 0]
    wanted = np.round(w / s) + z
    codes = np.clip(wanted, 0, 3)
    inside = wanted == codes
    assert not inside.all() and inside.any()
    slope = np.where(inside, codes - z - w / s, codes - z) * first
    np.testing.assert_allclose(found["scales"][:, 0], slope.sum(axis=0)[None], rtol=1e-4)
    np.testing.assert_allclose(found["moved"][0], inside * first, rtol=1e-6)
    np.testing.assert_allclose(found["zeros"][:, 0], -(~inside * s).sum(axis=0)[None], rtol=1e-5)


def test_a_scale_of_the_model_changes_nothing(problem, solution):
    """Rates are in steps of a grid: a power of two on the weights goes through, to the bit."""
    base = leaf_of(problem.block).base
    part = Grid(grid=GroupGrid(2, 16))

    def begin(times: float):
        return part.begin(CompressedLinear(Dense(times * base.w)), jax.random.key(0))

    def moving(leaf):
        return [a for path, a in jax.tree_util.tree_leaves_with_path(leaf) if part.label(path, a)]

    def nudged(leaf):
        return jax.tree_util.tree_map_with_path(
            lambda path, a: a + 0.1 if part.label(path, a) else a, leaf
        )

    small, large = begin(1.0), begin(32.0)
    assert len(moving(small)) == 3
    assert_equal_leaves(moving(small), moving(large))
    np.testing.assert_array_equal(32.0 * part.read(nudged(small)), part.read(nudged(large)))


@pytest.mark.parametrize("arguments", ["epochs=0", "batch=0", "weight_lr=-1.0", "scale_lr='a'"])
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match=f"block_ap: {arguments.replace('.', '[.]')}"):
        parse_recipe(f"block_ap({arguments})")
