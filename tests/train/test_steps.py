"""A training is parts × loss × scope: what follows from the three, whichever they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import sites
from lqec_jax.core.closed_form import truncate
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.types import ModelProblem, Schedule, TrainingStep, Windows, Work
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.train.answers import Answer
from lqec_jax.train.losses import ModelLoss, NextToken
from lqec_jax.train.parts import Adapters, Norms, Scales, Zeros
from lqec_jax.train.rates import Rates
from lqec_jax.train.sharding import make_mesh
from lqec_jax.train.steps import Program, half_key, make_training, same_key, split_key
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.compensation import toy
from tests.train.tiny import Shrink, make_block_problem, make_plain_problem, training_of

SHORT = Schedule(updates=4, batch=4, accumulate=1, eval_every=2, patience=0)
PARTS = [Scales(rates=Rates(0.02)), Adapters(rates=Rates(0.01))]


def make_step(parts=PARTS, **options) -> TrainingStep:
    facts = {"scope": "model", "schedule": SHORT} | options
    return make_training("mine", parts, ModelLoss((NextToken(),)), **facts)


@pytest.fixture(scope="module")
def plain():
    plain = make_plain_problem(windows=8, length=6, d=32)
    return plain._replace(params=jax.tree.map(jnp.asarray, plain.params))


def test_a_step_says_what_it_is():
    step = make_step(arguments={"lr": 0.1}, objective_name="words", leave_out=["up"])
    assert (step.name, step.scope, step.schedule) == ("mine", "model", SHORT)
    assert str(step) == "mine(lr=0.1)" and step.objective_name == "words"
    assert step.leave_out == {"up"}
    assert {part.method for part in training_of(step).parts} == {"mine"}


def test_equal_trainings_are_equal_and_so_are_their_programs(plain):
    one, two = (training_of(make_step()) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    programs = [Program(plain.fns, t.parts, t.loss) for t in (one, two)]
    assert programs[0] == programs[1] and hash(programs[0]) == hash(programs[1])
    assert programs[0] != Program(plain.fns, one.parts[:1], one.loss)


def test_a_training_that_is_made_again_is_not_compiled_again(plain, monkeypatch):
    make_step().run(plain.pose(val=4))
    calls = []
    loss = NextToken.measure
    monkeypatch.setattr(NextToken, "measure", lambda *a: calls.append(1) or loss(*a))
    make_step().run(plain.pose(val=4, key=jax.random.key(1)))
    assert not calls


def test_what_moves_is_what_parts_name_and_all_else_keeps_its_bits(plain):
    solution = make_step().run(plain.pose(val=4))
    assert solution.best_update > 0
    before, after = (jax.tree_util.tree_leaves_with_path(p)
                     for p in (plain.params, solution.params))  # fmt: skip
    moved = training_of(make_step()).moves
    for (path, was), (_, now) in zip(before, after, strict=True):
        assert was.dtype == now.dtype
        assert bool(jnp.any(was != now)) == moved(path, was), path


@pytest.mark.parametrize("parts", [[Scales(rates=Rates(0.1))], PARTS], ids=["scales", "and more"])
def test_what_is_left_out_stays_whatever_moves(parts):
    def with_svd(w) -> CompressedLinear:
        base = quantize(w, GroupGrid(2, 8))
        return CompressedLinear(base, (LowRank(*truncate(w - base.dense(), 2)),))

    student = toy.compress(with_svd)
    work = Work(jax.random.key(0))
    problem = ModelProblem(toy.FNS, student, Windows(toy.TOKENS, 16), work)
    solution = make_step(parts, leave_out=("down",)).run(problem)
    assert solution.best_update > 0
    given, kept = (toy.kernels(p) for p in (student, solution.params))
    for was, now in zip(*map(jax.tree.leaves, (given["down"], kept["down"])), strict=True):
        assert was.dtype == now.dtype and np.array_equal(was, now)
    assert not np.array_equal(given["up"].base.scales, kept["up"].base.scales)


def test_what_is_left_out_is_named_by_its_whole_path(plain):
    leaf = plain.params["blocks"][0]["mix"]["kernel"]
    block = {"mlp": {name: {"kernel": leaf} for name in ("down", "down2")}}
    moves = training_of(make_step(leave_out=("mlp/down",))).moves
    found = {
        jax.tree_util.keystr(path)
        for path, array in jax.tree_util.tree_leaves_with_path({"blocks": (block,)})
        if moves(path, array)
    }
    assert len(found) == 3 and all("['down2']" in text for text in found)


def test_numbers_are_counted_and_sizes_known_from_shapes(plain):
    leaf = jax.eval_shape(lambda: plain.params["blocks"][0]["mix"]["kernel"])
    step = make_step([Scales(), Zeros(), Adapters()])
    assert step.count(leaf) == 32 + 32 + 4 * (32 + 32)
    seen = jax.eval_shape(step.preview, leaf)
    assert seen.base.zeros.dtype == jnp.float16 and seen.base.zeros.shape == (1, 1, 32)


def test_without_a_gain_a_weight_that_had_all_is_the_very_one(plain):
    still = make_step([Scales(rates=Rates(0.0)), Adapters(rates=Rates(0.0))])
    solution = still.run(plain.pose(val=4))
    assert solution.best_update == 0
    pairs = zip(*(sites.each(p, plain.fns.sites) for p in (plain.params, solution.params)),
                strict=True)  # fmt: skip
    for (_, was), (_, now) in pairs:
        assert now is was


def test_of_parts_that_put_something_in_the_others_stay_to_the_bit_without_a_gain(plain):
    still = make_step([Zeros(rates=Rates(0.0)), Adapters(rates=Rates(0.0))])
    solution = still.run(plain.pose(val=4))
    assert solution.best_update == 0
    for (_, was), (_, now) in zip(
        *(sites.each(p, plain.fns.sites) for p in (plain.params, solution.params)), strict=True
    ):
        assert now.base.zeros.dtype == jnp.float16
        np.testing.assert_array_equal(now.base.dense(), was.base.dense())
        for new, old in zip(*map(jax.tree.leaves, (now.corrections, was.corrections)), strict=True):
            np.testing.assert_array_equal(new, old)


def test_a_key_is_parted_as_the_training_says(plain):
    key = jax.random.key(3)
    first, second = jax.random.split(key)
    wanted = {split_key: (first, second), same_key: (key, key), half_key: (first, key)}
    for keys, parts in wanted.items():
        assert all(a == b for a, b in zip(keys(key), parts, strict=True))
    bare = jax.tree.map(lambda a: a, plain.params)
    bare = sites.map_model(bare, plain.fns.sites,
                           lambda leaf, _: dataclasses.replace(leaf, corrections=()))  # fmt: skip
    still = [Adapters(rank=2, dtype="float32", rates=Rates(0.0))]
    solution = make_step(still, keys=half_key).run(plain.pose(val=4, key=key, params=bare))
    assert solution.best_update == 0
    for number, (_, leaf) in enumerate(sites.each(solution.params, plain.fns.sites)):
        drawn = jax.random.normal(jax.random.fold_in(first, number), (1, 32, 2)) / 2
        # Stored with b = 0, so as it was drawn.
        np.testing.assert_allclose(leaf.corrections[0].a, drawn, rtol=1e-6)


def test_lines_of_a_training_come_before_those_of_the_loop(plain):
    def describe(parts, begun, count) -> tuple[str, ...]:
        return (f"{len(parts)} parts, {count} numbers, {len(begun['blocks'])} segments",)

    still = [Scales(rates=Rates(0.0)), Norms()]
    solution = make_step(still, describe=describe).run(plain.pose(val=4))
    assert solution.notes[0] == "2 parts, 64 numbers, 2 segments"
    assert "no update lowered" in solution.notes[1]


def test_where_nothing_moves_a_model_is_refused(plain):
    with pytest.raises(InputError, match="mine: the model has nothing of what is to be trained"):
        make_step([Norms()]).run(plain.pose(val=4))


def test_adafactor_runs_on_one_device(plain):
    step = make_step([Scales(), Norms(rates=Rates(0.1, optimizer="adafactor"))])
    work = Work(jax.random.key(0), mesh=make_mesh(data=2))
    with pytest.raises(InputError, match="mine: optimizer='adafactor' runs on one device; leave"):
        step.run(plain.pose(val=4, work=work))


def test_a_schedule_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="mine: batch=4 does not divide into accumulate=3"):
        make_step(schedule=dataclasses.replace(SHORT, accumulate=3))


def test_a_block_s_key_and_windows_are_those_of_its_problem():
    step = make_training("mine", [Shrink(rates=Rates(0.1))], Answer(), scope="block",
                         schedule=Schedule(epochs=1, batch=2, accumulate=None))  # fmt: skip
    problem = make_block_problem(windows=12)
    one, again = (step.run(problem) for _ in range(2))
    other = step.run(dataclasses.replace(problem, work=Work(jax.random.key(5))))
    assert one.history == again.history != other.history
    assert [point.update for point in one.history] == [0, 5]


def test_what_is_no_weight_of_a_block_keeps_its_bits():
    problem = make_block_problem()
    block = {**problem.block, "norm": {"scale": jnp.full(3, 0.1, jnp.float16)}}
    step = make_training("mine", [Shrink(rates=Rates(0.1))], Answer(), scope="block",
                         schedule=Schedule(epochs=1, batch=2, accumulate=None))  # fmt: skip
    solution = step.run(dataclasses.replace(problem, block=block))
    assert solution.best_update and isinstance(solution.params["mix"]["kernel"].base, Dense)
    kept = solution.params["norm"]["scale"]
    assert kept.dtype == jnp.float16 and np.array_equal(kept, block["norm"]["scale"])
