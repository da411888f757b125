"""The laws that every training keeps, over every row of `tests.train.rows`.

One tiny problem and one compilation a row serve all laws. A new training adds a row; a law that it
cannot keep it names in `EXCEPTIONS`, with the reason.
"""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import ModelProblem, Params
from lqec_jax.methods import METHODS
from lqec_jax.train.fit import NoSession, _compile_loss
from lqec_jax.train.moments import collect_moments, find_loss
from lqec_jax.train.parts import Norms
from lqec_jax.train.sharding import make_mesh
from lqec_jax.train.steps import Program, read_weight
from lqec_kernels.formats import CompressedLinear, LowRank
from tests.train.rows import (
    ROWS,
    TRAIN,
    VAL,
    D,
    params_of,
    problem_of,
    run,
    run_once,
    spoil,
    weight_of,
    window_at,
)
from tests.train.tiny import plain_fns, training_of

AT_ONCE = "one program trains and stores a weight over all windows at once"
# Law -> row -> why it does not keep it, and what holds in its place.
EXCEPTIONS: dict[str, dict[str, str]] = {
    "begins as what it was given": {
        "apiq linear": "adapters begin at their closed form, below the clipped grid alone: "
        "tests/trainings/test_apiq.py holds them to that bound",
    },
    "a loss that is not finite steps back": {
        "apiq linear": f"{AT_ONCE}, so none is spoiled alone; a rate without bound steps back in "
        "tests/train/test_moments.py",
    },
    "killed and resumed": {
        "apiq linear": f"{AT_ONCE}; a block that was cut begins anew, as all do in a run",
    },
    "on a mesh of two": {
        name: "a block is trained on one device"
        for name, row in ROWS.items() if row.step.scope == "block"
    },
    "memory stays packed": {
        name: "its weights are given dense; tests/train/test_memory.py bounds what apiq holds "
        "beside them, omniquant and block_ap read the whole of each"
        for name in ("omniquant", "block_ap", "apiq", "apiq linear")
    },
}  # fmt: skip


def that_keep(law: str) -> list[str]:
    return [name for name in ROWS if name not in EXCEPTIONS[law]]


def as_bytes(tree: Params) -> list[tuple]:
    return [
        (jax.tree_util.keystr(path), array.dtype, np.asarray(array).tobytes())
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    ]


def losses_of(solution) -> dict[int, float]:
    return {point.update: point.val_loss for point in solution.history}


def score(name: str, params: Params, *, raw: bool = False) -> float:
    """Returns the loss over the validation windows, by the program that a run looks with.

    Args:
      raw: by the loss alone, of parameters as they are stored.
    """
    row, problem = ROWS[name], problem_of(ROWS[name])
    training = training_of(row.step)
    batch = training.loss.prepare(row.step.name, problem)(TRAIN + np.arange(VAL))
    if not isinstance(problem, ModelProblem):
        params = params | training.loss.beside(problem)
    parts = () if raw else training.parts
    loss = _compile_loss(Program(problem.fns, parts, training.loss))
    return float(loss(params, batch)[0])


def test_every_training_has_a_row_and_every_exception_a_reason():
    trainings = {n for n, row in METHODS.items() if ".trainings." in row.factory}
    assert trainings | {"own"} == {row.step.name for row in ROWS.values()}
    for rows in EXCEPTIONS.values():
        assert rows.keys() <= ROWS.keys() and all(rows.values())
    # Which methods a law leaves out is no more than it was.
    assert {law: len(rows) for law, rows in EXCEPTIONS.items()} == {
        "begins as what it was given": 1, "a loss that is not finite steps back": 1,
        "killed and resumed": 1, "on a mesh of two": 7, "memory stays packed": 4,
    }  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_an_update_helps(name):
    """Else the other laws would be about nothing."""
    solution = run_once(name).solution
    losses = losses_of(solution)
    assert solution.best_update > 0
    assert losses[solution.best_update] == min(losses.values()) < losses[0] * (1 - 1e-4)


