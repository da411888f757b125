"""RILQ: adapters trained together on the model's answer, the packed base untouched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lqec_jax.train.adapters import DEFAULT_RANK

from lqec_jax.core.closed_form import truncate
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.tree import get_at
from lqec_jax.core.types import ModelProblem
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.trainings import rilq as module
from lqec_jax.trainings.rilq import make_objective, rilq
from lqec_kernels.formats import Affine, CompressedLinear, LowRank
from tests.compensation.toy import (
    FNS,
    LAYERS,
    TEACHER,
    TOKENS,
    D,
    compress,
)

TRAIN, VAL = 16, 8
RANK = 4


def bare(w) -> CompressedLinear:
    return CompressedLinear(quantize(w, GroupGrid(2, 8)))


def with_svd(w) -> CompressedLinear:
    leaf = bare(w)
    return CompressedLinear(leaf.base, (LowRank(*truncate(w - leaf.dense(), RANK)),))


@pytest.fixture(scope="module")
def student() -> dict:
    return compress(bare)


@pytest.fixture(scope="module")
def teacher_states() -> np.ndarray:
    return np.asarray(jax.jit(FNS.hidden)(TEACHER, TOKENS)[0])


@pytest.fixture(scope="module")
def problem(student, teacher_states) -> ModelProblem:
    return ModelProblem(
        FNS, student, teacher_states, TOKENS[:TRAIN], TOKENS[TRAIN:], jax.random.key(7)
    )


TRAINING = {"updates": 60, "batch": 8, "eval_every": 20, "lr": 1e-2, "token_weight": 0.0}


@pytest.fixture(scope="module")
def trained(problem):
    return rilq(rank=RANK, **TRAINING).run(problem)


def kernels(params) -> list[CompressedLinear]:
    return [
        get_at(segment, f"{path}/kernel") for segment in params["blocks"] for path in FNS.linears
    ]


def loss_of(problem, params, **arguments) -> float:
    """Returns the loss over the validation windows, said once more from its formula."""
    settings = rilq(**arguments).arguments
    pre, post = jax.jit(FNS.hidden)(params, problem.val)
    teacher = problem.teacher[TRAIN:]
    if settings["target"] == "post_norm":
        came, wanted = post, FNS.norm(None, teacher)
    elif settings["target"] == "pre_norm":
        came, wanted = pre, teacher
    else:
        came, wanted = (h @ TEACHER["embed"].T for h in (post, FNS.norm(None, teacher)))
    logits = np.asarray(post @ TEACHER["embed"].T, np.float64)[:, :-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, problem.val[:, 1:, None], axis=-1).mean()
    discrepancy = np.mean(np.square(np.asarray(came, np.float64) - np.asarray(wanted, np.float64)))
    return settings["model_weight"] * discrepancy + settings["token_weight"] * nll


@pytest.mark.parametrize("target", ["post_norm", "pre_norm", "logits"])
def test_the_loss_is_its_formula(problem, target):
    arguments = {"target": target, "model_weight": 0.7, "token_weight": 0.2}
    objective = make_objective(problem, rilq(**arguments).arguments)
    assert (objective.train, objective.val, objective.select) == (TRAIN, VAL, "adapters")
    batch = objective.batch(np.arange(TRAIN, TRAIN + VAL))
    np.testing.assert_array_equal(batch["tokens"], problem.val)
    loss, terms = jax.jit(objective.loss)(problem.params, batch)
    wanted = loss_of(problem, problem.params, **arguments)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    by_terms = 0.7 * terms["discrepancy"] + 0.2 * terms["next_token"]
    assert float(loss) == pytest.approx(float(by_terms), rel=1e-6)


def test_a_teacher_is_read_by_its_own_norm(problem):
    fns = dataclasses.replace(FNS, norm=lambda params, h: params["gain"] * FNS.norm(None, h))
    student = {**problem.params, "gain": jnp.float32(2)}
    outer = {"embed": TEACHER["embed"], "gain": jnp.float32(1)}
    batch = {"tokens": problem.val, "teacher": problem.teacher[TRAIN:]}

    def find_loss(**changes) -> float:
        changed = dataclasses.replace(problem, **changes)
        return float(make_objective(changed, rilq().arguments).loss(changed.params, batch)[0])

    own = find_loss(fns=fns, params=student, outer=outer)
    assert own == pytest.approx(find_loss(), rel=1e-6)
    assert abs(find_loss(fns=fns, params=student) / own - 1) > 0.05
    with pytest.raises(InputError, match="rilq: target='logits' reads both models by one head"):
        changed = dataclasses.replace(problem, outer=outer)
        make_objective(changed, rilq(target="logits").arguments)


def test_training_begins_at_the_bare_model(problem, trained):
    start = trained.history[0]
    assert (start.update, start.train_loss) == (0, None)
    bare_loss = loss_of(problem, problem.params, token_weight=0.0)
    assert start.val_loss == pytest.approx(bare_loss, rel=1e-5)


def test_the_answer_comes_four_times_nearer(problem, trained):
    before, after = (
        loss_of(problem, params, token_weight=0.0) for params in (problem.params, trained.params)
    )
    assert after < before / 4
    assert [point.update for point in trained.history] == [0, 20, 40, 60]
    best = min(trained.history, key=lambda point: point.val_loss)
    assert trained.best_update == best.update
    # Adapters are stored in float16, which is all that separates the two.
    assert after == pytest.approx(best.val_loss, rel=1e-2)


def test_the_base_is_bit_identical(student, trained):
    for before, after in zip(kernels(student), kernels(trained.params), strict=True):
        assert isinstance(after.base, Affine)
        for b, a in zip(jax.tree.leaves(before.base), jax.tree.leaves(after.base), strict=True):
            assert b.dtype == a.dtype
            assert np.asarray(b).tobytes() == np.asarray(a).tobytes()
    np.testing.assert_array_equal(trained.params["embed"], student["embed"])


def test_adapters_are_stored_even_in_half_precision(trained):
    for leaf in kernels(trained.params):
        (correction,) = leaf.corrections
        assert correction.a.shape == (LAYERS, leaf.d_in, RANK)
        assert correction.a.dtype == correction.b.dtype == jnp.float16
        norms = [
            np.linalg.norm(np.asarray(factor, np.float32), axis=axis)
            for factor, axis in ((correction.a, -2), (correction.b, -1))
        ]
        assert norms[0].min() > 0
        np.testing.assert_allclose(*norms, rtol=1e-2)


def test_the_preview_has_the_shapes_of_the_result(student, trained):
    step = rilq(rank=RANK, **TRAINING)
    for before, after in zip(kernels(student), kernels(trained.params), strict=True):
        seen = jax.eval_shape(step.preview, before)
        assert jax.tree.structure(seen) == jax.tree.structure(after)
        for s, a in zip(jax.tree.leaves(seen), jax.tree.leaves(after), strict=True):
            assert (s.shape, s.dtype) == (a.shape, a.dtype)


def test_same_key_same_bytes(problem, trained):
    again = rilq(rank=RANK, **TRAINING).run(problem)
    assert again.history == trained.history
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(trained.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_training_that_only_harms_returns_the_bare_model(problem, student):
    # Validation windows on which the bare model is its own teacher: nothing can be nearer.
    own_answer = np.asarray(jax.jit(FNS.hidden)(student, problem.val)[0])
    teacher = np.concatenate([problem.teacher[:TRAIN], own_answer])
    other = dataclasses.replace(problem, teacher=teacher, key=jax.random.key(8))
    solution = rilq(rank=RANK, **TRAINING).run(other)
    assert solution.best_update == 0 and "no update lowered" in solution.notes[0]
    assert solution.history[0].val_loss < 1e-12 < 1e-3 < solution.history[-1].val_loss
    for before, after in zip(kernels(student), kernels(solution.params), strict=True):
        assert not np.asarray(after.corrections[0].b).any()
        np.testing.assert_array_equal(after.dense(), before.dense())
    draws = [np.asarray(leaf.corrections[0].a, np.float64) for leaf in kernels(solution.params)]
    assert np.std(np.concatenate([a.ravel() for a in draws])) == pytest.approx(1 / RANK, rel=0.1)
    assert np.abs(draws[0] - draws[1][:, :D]).max() > 0.1  # each weight has its own
    assert np.abs(draws[0][0] - draws[0][1]).max() > 0.1  # and each layer


def test_training_that_only_harms_keeps_given_adapters_to_the_bit(problem):
    # Factors that storing would change: unbalanced, and float32.
    def with_lopsided(w):
        leaf = with_svd(w)
        (adapter,) = leaf.corrections
        return CompressedLinear(leaf.base, (LowRank(3 * adapter.a, adapter.b / 3),))

    given = compress(with_lopsided)
    assert all(np.abs(leaf.corrections[0].a.astype(jnp.float16) - leaf.corrections[0].a).max() > 0
               for leaf in kernels(given))  # fmt: skip
    own_answer = np.asarray(jax.jit(FNS.hidden)(given, problem.val)[0])
    teacher = np.concatenate([problem.teacher[:TRAIN], own_answer])
    other = dataclasses.replace(problem, params=given, teacher=teacher)
    solution = rilq(**TRAINING).run(other)
    assert solution.best_update == 0
    for a, b in zip(jax.tree.leaves(solution.params), jax.tree.leaves(given), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_an_adapter_already_there_is_the_one_trained(problem):
    warm = dataclasses.replace(problem, params=compress(with_svd))
    solution = rilq(**TRAINING).run(warm)
    before, after = (
        loss_of(problem, params, token_weight=0.0) for params in (warm.params, solution.params)
    )
    assert solution.history[0].val_loss == pytest.approx(before, rel=1e-5)
    assert after < before / 4
    for old, new in zip(kernels(warm.params), kernels(solution.params), strict=True):
        (old,), (new,) = old.corrections, new.corrections
        assert new.rank == RANK
        old, new = np.asarray(old.dense()).ravel(), np.asarray(new.dense()).ravel()
        assert 0.5 < old @ new / np.linalg.norm(old) / np.linalg.norm(new) < 0.999


def test_another_rank_than_the_adapter_there_is_refused(problem):
    warm = dataclasses.replace(problem, params=compress(with_svd))
    with pytest.raises(InputError, match=r"^rilq: rank=3 .* adapters of rank 4; leave rank out"):
        rilq(rank=3, **TRAINING).run(warm)


def test_a_new_adapter_has_the_default_rank_where_it_fits(problem):
    with pytest.raises(InputError, match=rf"rilq: rank={DEFAULT_RANK} is larger than min"):
        rilq().run(problem)


def test_the_papers_settings():
    arguments = rilq(preset="paper").arguments
    paper = {"alpha": 16.0, "lr": 1e-4, "updates": 1250, "batch": 8, "eval_every": 25,
             "patience": 5, "weight_decay": 0.0, "decay": "constant", "target": "post_norm",
             "model_weight": 0.5, "token_weight": 0.5}  # fmt: skip
    assert {name: arguments[name] for name in paper} == paper
    assert DEFAULT_RANK == 64


@pytest.mark.parametrize("preset", module.PRESETS)
def test_an_argument_wins_over_the_preset(preset):
    plain = rilq(preset=preset).arguments
    assert {name: plain[name] for name in module.PRESETS[preset]} == module.PRESETS[preset]
    changed = rilq(preset=preset, lr=0.5, patience=0).arguments
    assert changed == plain | {"lr": 0.5, "patience": 0}
    assert rilq().arguments == rilq(preset="ours").arguments


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"batch": 8, "accumulate": 3}, "batch=8 does not divide into accumulate=3"),
        ({"target": "hidden"}, "target='hidden'; one of 'post_norm', 'pre_norm', 'logits'"),
        ({"decay": "linear"}, "decay='linear'"),
        ({"scope": "layer"}, "scope='layer'; one of 'linear', 'block', 'model'"),
        ({"scope": "block", "token_weight": 0.5}, "token_weight belong to scope='model'"),
        ({"scope": "linear", "target": "logits"}, "target and token_weight belong to"),
        ({"preset": "theirs"}, "preset='theirs'; one of 'ours', 'paper'"),
        ({"lr": -1.0}, "lr=-1.0; a number >= 0"),
        ({"updates": 0}, "updates=0; an integer >= 1"),
        ({"patience": -1}, "patience=-1"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^rilq: ") as caught:
        rilq(**arguments)
    assert said in str(caught.value)
