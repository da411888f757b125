"""Losses against numpy in float64, and their gradients against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.tree import combine, get_at, is_compressed, partition
from lqec_jax.core.types import ModelProblem, Windows, Work
from lqec_jax.errors import InputError
from lqec_jax.train import vocabulary
from lqec_jax.train.losses import (
    Discrepancy,
    Divergence,
    ModelLoss,
    NextToken,
    lrec,
    mean_square,
    rilq,
)
from lqec_jax.train.vocabulary import find_top
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.train.oracles import (
    BATCH,
    FNS,
    LAYERS,
    LENGTH,
    TOKENS,
    WEIGHTS,
    D,
    draw_student,
    numpy_hidden,
    numpy_nll,
    numpy_norm,
)

TARGETS = ("post_norm", "pre_norm", "logits")


@pytest.fixture(scope="module")
def student() -> dict:
    return draw_student()


@pytest.fixture(scope="module")
def teacher_hidden() -> np.ndarray:
    return np.random.RandomState(1).standard_normal((BATCH, LENGTH, D)).astype(np.float32)


def numpy_terms(params: dict, teacher: np.ndarray, target: str) -> tuple[float, float]:
    pre, post = numpy_hidden(params)
    head = np.asarray(params["head"], np.float64)
    came, wanted = {
        "post_norm": (post, teacher),
        "pre_norm": (pre, teacher),
        "logits": (post @ head, numpy_norm(teacher) @ head),
    }[target]
    return np.mean((came - wanted) ** 2), numpy_nll(post @ head, TOKENS).mean()


@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_its_formula(student, teacher_hidden, target):
    teacher = teacher_hidden.astype(np.float64)
    discrepancy, next_token = numpy_terms(student, teacher, target)

    @jax.jit
    def run(params, teacher, model_weight, token_weight):
        loss = ModelLoss((Discrepancy(model_weight, target), NextToken(token_weight)))
        name = "answers" if target == "post_norm" else "teacher"
        return loss(FNS, params, {"tokens": TOKENS, name: teacher})

    for model_weight, token_weight in ((0.7, 0.2), (1.0, 0.0), (0.0, 1.0)):
        loss, terms = run(student, teacher_hidden, model_weight, token_weight)
        assert float(terms["discrepancy"]) == pytest.approx(discrepancy, rel=1e-5)
        assert float(terms["next_token"]) == pytest.approx(next_token, rel=1e-5)
        wanted = model_weight * discrepancy + token_weight * next_token
        assert float(loss) == pytest.approx(wanted, rel=1e-5)
        assert (loss.shape, loss.dtype) == ((), jnp.float32)
    # No two targets could be mistaken for one another.
    others = [numpy_terms(student, teacher, other)[0] for other in TARGETS if other != target]
    assert min(abs(other / discrepancy - 1) for other in others) > 0.05


def test_half_of_each_term_after_the_norm_is_the_default(student, teacher_hidden):
    loss = jax.jit(lambda params: rilq(FNS, teacher_hidden, params, TOKENS))(student)
    wanted = np.mean(numpy_terms(student, teacher_hidden, "post_norm"))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student):
    """Q = W and b = 0: no discrepancy, and no gradient of it; beside other answers, both."""

    def start(leaf: CompressedLinear) -> CompressedLinear:
        (adapter,) = leaf.corrections
        zero = LowRank(adapter.a, jnp.zeros_like(adapter.b))
        return CompressedLinear(Dense(leaf.dense()), (zero,))

    def change_all(change) -> dict:
        pick = lambda node: change(node) if is_compressed(node) else node  # noqa: E731
        return jax.tree.map(pick, student, is_leaf=is_compressed)

    exact, dense = change_all(start), change_all(CompressedLinear.dense)
    train, frozen = partition(exact)

    def run(train, pre_norm, post_norm):
        weights = {"model_weight": 1.0, "token_weight": 0.0}
        answers = {"post_norm": post_norm, "pre_norm": pre_norm, "logits": pre_norm}
        params = combine(train, frozen)
        each = [rilq(FNS, answers[t], params, TOKENS, target=t, **weights) for t in TARGETS]
        return jnp.stack(each), jnp.stack(each)

    def largest(gradients) -> np.ndarray:
        """Returns the largest entry of each target's gradient."""
        leaves = jax.tree.leaves(gradients)
        return np.max([np.abs(leaf).reshape(len(TARGETS), -1).max(1) for leaf in leaves], axis=0)

    both = jax.jit(jax.jacrev(run, has_aux=True))
    pre_norm, post_norm = jax.jit(FNS.hidden)(dense, TOKENS)
    gradients, values = both(train, pre_norm, post_norm)
    assert (values < 1e-12).all() and (largest(gradients) < 1e-7).all()
    gradients, values = both(train, pre_norm[::-1], post_norm[::-1])
    assert (values > 0.1).all() and (largest(gradients) > 1e-3).all()


def test_mean_square_is_taken_in_float32_or_wider():
    # The squares are beyond float16, and the difference is beyond bfloat16's eight bits.
    half = jnp.full((3,), 300.0, jnp.float16)
    assert mean_square(half, -half) == 360_000.0
    assert mean_square(jnp.float32([1.001, 1.0]), jnp.bfloat16([1.0, 1.0])) == pytest.approx(
        5e-7, rel=1e-3
    )
    assert mean_square(half, half).dtype == jnp.float32
    with jax.enable_x64(True):
        difference = mean_square(jnp.float64(1 + 1e-9), jnp.float64(1))
        assert difference.dtype == jnp.float64
        assert float(difference) == pytest.approx(1e-18, rel=1e-6)


# What a loss asks of a batch