@pytest.mark.parametrize("name", that_keep("begins as what it was given"))
def test_it_begins_as_what_it_was_given(name):
    row, problem = ROWS[name], problem_of(ROWS[name])
    given, training = weight_of(problem), training_of(row.step)
    first = losses_of(run_once(name).solution)[0]
    if row.replaces:  # then as what it makes before any training
        block = {**problem.block, "mix": {"kernel": row.step.preview(given)}}
        assert first == pytest.approx(score(name, params_of(problem, block), raw=True), rel=1e-5)
        return
    assert first == pytest.approx(score(name, params_of(problem), raw=True), rel=1e-5)
    begun = read_weight(training.parts, training.begin(given, jax.random.key(9)))
    np.testing.assert_array_equal(begun.dense(), given.dense())


@pytest.mark.parametrize("name", ROWS)
def test_what_is_stored_is_what_was_scored(name):
    """To the bit where reading rounds, else within the rounding to what is stored."""
    row, problem, ran = ROWS[name], problem_of(ROWS[name]), run_once(name)
    best = losses_of(ran.solution)[ran.solution.best_update]
    stored = weight_of(problem, ran.solution.params)
    if ran.fitted is None:  # one weight, scored on its inputs' moments
        moments = collect_moments(problem, ran.solution.params, ("mix",))["mix"][1]
        w = problem.dense["mix"]["kernel"]
        aug = training_of(row.step).loss.aug
        came = float(find_loss(w, stored.dense(), moments, aug=aug))
        assert came == pytest.approx(best, rel=1e-4)
        return
    assert score(name, ran.fitted.params) == best
    read = read_weight(training_of(row.step).parts, weight_of(problem, _block_of(ran.fitted)))
    dense = read if isinstance(read, jax.Array) else read.dense()
    off = np.abs(np.asarray(dense, np.float64) - np.asarray(stored.dense(), np.float64))
    assert (off <= bound_storing(name, stored)).all()
    if not isinstance(read, jax.Array) and row.replaces:
        np.testing.assert_array_equal(read.base.dense(), stored.base.dense())


def _block_of(fitted) -> Params:
    (block,) = fitted.params["blocks"]
    return fitted.params if "embed" in fitted.params else block


def bound_storing(name: str, stored: CompressedLinear) -> np.ndarray:
    """Returns how far a weight may move where its numbers are rounded to half precision.

    Each number by half a last place, 2⁻¹¹ of it: a product of factors by twice that; what is
    neither is read as it is stored. Beside it a few last places of float32 in factors that are
    balanced, and in sums.
    """
    half, single = 2.0**-11, 2.0**-21
    moved = {part.__class__.__name__ for part in training_of(ROWS[name].step).parts}
    base = np.abs(np.asarray(stored.base.dense(), np.float64))
    bound = np.zeros(base.shape)
    if "Scales" in moved:
        bound += half * base
    if "Zeros" in moved and stored.base.zeros.dtype != jnp.uint32:
        _, scales, zeros = stored.base.columns()
        shift = np.abs(np.asarray(scales, np.float64) * np.asarray(zeros, np.float64))
        bound += half * np.repeat(shift, stored.base.group_size, axis=-2)
    for correction in stored.corrections:
        if isinstance(correction, LowRank):
            a, b = (np.abs(np.asarray(f, np.float64)) for f in (correction.a, correction.b))
            bound += (2.1 * half + single) * np.repeat(a @ b, correction.pool, axis=-2)
    return bound * (1 + half) + (single * base if bound.any() else 0)


def list_arrays(tree: Params) -> dict[str, jax.Array]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): array for path, array in paths}


def paths_that_move(name: str) -> tuple[str, ...]:
    """Returns where in a weight something moves, as ends of paths."""
    row, problem = ROWS[name], problem_of(ROWS[name])
    training = training_of(row.step)
    begun = jax.eval_shape(training.begin, weight_of(problem), jax.random.key(0))
    found = [jax.tree_util.keystr(path) for path, array in
             jax.tree_util.tree_leaves_with_path(begun) if training.moves(path, array)]  # fmt: skip
    if row.replaces:  # by a base that its clips, or weights, make
        found.append(".base")
    if any(isinstance(part, Norms) for part in training.parts):
        found.append("['norm']['scale']")
    return tuple(found)


