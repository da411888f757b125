"""ApiQ: grids and adapters trained together, by blocks and by weights, and the latter's bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import clipping, grids
from lqec_jax.core.clipping import Clipped, clip_range, start_clips
from lqec_jax.core.closed_form import reduce_rank, regression_error
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import LinearProblem, LinearStats, Work
from lqec_jax.errors import InputError
from lqec_jax.recipe import parse_recipe
from lqec_jax.train.answers import Answer
from lqec_jax.train.moments import collect_moments, find_cross, find_loss
from lqec_jax.train.parts import Adapters, Clips
from lqec_jax.train.rates import make_optimizer
from lqec_jax.train.steps import Program, read_weight
from lqec_jax.trainings.apiq import apiq
from lqec_jax.trainings.omniquant import omniquant
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.packing import unpack
from lqec_kernels.sparse import Masked
from tests.train.tiny import make_block_problem, training_of

GRID, RANK = GroupGrid(bits=2, group_size=16), 4
SMALL = {"bits": 2, "group_size": 16, "rank": RANK, "epochs": 4, "batch": 2}
STEP = apiq(**SMALL, clip_lr=0.1, lr=0.01)
BY_WEIGHT = apiq(**SMALL, scope="linear", lr=0.003, dtype="float32")


@pytest.fixture(scope="module")
def problem():
    return make_block_problem(windows=34)


@pytest.fixture(scope="module")
def solution(problem):
    return STEP.run(problem)


@pytest.fixture(scope="module")
def by_weight(problem):
    return BY_WEIGHT.run(problem)


def weight_of(block) -> CompressedLinear:
    return block["mix"]["kernel"]


def put(problem, leaf: CompressedLinear):
    return dataclasses.replace(problem, block={"mix": {"kernel": leaf}})


def test_it_begins_as_the_clipped_grid_alone(problem):
    """With b = 0 the loss is OmniQuant's, and nothing at eight bits where the streams are one."""
    ours = apiq(bits=8, group_size=16, rank=RANK, epochs=1, batch=32)
    theirs = omniquant(bits=8, group_size=16, epochs=1, batch=32)
    one = dataclasses.replace(problem, student=problem.teacher)
    for step in (ours, theirs):
        assert step.run(one).history[0].val_loss < 5e-3  # a range drawn in by 2 % is not nothing
    first, second = (step.run(problem).history[0].val_loss for step in (ours, theirs))
    assert first == pytest.approx(second, rel=1e-5)


def test_training_lowers_what_is_stored(problem, solution):
    """The loss that is reported is that of the stored codes, scales and adapters."""
    losses = {point.update: point.val_loss for point in solution.history}
    assert solution.best_update > 0
    assert losses[solution.best_update] == min(losses.values()) < 0.5 * losses[0]
    leaf = weight_of(solution.params)
    assert leaf.bits_per_weight == 2 + (16 + 2) / 16 + 16 * 2 * RANK / 32
    block = jax.jit(problem.fns.block)
    h, student = problem.teacher, problem.student
    own, other, came = (
        np.asarray(block({"mix": {"kernel": w}}, x)[0])
        for w, x in ((problem.dense["mix"]["kernel"], h),
                     (problem.dense["mix"]["kernel"], student), (leaf.dense(), student))
    )  # fmt: skip
    val = slice(problem.train, None)
    error = np.mean((own - came)[val] ** 2) + np.mean((other - came)[val] ** 2)
    added = np.mean((own - h)[: problem.train] ** 2)
    assert min(losses.values()) == pytest.approx(error / added, rel=2e-3)


def test_codes_computed_again_from_the_stored_scales_are_the_stored_codes(problem, solution):
    w = np.asarray(problem.dense["mix"]["kernel"]).reshape(2, 16, 32)
    words, scales, zeros = weight_of(solution.params).base.columns()
    scales, zeros = (np.asarray(a, np.float32)[:, None] for a in (scales, zeros))
    codes = np.clip(np.round(w / scales) + zeros, 0, 3).reshape(32, 32)
    np.testing.assert_array_equal(unpack(words, 2, 32), codes)