def pose(**changes) -> ModelProblem:
    """Returns a problem of two windows, of which the first is for training."""
    teacher = np.random.RandomState(1).standard_normal((BATCH, LENGTH, D)).astype(np.float32)
    windows = Windows(TOKENS, 1, np.random.RandomState(2).random(TOKENS[:, 1:].shape))
    facts = {"windows": windows, "work": Work(jax.random.key(0)), "teacher": teacher}
    return ModelProblem(FNS, draw_student(), **(facts | changes))


def test_a_batch_brings_what_the_terms_compare_with():
    problem = pose()
    loss = ModelLoss((Discrepancy(), Divergence(), NextToken()))
    batch = loss.prepare("a_method", problem)(np.array([1]))
    assert batch.keys() == {"tokens", "teacher", "weights"}
    np.testing.assert_array_equal(batch["tokens"], TOKENS[1:])
    np.testing.assert_array_equal(batch["teacher"], problem.teacher[1:])
    np.testing.assert_array_equal(batch["weights"], problem.windows.weights[1:])
    alone = ModelLoss((NextToken(),)).prepare("a_method", pose(teacher=None))(np.array([0]))
    assert alone.keys() == {"tokens", "weights"}


def test_a_teacher_is_read_by_its_own_norm_where_the_student_has_another():
    fns = dataclasses.replace(FNS, norm=lambda params, h: params["gain"] * h)
    problem = dataclasses.replace(pose(outer={"gain": jnp.float32(3)}), fns=fns)
    batch = ModelLoss((Discrepancy(),)).prepare("a_method", problem)(np.array([0, 1]))
    np.testing.assert_array_equal(batch["answers"], 3 * problem.teacher)
    for loss, said in (
        (Discrepancy(target="logits"), "a_method: target='logits' reads both models by one head"),
        (Divergence(), "a_method: logits='recomputed' reads both models by one head"),
    ):
        with pytest.raises(InputError, match=said):
            ModelLoss((loss,)).prepare("a_method", problem)


def test_next_tokens_count_as_the_text_says():
    student, problem = draw_student(), pose()
    post = numpy_hidden(student)[1] @ np.asarray(student["head"], np.float64)
    nll = numpy_nll(post, TOKENS)  # [b, t - 1]

    def run(term, **batch):
        loss = jax.jit(ModelLoss((term,)), static_argnums=0)
        return loss(FNS, student, {"tokens": TOKENS} | batch)[0]

    weighed = (nll * problem.windows.weights).sum(axis=1).mean()
    came = run(NextToken(2.0), weights=problem.windows.weights)
    assert float(came) == pytest.approx(2.0 * weighed, rel=1e-5)
    assert float(run(NextToken(None, 0.5))) == pytest.approx(0.5 * LENGTH * nll.mean(), rel=1e-5)
    each = run(NextToken(None, 0.5, each=True))
    assert float(each) == pytest.approx(0.5 * nll.mean(), rel=1e-5)


def test_losses_are_equal_by_value_and_hold_no_array():
    def make() -> ModelLoss:
        return ModelLoss((Discrepancy(0.3, "logits"), Divergence(top_k=3), NextToken(2.0)))

    assert make() == make() and hash(make()) == hash(make())
    assert make() != ModelLoss((Discrepancy(0.3), Divergence(top_k=3), NextToken(2.0)))
    assert make().scratch_bytes(100) == 0
    assert ModelLoss((Divergence(logits="streamed"),)).scratch_bytes(100) == 200


# Gradients


def factor_of(tree: dict, name: str) -> jax.Array:
    return getattr(get_at(tree["blocks"][0], "mix/kernel").corrections[0], name)


def entries(train: dict) -> list[tuple[str, tuple]]:
    """Returns three places in each factor of each layer: (factor, index)."""
    random, places = np.random.RandomState(5), []
    for name in ("a", "b"):
        _, *shape = factor_of(train, name).shape
        for layer in range(LAYERS):
            flat = random.choice(np.prod(shape), 3, replace=False)
            places += [(name, (layer, *np.unravel_index(place, shape))) for place in flat]
    return places


def moved(train: dict, name: str, index: tuple, by: float) -> dict:
    array = factor_of(train, name)
    other = np.array(array)
    other[index] += by
    return jax.tree.map(lambda leaf: other if leaf is array else leaf, train)


def test_gradients_are_finite_differences(monkeypatch, student, teacher_hidden):
    """Of RILQ's targets and LREC's teachers at once, in one program; the head is in chunks."""
    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", 24)
    weights = {"model_weight": 0.7, "token_weight": 0.4}
    with jax.enable_x64(True):
        widen = lambda leaf: (  # noqa: E731
            leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        )
        train, frozen = partition(jax.tree.map(widen, student))
        teacher = jnp.asarray(teacher_hidden, jnp.float64)

        def run(train):
            params = combine(train, frozen)
            each = [rilq(FNS, teacher, params, TOKENS, target=t, **weights) for t in TARGETS]
            top = find_top(FNS, params, teacher, 5)
            each += [lrec(FNS, t, params, TOKENS, **WEIGHTS) for t in (teacher, top)]
            return jnp.stack(each), jnp.stack(each)

        both = jax.jit(jax.jacrev(run, has_aux=True))
        gradients, values = both(train)
        assert values.dtype == jnp.float64 and values.shape == (len(TARGETS) + 2,)
        places = entries(train)
        assert len(places) == 3 * 2 * LAYERS
        for name, index in places:
            ahead, behind = (both(moved(train, name, index, by))[1] for by in (1e-4, -1e-4))
            wanted = np.asarray(ahead - behind) / 2e-4  # [targets]
            assert np.abs(wanted).min() > 1e-7, (name, index)
            came = factor_of(gradients, name)[:, *index]
            np.testing.assert_allclose(came, wanted, rtol=1e-5, err_msg=f"{name}{index}")