@pytest.mark.parametrize("name", ROWS)
def test_nothing_else_moves(name):
    """All but what the parts name keeps its bits, and of that something moved or is new."""
    problem, solution = problem_of(ROWS[name]), run_once(name).solution
    given, came = (list_arrays(params_of(problem, tree)) for tree in (None, solution.params))
    moving = paths_that_move(name)
    differ = {
        text
        for text in given | came
        if text not in given
        or text not in came
        or given[text].dtype != came[text].dtype
        or not np.array_equal(given[text], came[text])
    }
    assert differ
    for text in differ:
        # A rounded factor's codes and scales lie where the factor did that moved.
        assert any(f"{end}." in f"{text}." for end in moving), text


@pytest.mark.parametrize("name", that_keep("a loss that is not finite steps back"))
def test_without_a_gain_the_bits_are_those_given(name):
    """Spoiled at once: what the method had to put in is put in, and changes nothing."""
    row, problem = ROWS[name], problem_of(ROWS[name])
    spoiled = spoil(problem, window_at(row, 0))
    solution = run(row, spoiled).solution
    assert solution.best_update == 0 and "the loss was nan at update 2" in solution.notes[-1]
    given, kept = weight_of(problem), weight_of(problem, solution.params)
    if row.replaces:
        made = row.step.preview(given)
        assert as_bytes(kept.base) == as_bytes(made.base)
        assert all(not np.asarray(c.b).any() for c in kept.corrections)
    else:
        np.testing.assert_array_equal(kept.dense(), given.dense())
        stay = {text: (dtype, array) for text, dtype, array in as_bytes(kept)}
        for text, dtype, array in as_bytes(given):
            # Integers may have become real numbers of the same value.
            real = text == ".base.zeros" and stay[text][0] != dtype
            assert real or stay[text] == (dtype, array), text
    others = (params_of(p, t) for p, t in ((spoiled, None), (spoiled, solution.params)))
    is_weight = lambda node: isinstance(node, CompressedLinear)  # noqa: E731
    without = [jax.tree.map(lambda n: None if is_weight(n) else n, tree, is_leaf=is_weight)
               for tree in others]  # fmt: skip
    assert as_bytes(without[0]) == as_bytes(without[1])


@pytest.mark.parametrize("name", that_keep("a loss that is not finite steps back"))
def test_a_loss_that_is_no_longer_finite_steps_back_to_the_best(name):
    row, problem, clean = ROWS[name], problem_of(ROWS[name]), run_once(name).solution
    ran = run(row, spoil(problem, window_at(row, 4)))
    first, second = (point.val_loss for point in clean.history[:2])
    assert second < first, "the first two updates are to help"
    points = ran.solution.history
    assert points[:2] == clean.history[:2] and np.isnan(points[2].val_loss) and len(points) == 3
    assert ran.solution.best_update == 2
    assert ran.solution.notes[-1] == (
        "the loss was nan at update 4; the parameters of update 2 are kept"
    )
    kept = weight_of(problem, ran.solution.params)
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves(kept))
    if not isinstance(problem, ModelProblem):
        assert score(name, ran.fitted.params) == second