def test_the_student_stays_nearer_at_every_block_than_with_rounding(problem):
    random, block = np.random.default_rng(0), jax.jit(problem.fns.block)
    teacher = ours = rounded = problem.teacher
    (rtn,) = parse_recipe("rtn(bits=2, group_size=16)").steps
    for _ in range(2):
        w = jnp.asarray(random.standard_normal((32, 32)) * 32**-0.5, jnp.float32)
        leaf = CompressedLinear(Dense(w))
        here = dataclasses.replace(
            problem, dense={"mix": {"kernel": w}}, teacher=teacher, student=ours
        )
        weights = (
            weight_of(STEP.run(put(here, leaf)).params).dense(),
            rtn.run(LinearProblem(w, LinearStats(), jax.random.key(0)), leaf).dense(),
        )
        ours, rounded, teacher = (
            np.asarray(block({"mix": {"kernel": weight}}, x)[0])
            for weight, x in zip((*weights, w), (ours, rounded, teacher), strict=True)
        )
        errors = [np.mean((x - teacher)[problem.train :] ** 2) for x in (ours, rounded)]
        assert errors[0] < 0.5 * errors[1]


def test_finite_differences_are_the_gradients_of_the_block_loss():
    """In float64; of the clips those of the surrogate, in which roundings and zeros stand still."""
    with jax.enable_x64(True):
        problem = make_block_problem()
        teacher, student = (np.asarray(h, np.float64) for h in (problem.teacher, problem.student))
        problem = dataclasses.replace(problem, teacher=teacher, student=student)
        random, w = np.random.default_rng(5), problem.block["mix"]["kernel"].base.w
        draw = lambda *shape: jnp.asarray(random.standard_normal(shape))  # noqa: E731
        adapter = LowRank(draw(32, RANK) / RANK, draw(RANK, 32) / 10)
        clips = {n: jnp.asarray(random.normal(0.5, 0.3, (2, 32)), jnp.float32) for n in UP_LOW}
        trained = {"clips": clips, "adapters": (adapter,)}
        parts = Clips(grid=GRID), Adapters(rank=RANK)
        program = Program(problem.fns, parts, Answer(aug=True))
        batch = program.loss.prepare("apiq", problem)(np.arange(4))

        def loss(trained):
            ends = (trained["clips"][name] for name in UP_LOW)
            leaf = CompressedLinear(Clipped(Dense(w), *ends, GRID), trained["adapters"])
            return program({"blocks": ({"mix": {"kernel": leaf}},)}, batch)[0]

        read = surrogate_of(np.asarray(w, np.float64), clips)

        def surrogate(trained):
            moved = read(trained["clips"])
            y = problem.fns.block({"mix": {"kernel": CompressedLinear(
                Dense(moved), trained["adapters"])}}, batch["h"])[0]  # fmt: skip
            error = jnp.mean(jnp.square(y - batch["answer"]), axis=(1, 2))
            return jnp.mean((2 * error + batch["spread"]) * batch["scale"])

        assert float(surrogate(wide(trained))) == pytest.approx(float(loss(trained)), rel=1e-6)
        gradient, along = jax.jit(jax.grad(loss))(trained), jax.jit(surrogate)
        for part in ("adapters", "clips"):
            push = {n: jax.tree.map(lambda a, on=n == part: on * draw(*a.shape), t)
                    for n, t in wide(trained).items()}  # fmt: skip
            ends = (
                jax.tree.map(lambda a, p, e=e: a + e * p, wide(trained), push)
                for e in (1e-5, -1e-5)
            )
            slope = np.subtract(*(float(along(end)) for end in ends)) / 2e-5
            found = sum(
                float(jnp.vdot(g, p))
                for g, p in zip(*map(jax.tree.leaves, (wide(gradient), push)), strict=True)
            )
            # Clips and their gradients are float32 whatever the rest is.
            assert found == pytest.approx(slope, rel=1e-7 if part == "adapters" else 1e-4)
            assert abs(slope) > 1e-2


UP_LOW = ("upper", "lower")


