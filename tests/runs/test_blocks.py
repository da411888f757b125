"""Block steps among linear ones: what they see, in which order, and what is said of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import get_at, set_at, unstack_blocks
from lqec_jax.core.types import (
    Evaluation,
    LinearStep,
    Schedule,
    Solution,
    TrainingStep,
    weight_error,
)
from lqec_jax.errors import InputError
from lqec_jax.recipe import Recipe, parse_recipe
from lqec_jax.runs.blocks import wrap_linears
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint

TOKENS, HELD_OUT = make_tokens(10), make_tokens(4, seed=1)
TRAIN = 8
LAYERS = 2
ROUNDED = parse_recipe("rtn(bits=3, group_size=32)").steps
HISTORY = (Evaluation(0, None, 2.0), Evaluation(4, 1.5, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    write_checkpoint(folder / "model", num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return lqec.load(folder / "model")


def make_step(run, name="look", scope="block") -> TrainingStep:
    schedule = Schedule(epochs=1, batch=2)
    return TrainingStep(name, scope, run, {}, schedule, lambda leaf: leaf, lambda leaf: 0)


def compress(folder, *steps, **options):
    return lqec.compress(folder / "model", Recipe(steps), TOKENS, seqlen=SEQLEN, eval=HELD_OUT,
                         **options)  # fmt: skip


def looking(seen: list) -> TrainingStep:
    """Returns a block step that keeps copies of what it sees and changes nothing."""

    def run(problem):
        arrays = {name: np.array(getattr(problem, name)) for name in ("teacher", "student")}
        seen.append(dataclasses.replace(problem, **arrays))
        return Solution(problem.block, HISTORY, 4, ("looked",))

    return make_step(run)


def flatten(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model.params)]


@pytest.fixture(scope="module")
def chained(folder):
    """`rtn | look | svd`, and what `look` saw."""
    seen = []
    svd = parse_recipe("svd(rank=2)").steps
    return compress(folder, *ROUNDED, looking(seen), *svd), seen


def test_a_block_step_sees_the_block_and_both_streams(teacher, chained):
    small, seen = chained
    assert [problem.train for problem in seen] == [TRAIN] * LAYERS
    tokens = TOKENS.reshape(-1, SEQLEN)  # held-out windows are not shown
    h = student = np.asarray(teacher.fns.embed(teacher.params, tokens))
    block = jax.jit(teacher.fns.block)
    dense, compressed = (unstack_blocks(m.params["blocks"]) for m in (teacher, small))
    for layer, problem in enumerate(seen):
        np.testing.assert_allclose(problem.teacher, h, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(problem.student, student, rtol=1e-4, atol=1e-5)
        for path in problem.fns.linears:
            w = get_at(dense[layer], f"{path}/kernel")
            np.testing.assert_array_equal(get_at(problem.dense, f"{path}/kernel"), w)
            leaf = get_at(problem.block, f"{path}/kernel")
            assert isinstance(leaf.base, Affine) and not leaf.corrections
        h = block(dense[layer], h)[0]
        student = block(compressed[layer], student)[0]
    assert not np.allclose(seen[1].student, seen[1].teacher, atol=1e-3)
    keys = {tuple(jax.random.key_data(problem.work.key).tolist()) for problem in seen}
    assert len(keys) == LAYERS


def test_a_step_that_changes_nothing_changes_nothing(folder, chained):
    """Linear steps before and after run as if it were not there."""
    plain = compress(folder, *ROUNDED, *parse_recipe("svd(rank=2)").steps)
    for came, wanted in zip(flatten(chained[0]), flatten(plain), strict=True):
        np.testing.assert_array_equal(came, wanted)
    for came, wanted in zip(chained[0].report["linears"], plain.report["linears"], strict=True):
        assert came == wanted


def test_its_curve_is_reported_block_by_block(chained):
    report = chained[0].report
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "rtn | look | svd"]
    for layer, fit in enumerate(report["fits"]):
        assert fit == {
            "phase": 0, "layer": layer, "method": "look", "best_update": 4,
            "history": [point._asdict() for point in HISTORY], "notes": ["looked"],
        }  # fmt: skip
    assert json.loads(json.dumps(report["fits"])) == report["fits"]
    steps = {tuple(s["method"] for s in linear["steps"]) for linear in report["linears"]}
    assert steps == {("rtn", "svd")}


def replacing(base_of):
    """Returns a block step that replaces every base."""

    def run(problem):
        block = problem.block
        for path in problem.fns.linears:
            leaf = get_at(block, f"{path}/kernel")
            new = dataclasses.replace(leaf, base=Dense(base_of(leaf.base.dense())))
            block = set_at(block, f"{path}/kernel", new)
        return Solution(block, HISTORY, 4)

    return make_step(run, "double")


def test_what_follows_a_block_step_reads_what_it_made(folder, teacher):
    """The next linear step sees the weight and inputs through it."""
    seen = {}

    def run(problem, leaf):
        return dataclasses.replace(leaf, base=Dense(leaf.base.dense() + 0 * problem.stats.rms[0]))

    def objective(problem, leaf):
        jax.debug.callback(lambda rms: seen.setdefault(len(seen), rms), problem.stats.rms)
        return weight_error(problem, leaf)

    after = LinearStep("after", run, {}, frozenset({"rms"}), objective=objective)
    small = compress(folder, replacing(lambda w: 2 * w), after)
    (first, *_) = unstack_blocks(small.params["blocks"])
    w = get_at(unstack_blocks(teacher.params["blocks"])[0], "mlp/down/kernel")
    np.testing.assert_array_equal(first["mlp"]["down"]["kernel"].dense(), 2 * w)
    h = teacher.fns.embed(teacher.params, TOKENS.reshape(-1, SEQLEN)[:TRAIN])
    inputs = jax.jit(teacher.fns.block)(first, h)[1]["mlp/down"]
    rms = np.sqrt(np.mean(np.square(inputs), axis=(0, 1)))
    assert any(len(r) == len(rms) and np.allclose(r, rms, rtol=1e-4) for r in seen.values())
    errors = {linear["path"]: linear["relative_error"] for linear in small.report["linears"]}
    assert errors["blocks/1/attn/q"] == pytest.approx(1.0, rel=1e-5)  # ||2w - w||² / ||w||²


def test_after_a_model_step_both_streams_are_walked_again(folder, teacher):
    def double(problem):
        blocks = jax.tree.map(lambda a: a, problem.params["blocks"])
        segment = blocks[0]
        leaf = segment["mlp"]["down"]["kernel"]
        segment = set_at(segment, "mlp/down/kernel", CompressedLinear(Dense(2 * leaf.dense())))
        params = {**problem.params, "blocks": (segment,)}
        return Solution(params, HISTORY, 4)

    model_step = make_step(double, "double", "model")
    seen = []
    small = compress(folder, model_step, looking(seen))
    assert [stage["name"] for stage in small.report["stages"]] == ["teacher", "double", "look"]
    assert small.report["stages"][1]["ppl"] == pytest.approx(small.report["stages"][2]["ppl"])
    h = teacher.fns.embed(teacher.params, TOKENS.reshape(-1, SEQLEN))
    dense = unstack_blocks(teacher.params["blocks"])[0]
    np.testing.assert_allclose(
        seen[1].teacher, jax.jit(teacher.fns.block)(dense, h)[0], rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(seen[1].student, seen[1].teacher, atol=1e-3)


def test_a_step_gets_the_teacher_s_fisher(folder):
    seen = []

    def run(problem, leaf):
        fisher = problem.stats.fisher
        assert fisher.shape == problem.w.shape and problem.stats.rms is None
        return CompressedLinear(Dense(fisher))

    step = LinearStep("curvature", run, {}, frozenset({"fisher"}), objective=weight_error)
    lines = []

    class Reporter:
        begin = staticmethod(lambda task, total, done=0: seen.append((task, total)))
        advance = staticmethod(lambda done, message="": None)
        say = staticmethod(lines.append)

    small = compress(folder, step, reporter=Reporter())
    assert seen[:2] == [("fisher", LAYERS), ("curvature", LAYERS)]
    (segment,) = small.params["blocks"]
    fisher = segment["mlp"]["down"]["kernel"].dense()
    assert fisher.shape == (LAYERS, 64, 32) and float(fisher.min()) >= 0
    assert float(fisher.mean()) > 0


def test_a_refusal_and_a_break_name_the_block(folder):
    def refuse(problem):
        raise InputError("refuse: not this one; choose another")

    with pytest.raises(InputError, match=r"choose another \(at blocks/0\)"):
        compress(folder, make_step(refuse))
    with pytest.raises(FloatingPointError, match="double made blocks/0 non-finite"):
        compress(folder, replacing(lambda w: w / 0))


def test_one_matrix_is_not_a_block():
    with pytest.raises(InputError, match="quantize: omniquant needs a whole model"):
        lqec.quantize(jnp.ones((64, 32)), "omniquant()")
    with pytest.raises(InputError, match="omniquant"):
        lqec.quantize_tree({"layer": {"kernel": jnp.ones((64, 64))}}, "omniquant()")


def test_wrapping_leaves_norms_alone(teacher):
    dense = unstack_blocks(teacher.params["blocks"])[0]
    block = wrap_linears(teacher.fns, dense)
    assert block["attn_norm"] is dense["attn_norm"]
    assert isinstance(block["mlp"]["up"]["kernel"], CompressedLinear)