@pytest.mark.parametrize("name", ROWS)
def test_the_preview_is_the_result(name):
    row, problem, solution = ROWS[name], problem_of(ROWS[name]), run_once(name).solution
    given, came = weight_of(problem), weight_of(problem, solution.params)
    seen = jax.eval_shape(row.step.preview, jax.eval_shape(lambda: given))
    assert jax.tree.structure(seen) == jax.tree.structure(came)
    for shape, array in zip(*map(jax.tree.leaves, (seen, came)), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert seen.bits_per_weight == came.bits_per_weight
    assert row.step.count(jax.eval_shape(lambda: given)) > 0


@pytest.mark.parametrize("name", ROWS)
def test_same_key_same_bytes(name):
    row, problem, solution = ROWS[name], problem_of(ROWS[name]), run_once(name).solution
    again = run(row, problem).solution
    assert again.history == solution.history
    assert as_bytes(again.params) == as_bytes(solution.params)


class Killed(Exception):
    """Stands for a process that was killed."""


class Session(NoSession):
    """Keeps what a run saves, as a folder would, and dies before an update."""

    def __init__(self, die_at: int | None):
        self.saved, self.die_at, self.first = None, die_at, None

    def restore(self, like):
        if self.saved is None:
            return None
        arrays, facts = self.saved
        assert jax.tree.structure(arrays) == jax.tree.structure(like)
        return jax.tree.map(jnp.array, arrays), json.loads(facts)

    def save(self, update, arrays, facts):
        self.saved = jax.tree.map(np.array, arrays), json.dumps(facts)

    def progress(self, done, total, message):
        self.first = self.first or done
        if done == self.die_at:
            raise Killed


@pytest.mark.parametrize("name", that_keep("killed and resumed"))
def test_killed_and_resumed_it_ends_in_the_same_bytes(name):
    row, problem, solution = ROWS[name], problem_of(ROWS[name]), run_once(name).solution
    session = Session(die_at=4)
    with pytest.raises(Killed):
        run(row, problem, session=session)
    session.die_at = session.first = None
    resumed = run(row, problem, session=session).solution
    assert session.first == 3  # after the save at update 2
    assert resumed.history == solution.history and resumed.notes == solution.notes
    assert as_bytes(resumed.params) == as_bytes(solution.params)


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.step.scope == "block"])
def test_a_block_that_was_cut_begins_anew_and_ends_in_the_same_bytes(name):
    """As in a run, whose blocks keep no training state."""
    row, problem, solution = ROWS[name], problem_of(ROWS[name]), run_once(name).solution

    class Cut(NoSession):
        def progress(self, done, total, message):
            raise Killed

    with pytest.raises(Killed):
        run(row, problem, session=Cut())
    assert as_bytes(run(row, problem).solution.params) == as_bytes(solution.params)


@pytest.mark.parametrize("name", that_keep("on a mesh of two"))
def test_on_a_mesh_of_two_it_is_the_same_to_round_off(name):
    row, problem, alone = ROWS[name], problem_of(ROWS[name]), run_once(name).solution
    spread = run(row, problem, mesh=make_mesh(data=2)).solution
    assert spread.best_update == alone.best_update
    for one, two in zip(alone.history, spread.history, strict=True):
        assert two.val_loss == pytest.approx(one.val_loss, rel=1e-3 if name in ROUNDING else 2e-5)
    given, one, two = (
        np.asarray(weight_of(problem, p).dense(), np.float64)
        for p in (None, alone.params, spread.params)
    )
    # Where gradients are next to nothing Adam makes round-off as large as any other step.
    off = np.linalg.norm(one - two) / np.linalg.norm(one - given)
    assert off < (0.2 if name in ROUNDING else 0.02)


# What moves through a rounding goes to the other side of it by round-off now and then.
ROUNDING = {"finetune rounded", "own model"}


def makes_dense(program: str) -> list[str]:
    """Returns the operations of a lowered program that make a float array as large as a weight."""
    # Of a line's types the last is what it makes.
    dense = re.compile(rf"\s*%.*tensor<(?:1x)?{D}x{D}xf\d+>(?!.*tensor<)")
    return [line for line in program.splitlines() if dense.match(line)]


@pytest.mark.parametrize("name", that_keep("memory stays packed"))
def test_no_update_makes_a_dense_copy_of_a_packed_weight(name):
    program = run_once(name).program
    assert "stablehlo" in program and not makes_dense(program)


def test_a_dense_copy_would_be_seen(monkeypatch):
    def multiply_densely(x, base, *, low_rank=None, layer=None, shards=1):
        return x @ base.dense(x.dtype)

    monkeypatch.setattr("lqec_kernels.api.tiled_matmul", multiply_densely)
    row = ROWS["e2e_qp"]
    # Functions of its own: what was traced before holds the other product.
    problem = replace(problem_of(row), fns=plain_fns.__wrapped__())
    assert makes_dense(run(row, problem).program)