def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def surrogate_of(w, first):
    """Returns clips -> the read weight [32, 32], zeros and roundings being those at `first`."""
    grouped = w.reshape(2, 16, 32)
    lo, hi = grouped.min(axis=1), grouped.max(axis=1)

    def scale_of(clips):
        return (jax.nn.sigmoid(clips["upper"]) * hi - jax.nn.sigmoid(clips["lower"]) * lo) / 3

    ends = clip_range(jnp.asarray(grouped, jnp.float32), first, GRID)
    scales, zeros = grids.fit_grid(*ends, 2, symmetric=False, dtype=jnp.float16)
    scales, zeros = (np.asarray(a, np.float64) for a in (scales, zeros))
    at_first, whole = scale_of(wide(first)), np.round(grouped / scales)
    codes = np.clip(whole + zeros, 0, 3)

    def read(clips):
        moving = scales + (scale_of(clips) - at_first)[:, None]
        inside = grouped / moving + (whole - grouped / scales) + zeros
        kept = jnp.where(codes == whole + zeros, inside, codes) - zeros
        return (moving * kept).reshape(32, 32)

    return read


def left_and_bound(problem, leaf, moments):
    """Returns what a solved weight leaves of its training windows, and the least beside its base.

    Both are shares of what the teacher's weight puts out.
    """
    w = problem.dense["mix"]["kernel"]
    alone = find_loss(w, leaf.base.dense(), moments, aug=False) * moments.energy
    cross = find_cross(w, leaf.base.dense(), moments, aug=False)
    least = regression_error(alone, moments.gram, cross, RANK) / moments.energy
    return float(find_loss(w, leaf.dense(), moments, aug=False)), float(least)


def test_by_weights_adapters_come_near_their_bound_and_never_pass_it(problem, by_weight):
    moments, _ = collect_moments(problem, problem.block, ("mix",))["mix"]
    assert by_weight.best_update > 0
    left, least = left_and_bound(problem, weight_of(by_weight.params), moments)
    assert 0.9999 * least <= left <= 1.05 * least
    base, adapter = start_of(problem, moments, aug=False)
    first = CompressedLinear(base, (adapter,))
    at_first, least_at_first = left_and_bound(problem, first, moments)
    assert at_first == pytest.approx(least_at_first, rel=1e-4)
    assert left < 0.8 * at_first  # what clips gain


def start_of(problem, moments, *, aug: bool):
    """Returns the base and the adapter that training by weights begins with."""
    training = training_of(apiq(**SMALL, scope="linear", aug=aug, dtype="float32"))
    leaf, w = weight_of(problem.block), problem.dense["mix"]["kernel"]

    def lacking(leaf):
        dense = read_weight(training.parts, leaf).dense()
        return moments.gram, find_cross(w, dense, moments, aug=aug)

    begun = training.begin(leaf, jax.random.key(0))
    for part in training.parts:
        begun = part.solve(begun, leaf, lacking)
    return begun.base, begun.corrections[0]


