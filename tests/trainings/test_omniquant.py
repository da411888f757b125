"""OmniQuant's clipping: where it begins, what it learns, and that it is never worse for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats, Work
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.train.parts import clips as module
from lqec_jax.trainings.omniquant import omniquant
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense
from tests.train.tiny import make_block_problem, training_of

STEP = omniquant(bits=2, group_size=16, epochs=3, batch=2, lr=0.1)


@pytest.fixture(scope="module")
def problem():
    return make_block_problem(windows=34)


@pytest.fixture(scope="module")
def solution(problem):
    return STEP.run(problem)


def weight_of(block):
    return block["mix"]["kernel"]


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_clipping_it_is_rounding_to_the_range(symmetric):
    w = jax.random.normal(jax.random.key(0), (64, 8))
    (rtn,) = parse_recipe(f"rtn(bits=2, group_size=16, symmetric={symmetric})").steps
    rounded = rtn.run(
        LinearProblem(w, LinearStats(), jax.random.key(0)), CompressedLinear(Dense(w))
    )
    (part,) = training_of(omniquant(bits=2, group_size=16, symmetric=symmetric)).parts
    leaf = CompressedLinear(Dense(w))
    whole = jax.tree_util.tree_map_with_path(  # σ is 1
        lambda path, a: jnp.full_like(a, 100.0) if part.label(path, a) else a,
        part.begin(leaf, jax.random.key(0)),
    )
    for came, wanted in zip(
        jax.tree.leaves(part.keep(whole, leaf)), jax.tree.leaves(rounded), strict=True
    ):
        np.testing.assert_array_equal(came, wanted)


def test_training_lowers_the_loss_of_a_block(problem, solution):
    losses = {point.update: point.val_loss for point in solution.history}
    assert solution.best_update > 0
    assert losses[solution.best_update] == min(losses.values()) < 0.9 * losses[0]
    assert weight_of(solution.params).bits_per_weight == 2 + (16 + 2) / 16


def test_what_is_stored_is_what_was_scored(problem, solution):
    """The reported loss is that of the stored block, the divisor and both terms included."""
    block = jax.jit(problem.fns.block)
    stored = {"mix": {"kernel": weight_of(solution.params).dense()}}
    h, student = problem.teacher, problem.student
    own, other, came = (
        np.asarray(block(params, x)[0])
        for params, x in ((problem.dense, h), (problem.dense, student), (stored, student))
    )
    val = slice(problem.train, None)
    error = np.mean((own - came)[val] ** 2) + np.mean((other - came)[val] ** 2)
    added = np.mean((own - h)[: problem.train] ** 2)
    best = min(point.val_loss for point in solution.history)
    assert best == pytest.approx(error / added, rel=1e-4)


def test_it_is_never_worse_than_its_start(problem):
    wild = omniquant(bits=2, group_size=16, epochs=2, batch=4, lr=1000.0)
    solution = wild.run(problem)
    assert solution.best_update == 0
    assert solution.notes == ("no update lowered the validation loss; the parameters are those it "
                              "began with",)  # fmt: skip
    leaf = weight_of(problem.block)
    start = STEP.preview(leaf)
    for came, wanted in zip(
        jax.tree.leaves(weight_of(solution.params)), jax.tree.leaves(start), strict=True
    ):
        np.testing.assert_array_equal(came, wanted)


def test_blocks_of_one_shape_are_compiled_once(problem, solution, monkeypatch):
    traced = []
    read = module.read_clipped
    monkeypatch.setattr(module, "read_clipped", lambda *a: traced.append(1) or read(*a))
    STEP.run(make_block_problem(windows=34, work=Work(jax.random.key(1))))
    assert not traced


def test_a_transform_and_a_correction_stay(problem):
    scale = jnp.linspace(0.5, 2.0, 32)
    w = weight_of(problem.block).base.w
    inner = CompressedLinear(Dense(w / scale[:, None]), input_transform=ChannelScale(scale))
    step = omniquant(bits=8, group_size=16, epochs=1, batch=4, aug=False, lr=0.01)
    solution = step.run(make_block_problem(windows=34, block={"mix": {"kernel": inner}}))
    leaf = weight_of(solution.params)
    np.testing.assert_array_equal(leaf.input_transform.scale, scale)
    np.testing.assert_allclose(leaf.dense(), w, atol=0.02)
    assert solution.history[0].val_loss < 0.2  # 8 bits, and no transform forgotten


def test_a_group_that_does_not_divide_is_refused_on_shapes():
    w = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    leaf = jax.eval_shape(STEP.preview, CompressedLinear(Dense(w)))
    assert leaf.stored_bits() == 64 * 32 * (2 + (16 + 2) / 16)
    assert STEP.count(CompressedLinear(Dense(w))) == 2 * 4 * 32
    with pytest.raises(InputError, match="omniquant: d_in=64 is not divisible by group_size=48"):
        jax.eval_shape(omniquant(group_size=48).preview, CompressedLinear(Dense(w)))


@pytest.mark.parametrize("arguments", ["epochs=0", "batch=0", "lr=-1.0", "aug=2", "bits=9"])
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match=f"omniquant: {arguments.replace('.', '[.]')}"):
        parse_recipe(f"omniquant({arguments})")
