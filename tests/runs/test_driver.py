"""The streaming driver gives what the whole model would, and feeds every step what it asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import get_at, unstack_blocks
from lqec_jax.core.types import (
    Evaluation,
    LinearStep,
    Schedule,
    Solution,
    TrainingStep,
    weight_error,
)
from lqec_jax.errors import InputError
from lqec_jax.io.sources.source import open_folder, read_source
from lqec_jax.models import decoder
from lqec_jax.planning.memory import TextSize, estimate_phases
from lqec_jax.planning.sizes import measure_model
from lqec_jax.recipe import Recipe, parse_recipe
from lqec_jax.runs.driver import Driver
from lqec_jax.runs.folder import Run
from lqec_jax.runs.job import prepare
from lqec_jax.train.sharding import make_mesh
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from tests.golden.tiny_checkpoint import RILQ, SEQLEN, make_tokens, write_checkpoint

TOKENS, HELD_OUT = make_tokens(10), make_tokens(4, seed=1)
TRAIN, VAL = np.split(TOKENS.reshape(10, SEQLEN), [8])
SEEING = "rtn(bits=3, group_size=32, clip_search='output')"
RECIPE = f"{SEEING} | {RILQ} | svd(rank=3)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    write_checkpoint(folder / "model")
    return folder


@pytest.fixture(scope="module")
def teacher(folder):
    return lqec.load(folder / "model")


@pytest.fixture(scope="module")
def small(folder):
    return lqec.compress(folder / "model", RECIPE, TOKENS, seqlen=SEQLEN, eval=HELD_OUT)


@pytest.fixture(scope="module")
def rounded(folder):
    """`SEEING` alone."""
    return lqec.compress(folder / "model", SEEING, TOKENS, seqlen=SEQLEN, eval=HELD_OUT)


def ppl(model):
    return lqec.perplexity(model, HELD_OUT, seqlen=SEQLEN).ppl


def weight(model, layer, path):
    return get_at(unstack_blocks(model.params["blocks"])[layer], f"{path}/kernel")


# ---- the streams


def test_the_streams_end_where_the_whole_model_does(teacher, rounded, small):
    stages = {stage["name"]: stage for stage in small.report["stages"]}
    assert list(stages) == ["teacher", "rtn", "rilq", "svd"]
    assert stages["teacher"]["ppl"] == pytest.approx(ppl(teacher), rel=1e-6)
    assert stages["rtn"]["ppl"] == pytest.approx(ppl(rounded), rel=1e-6)
    assert stages["svd"]["ppl"] == pytest.approx(ppl(small), rel=1e-6)
    for stage in stages.values():
        assert stage["protocol"] == "tokens/32"
        assert stage["tokens"] == 4 * (SEQLEN - 1)
        assert stage["low"] < stage["ppl"] < stage["high"]
    assert stages["teacher"]["seconds"] == 0.0 < stages["rtn"]["seconds"]


def test_without_another_text_the_validation_windows_are_the_score(folder, teacher):
    keep = LinearStep("keep", lambda problem, leaf: leaf, {}, objective=weight_error)
    report = lqec.compress(folder / "model", Recipe((keep,)), TOKENS, seqlen=SEQLEN).report
    stage = report["stages"][0]
    assert stage["protocol"] == "calib-val/32"
    assert stage["ppl"] == pytest.approx(lqec.perplexity(teacher, VAL, SEQLEN).ppl, rel=1e-6)


def test_statistics_are_of_the_student_and_of_training_windows_alone(teacher, rounded):
    """The last down projection reads what four compressed blocks and its own gate and up made."""
    block = jax.jit(teacher.fns.block)

    def down_reads(model):
        h = model.fns.embed(model.params, TRAIN)
        *before, last = unstack_blocks(model.params["blocks"])
        for params in before:
            h = block(params, h)[0]
        return block(last, h)[1]["mlp/down"].reshape(-1, 64)  # does not depend on down itself

    w, found = weight(teacher, 4, "mlp/down"), weight(rounded, 4, "mlp/down")
    expected = lqec.quantize(w, SEEING, x=down_reads(rounded))
    assert float(jnp.mean(expected.base.codes == found.base.codes)) > 0.99
    np.testing.assert_allclose(expected.dense(), found.dense(), atol=1e-3)
    other = lqec.quantize(w, SEEING, x=down_reads(teacher))
    assert float(jnp.mean(other.base.codes == found.base.codes)) < 0.9


def test_a_step_sees_what_it_asked_for_and_nothing_else(folder):
    seen = []

    def run(problem, leaf):
        seen.append((problem.w.shape, problem.stats.rms is None))
        return leaf

    step = LinearStep("look", run, {}, objective=weight_error)
    asking = dataclasses.replace(step, needs=frozenset({"rms"}))
    for one, without in ((step, True), (asking, False)):
        seen.clear()
        lqec.compress(folder / "model", Recipe((one,)), TOKENS, seqlen=SEQLEN)
        assert {shape for shape, _ in seen} == {(32, 32), (32, 16), (32, 64), (64, 32)}
        assert {missing for _, missing in seen} == {without}


# ---- phases


def test_a_linear_step_after_a_model_step_adds_to_what_was_trained(teacher, small, rounded):
    for layer in range(5):
        for path in teacher.fns.linears:
            leaf, before = weight(small, layer, path), weight(rounded, layer, path)
            assert isinstance(leaf.base, Affine)
            assert jax.tree.all(jax.tree.map(jnp.array_equal, leaf.base, before.base))
            assert [correction.rank for correction in leaf.corrections] == [2, 3]
    make_dense = jax.jit(CompressedLinear.dense)
    linears = {linear["path"]: linear for linear in small.report["linears"]}
    assert len(linears) == 35
    for path, linear in linears.items():
        assert [step["method"] for step in linear["steps"]] == ["rtn", "svd"]
        assert linear["steps"][1]["after"] < linear["steps"][1]["before"]
        _, layer, name = path.split("/", 2)
        leaf = weight(small, int(layer), name)
        assert linear["bits_per_weight"] == pytest.approx(leaf.bits_per_weight)
        w, dense = np.asarray(weight(teacher, int(layer), name)), np.asarray(make_dense(leaf))
        error = np.square(w - dense).sum() / np.square(w).sum()
        assert linear["relative_error"] == pytest.approx(error, rel=1e-4)


def test_a_model_step_lowers_its_loss_and_reports_its_curve(small):
    (fit,) = small.report["fits"]
    assert fit["method"] == "rilq"
    assert [point["update"] for point in fit["history"]] == [0, 10, 20, 30, 40]
    losses = {point["update"]: point["val_loss"] for point in fit["history"]}
    assert fit["best_update"] > 0
    assert losses[fit["best_update"]] == min(losses.values()) < losses[0]
    assert fit["history"][0]["train_loss"] is None and fit["history"][1]["train_loss"] > 0


def make_model_step(see):
    """Returns a model step that shows its problem to `see` and adds nothing."""

    def run(problem):
        see(problem)
        return Solution(problem.params, (Evaluation(0, None, 1.0),), 0, ("looked",))

    keep = lambda leaf: leaf  # noqa: E731
    return TrainingStep("look", "model", run, {}, Schedule(), keep, lambda leaf: 0)


def test_a_model_step_sees_the_student_the_text_and_the_teacher_s_last_state(folder, teacher):
    seen, mesh = [], make_mesh(1, 1)
    small = lqec.compress(folder / "model", Recipe((make_model_step(seen.append),)), TOKENS,
                          seqlen=SEQLEN, eval=HELD_OUT, mesh=mesh)  # fmt: skip
    (problem,) = seen
    np.testing.assert_array_equal(problem.windows.tokens, np.concatenate([TRAIN, VAL]))
    assert (problem.windows.train, problem.windows.val) == (len(TRAIN), len(VAL))
    assert problem.windows.weights is None and problem.work.mesh is mesh
    expected = jax.jit(teacher.fns.hidden)(teacher.params, np.concatenate([TRAIN, VAL]))[0]
    np.testing.assert_allclose(problem.teacher, expected, rtol=1e-4, atol=1e-4)
    # A recipe may begin with a model step: its student is the dense model.
    assert [stage["name"] for stage in small.report["stages"]] == ["teacher", "look"]
    leaf = weight(small, 1, "attn/q")
    assert isinstance(leaf.base, Dense)
    assert bool(jnp.array_equal(leaf.base.w, weight(teacher, 1, "attn/q")))
    assert small.report["bits_per_weight"] == 32
    assert small.report["fits"][0]["notes"] == ["looked"]


def test_a_model_step_after_one_that_trained_the_norm_has_the_teacher_s(folder, teacher):
    def double(problem):
        norm = jax.tree.map(lambda array: 2 * array, problem.params["norm"])
        return Solution({**problem.params, "norm": norm}, (Evaluation(0, None, 1.0),), 0)

    seen = []
    look = make_model_step(seen.append)
    recipe = Recipe((look, dataclasses.replace(look, name="double", run=double), look))
    lqec.compress(folder / "model", recipe, TOKENS, seqlen=SEQLEN)
    before, after = seen
    assert before.outer is None
    (norm,) = jax.tree.leaves(teacher.params["norm"])
    for params, times in ((before.params, 1), (after.params, 2), (after.outer, 1)):
        np.testing.assert_array_equal(jax.tree.leaves(params["norm"])[0], times * norm)


@pytest.mark.parametrize(("batch", "remat"), [(1, False), (8, False), (9, True)])
def test_blocks_are_recomputed_where_the_largest_batch_would_keep_too_much(
    folder, tmp_path, monkeypatch, batch, remat
):
    config, kept = read_source(open_folder(folder / "model")).config, 4 * 8 * SEQLEN * 5 * 640
    monkeypatch.setattr(decoder, "REMAT_BYTES", kept)
    assert decoder.count_kept(config) == 8 * 32 + 4 * 4 * 8 + 4 * 64 == 640
    recipe = f"{SEEING} | rilq(rank=2, batch=2) | rilq(rank=2, batch={batch})"
    run = Run.begin(tmp_path / "out", {}, resume=False, overwrite=False)
    made = prepare(folder / "model", recipe, TOKENS, seqlen=SEQLEN)
    driver = Driver(made.source, made.recipe, made.text, run)
    assert driver.fns is decoder.model_fns(config, jnp.float32, remat=remat)
    # And so is it planned: of one window of a kept block everything, of a recomputed one its input.
    sizes = measure_model(str(folder / "model"), made.recipe)
    *_, train = estimate_phases(sizes, made.recipe, TextSize(SEQLEN, 10, 2), on_cpu=False)
    width, tokens = (5 * 32 + 640 if remat else 5 * 640), SEQLEN * batch
    assert train.device["activations"] == 2 * tokens * width


# ---- refusals and reports


def make_broken(layer_norm_of_w):
    """Returns a step that makes NaN of the weight with this sum of absolute values."""

    def run(problem, leaf):
        hit = jnp.abs(jnp.sum(jnp.abs(problem.w)) - layer_norm_of_w) < 1e-3
        return CompressedLinear(Dense(jnp.where(hit, jnp.nan, leaf.dense())))

    return LinearStep("broken", run, {"scale": 3}, objective=weight_error)


def test_a_step_that_makes_nan_is_stopped_and_the_weight_named(folder, teacher, tmp_path):
    w = weight(teacher, 1, "mlp/up")
    first = parse_recipe("rtn(bits=4, group_size=32)").steps
    recipe = Recipe((*first, make_broken(float(jnp.abs(w).sum()))))
    with pytest.raises(FloatingPointError, match=r"broken made blocks/1/mlp/up non-finite"):
        lqec.compress(folder / "model", recipe, TOKENS, seqlen=SEQLEN, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refusal_names_the_weight(folder):
    def refuse(problem, leaf):
        if problem.w.shape == (64, 32):
            raise InputError("refuse: this shape is not for me; choose another")
        return leaf

    recipe = Recipe((LinearStep("refuse", refuse, {}, objective=weight_error),))
    with pytest.raises(
        InputError, match=r"not for me; choose another \(at every block's mlp/down\)"
    ):
        lqec.compress(folder / "model", recipe, TOKENS, seqlen=SEQLEN)


def test_the_report_has_every_field_that_is_promised(small):
    report = small.report
    assert report["recipe"] == small.recipe == str(parse_recipe(RECIPE))
    assert report["seed"] == 0
    for stage in report["stages"]:
        assert {"name", "ppl", "nll", "tokens", "protocol", "seconds"} <= set(stage)
    for linear in report["linears"]:
        assert set(linear) == {"path", "d_in", "d_out", "bits_per_weight", "relative_error",
                               "steps"}  # fmt: skip
        for step in linear["steps"]:
            assert set(step) == {"method", "objective", "before", "after", "notes"}
    assert all({"method", "history", "best_update"} <= set(fit) for fit in report["fits"])
    assert all(set(entry) == {"path", "reason"} for entry in report["skipped"])
    stored = sum(weight(small, i, p).stored_bits() for i in range(5) for p in small.fns.linears)
    assert report["bits_per_weight"] == pytest.approx(stored / (5 * 9216))
    assert report["seconds"] == pytest.approx(sum(s["seconds"] for s in report["stages"]))
    assert report["peak_rss_mb"] > 50


def test_a_seed_decides_the_adapters_and_not_the_codes(folder, small):
    other = lqec.compress(
        folder / "model", f"{SEEING} | {RILQ}", TOKENS, seqlen=SEQLEN, eval=HELD_OUT, seed=7
    )
    ours, theirs = weight(small, 0, "attn/q"), weight(other, 0, "attn/q")
    assert bool(jnp.array_equal(ours.base.codes, theirs.base.codes))
    assert not bool(jnp.allclose(ours.corrections[0].a, theirs.corrections[0].a, atol=1e-2))