def test_by_weights_one_stream_is_qera(problem):
    one = dataclasses.replace(problem, student=problem.teacher)
    moments, _ = collect_moments(one, one.block, ("mix",))["mix"]
    np.testing.assert_array_equal(moments.drift, 0.0)
    for aug in (False, True):
        base, adapter = start_of(one, moments, aug=aug)
        a, b = reduce_rank(one.dense["mix"]["kernel"] - base.dense(), moments.gram, RANK)
        # The gram is singular: where no input goes, the two are free to differ.
        came, wanted = (np.asarray(moments.gram @ c) for c in (adapter.dense(), a @ b))
        np.testing.assert_allclose(came, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("scope", ["block", "linear"])
def test_what_a_leaf_has_is_kept_or_trained(problem, scope):
    """A given adapter is trained, a transform and zeros stay."""
    random = np.random.default_rng(1)
    w, scale = weight_of(problem.block).base.w, jnp.linspace(0.5, 2.0, 32)
    keep = jnp.asarray(random.random((32, 32)) < 0.7)
    a, b = (jnp.asarray(random.standard_normal(s), jnp.float32) / 10 for s in ((32, 2), (2, 32)))
    base = Masked.from_mask(Dense(w / scale[:, None]), keep)
    given = CompressedLinear(base, (LowRank(a, b),), ChannelScale(scale))
    step = apiq(**{**SMALL, "rank": None, "epochs": 1, "batch": 8}, scope=scope, updates=10)
    solution = step.run(put(problem, given))
    leaf = weight_of(solution.params)
    assert solution.best_update > 0
    np.testing.assert_array_equal(leaf.input_transform.scale, scale)
    np.testing.assert_array_equal(np.asarray(leaf.base.dense())[~np.asarray(keep)], 0.0)
    (adapter,) = leaf.corrections
    moved = np.abs(adapter.dense() - a @ b).max()
    assert 1e-4 < moved < 0.1 and adapter.a.dtype == jnp.float16
    with pytest.raises(InputError, match="rank=4 was asked for, but there are adapters of rank 2"):
        apiq(**SMALL, scope=scope).run(put(problem, given))


def test_blocks_of_one_shape_are_compiled_once(problem, solution, by_weight, monkeypatch):
    for step in (STEP, BY_WEIGHT):  # programs of tests before this one may have been dropped
        step.run(make_block_problem(windows=34))
    traced, read = [], clipping.read_clipped
    monkeypatch.setattr(clipping, "read_clipped", lambda *a: traced.append(1) or read(*a))
    for step in (STEP, BY_WEIGHT):
        step.run(make_block_problem(windows=34, work=Work(jax.random.key(1))))
    assert not traced


def test_another_key_is_another_start(problem, solution):
    again = STEP.run(problem)
    for came, wanted in zip(*map(jax.tree.leaves, (again.params, solution.params)), strict=True):
        np.testing.assert_array_equal(came, wanted)
    other = STEP.run(dataclasses.replace(problem, work=Work(jax.random.key(7))))
    assert other.history[-1].val_loss != solution.history[-1].val_loss


def test_sizes_are_known_from_shapes():
    leaf = CompressedLinear(Dense(jax.ShapeDtypeStruct((64, 32), jnp.float32)))
    made = jax.eval_shape(STEP.preview, leaf)
    assert made.stored_bits() == 64 * 32 * (2 + (16 + 2) / 16) + 16 * RANK * (64 + 32)
    assert STEP.count(leaf) == 2 * 4 * 32 + RANK * (64 + 32)
    symmetric = apiq(group_size=16, rank=0.25, symmetric=True)
    assert symmetric.count(leaf) == 4 * 32 + 8 * (64 + 32)
    with pytest.raises(InputError, match="apiq: rank=64 is larger than min"):
        jax.eval_shape(apiq(group_size=16).preview, leaf)


def test_the_authors_settings_are_a_preset():
    paper = apiq(preset="paper").arguments
    wanted = {"alpha": 16.0, "epochs": 20, "batch": 1, "clip_lr": 5e-3, "lr": 5e-4,
              "weight_decay": 0.1, "decay": "constant", "aug": True}  # fmt: skip
    assert {name: paper[name] for name in wanted} == wanted
    assert apiq(preset="paper", epochs=3).arguments["epochs"] == 3
    assert apiq(scope="linear").arguments["aug"] is False
    assert apiq(scope="linear", aug=True).arguments["aug"] is True
    assert start_clips(32, 4, GRID, "apiq")["upper"][0, 0] == 4.0


def test_rates_follow_the_width_and_clips_have_their_own():
    """One update of Adam moves everything by its rate; decay adds its share of what is there."""
    adapter = LowRank(jnp.full((32, RANK), 2.0), jnp.full((RANK, 8), 2.0))
    trained = CompressedLinear(Clipped(None, jnp.full((1, 8), 2.0), None, GRID), (adapter,))
    gradient = jax.tree.map(jnp.ones_like, trained)
    for lr, width, wanted in ((None, 128, 0.006), (None, 64, 0.012), (0.02, 64, 0.02)):
        step = apiq(alpha=float(RANK), clip_lr=0.05, lr=lr, weight_decay=0.1, decay="constant")
        optimizer = make_optimizer(training_of(step).parts, width, 10)
        moved, _ = optimizer.update(gradient, optimizer.init(trained), trained)
        np.testing.assert_allclose(moved.base.upper, -0.05 * 1.2, rtol=1e-4)
        (adapter,) = moved.corrections
        for array in (adapter.a, adapter.b):
            np.testing.assert_allclose(array, -wanted * 1.2, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments",
    ["epochs=0", "batch=0", "updates=0", "lr=-1.0", "clip_lr='a'", "aug=2", "scope='model'",
     "decay='no'", "dtype='int8'", "rank=0", "alpha=-1.0", "preset='x'", "bits=9"],
)  # fmt: skip
def test_arguments_are_checked(arguments):
    with pytest.raises(InputError, match=f"apiq: {arguments.replace('.', '[.]')}"):
        parse_recipe(f"apiq({arguments})")
