"""Losses against numpy in float64, and their gradients against finite differences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.tree import combine, get_at, is_compressed, partition
from lqec_jax.models.decoder import model_fns
from lqec_jax.train import losses
from lqec_jax.train.losses import (
    LogProbs,
    find_log_probs,
    find_top,
    kl_terms,
    lrec,
    lrec_terms,
    mean_square,
    next_token_nll,
    rilq,
    rilq_terms,
)
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.train.tiny import VOCAB, draw_linear, draw_plain, make_config, plain_fns

D, LAYERS, BATCH, LENGTH = 32, 2, 2, 7
TARGETS = ("post_norm", "pre_norm", "logits")
FNS = plain_fns()
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (BATCH, LENGTH))


@pytest.fixture(scope="module")
def student() -> dict:
    kernel = draw_linear(np.random.default_rng(2), 2, LAYERS, D, D)
    return {**draw_plain((), D), "blocks": ({"mix": {"kernel": kernel}},)}


@pytest.fixture(scope="module")
def teacher_hidden() -> np.ndarray:
    return np.random.RandomState(1).standard_normal((BATCH, LENGTH, D)).astype(np.float32)


# What the model answers, said once more in float64.


def numpy_norm(h: np.ndarray) -> np.ndarray:
    return h / np.sqrt(1 + np.mean(h**2, axis=-1, keepdims=True))


def numpy_hidden(params: dict) -> tuple[np.ndarray, np.ndarray]:
    h = np.asarray(params["embed"], np.float64)[TOKENS]
    for segment in params["blocks"]:
        for w in np.asarray(segment["mix"]["kernel"].dense(), np.float64):
            h = h + np.tanh(h @ w)
    return h, numpy_norm(h)


def numpy_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)[:, :-1]
    largest = logits.max(-1, keepdims=True)
    total = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    return total - np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]


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
        weights = {"model_weight": model_weight, "token_weight": token_weight}
        return rilq_terms(FNS, teacher, params, TOKENS, target=target, **weights)

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


# The next-token loss in chunks of the vocabulary


def head_only(kind: str):
    """Returns (functions, parameters) with one of the three kinds of head."""
    kernel = np.random.RandomState(2).standard_normal((D, VOCAB)).astype(np.float32) / D**0.5
    if kind == "plain":
        return FNS, {"head": kernel}
    fns = model_fns(make_config(layers=1, d=D, tied_head=kind == "tied"))
    if kind == "tied":
        return fns, {"embed": {"embedding": kernel.T}}
    return fns, {"head": {"kernel": kernel}}


def nll_and_gradients(fns, params, post_norm):
    """Returns the loss of each token, and the gradient of a sum that weighs each its own way."""
    weights = 1.0 + np.arange(BATCH * (LENGTH - 1)).reshape(BATCH, LENGTH - 1)

    def run(params, post_norm):
        nll = next_token_nll(fns, params, post_norm, TOKENS)
        return jnp.sum(nll * weights), nll

    (_, nll), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, post_norm)
    return nll, jax.tree.leaves(gradients)


@pytest.mark.parametrize(("kind", "chunk"), [("plain", 63), ("tied", 24), ("untied", 7)])
def test_chunks_of_the_vocabulary_are_the_whole(monkeypatch, kind, chunk):
    assert VOCAB % chunk
    fns, params = head_only(kind)
    post_norm = np.random.RandomState(3).standard_normal((BATCH, LENGTH, D)).astype(np.float32)
    nll, gradients = nll_and_gradients(fns, params, post_norm)
    wanted = numpy_nll(fns.head(params, post_norm), TOKENS)
    assert nll.shape == (BATCH, LENGTH - 1)
    np.testing.assert_allclose(nll, wanted, rtol=1e-5)

    monkeypatch.setattr(losses, "VOCAB_CHUNK", chunk)
    chunked, chunked_gradients = nll_and_gradients(fns, params, post_norm)
    np.testing.assert_allclose(chunked, wanted, rtol=1e-5)
    for came, direct in zip(chunked_gradients, gradients, strict=True):
        size = float(jnp.abs(direct).max())
        assert size > 0.1
        np.testing.assert_allclose(came, direct, rtol=1e-5, atol=1e-5 * size)


def test_logits_too_large_for_exp_are_no_trouble_in_chunks(monkeypatch):
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 24)
    params = head_only("plain")[1]
    post_norm = 1e4 * np.random.RandomState(4).standard_normal((BATCH, LENGTH, D))
    post_norm = post_norm.astype(np.float32)
    nll, gradients = nll_and_gradients(FNS, params, post_norm)
    wanted = numpy_nll(post_norm.astype(np.float64) @ params["head"], TOKENS)
    assert wanted.max() > 1e4
    np.testing.assert_allclose(nll, wanted, rtol=1e-5, atol=0.05)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in gradients)


def test_no_array_is_as_wide_as_the_vocabulary_in_chunks(monkeypatch):
    params = head_only("plain")[1]
    post_norm = jax.ShapeDtypeStruct((BATCH, LENGTH, D), jnp.float32)

    def trace() -> str:
        run = lambda x: jnp.sum(next_token_nll(FNS, params, x, TOKENS))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(run))(post_norm))

    wide, narrow = (f"f32[{BATCH},{LENGTH - 1},{width}]" for width in (VOCAB, 24))
    assert wide in trace()
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 24)
    assert wide not in trace() and narrow in trace()


# The divergence from a teacher's predictions


def numpy_kl(teacher: np.ndarray, student: np.ndarray, head: np.ndarray) -> np.ndarray:
    """KL(teacher || student) of every token, from hidden states, in float64."""

    def log_probs(hidden):
        logits = np.asarray(hidden, np.float64) @ head
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_probs(teacher), log_probs(student)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def draw_hidden(seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((BATCH, LENGTH, D)).astype(np.float32)


def likeliest(params, k: int, teacher):
    """Compiles anew, so that a test's chunks are its own."""
    return jax.jit(lambda teacher: find_top(FNS, params, teacher, k))(teacher)


def find_kl(params, post_norm, teacher, tokens=TOKENS):
    """Returns the KL and loss of every token, compiled, and the gradient of their sums."""

    def run(post_norm):
        kl, nll = kl_terms(FNS, teacher, params, post_norm, tokens)
        return jnp.sum(kl), (kl, nll)

    (_, terms), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(post_norm)
    return *terms, gradient


@pytest.mark.parametrize("chunk", [None, 24])
def test_the_divergence_is_its_formula_however_the_teacher_comes(monkeypatch, chunk):
    if chunk is not None:
        monkeypatch.setattr(losses, "VOCAB_CHUNK", chunk)
    params, student, teacher = head_only("plain")[1], draw_hidden(3), draw_hidden(4)
    wanted = numpy_kl(teacher, student, params["head"])
    assert wanted.min() > 0.1
    every = likeliest(params, VOCAB, teacher)
    kl, nll, gradient = find_kl(params, student, teacher)
    np.testing.assert_allclose(kl, wanted, rtol=1e-4)
    np.testing.assert_allclose(nll, numpy_nll(student @ params["head"], TOKENS), rtol=1e-5)
    for other in (find_log_probs(FNS, params, teacher), every):
        came = find_kl(params, student, other)
        for a, b in zip(came, (kl, nll, gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # As streamed: float16, and a constant of every token that changes no probability.
    half = (find_log_probs(FNS, params, teacher).log_probs + 0.25).astype(jnp.float16)
    np.testing.assert_allclose(find_kl(params, student, LogProbs(half))[0], kl, rtol=0.02)


@pytest.mark.parametrize("chunk", [None, 24])
def test_a_few_likeliest_tokens_bound_the_divergence_from_below(monkeypatch, chunk):
    if chunk is not None:
        monkeypatch.setattr(losses, "VOCAB_CHUNK", chunk)
    params, student, teacher = head_only("plain")[1], draw_hidden(3), draw_hidden(4)
    whole = numpy_kl(teacher, student, params["head"])
    probs = np.exp(np.asarray(find_log_probs(FNS, params, teacher).log_probs, np.float64))
    bounds = [np.zeros_like(whole)]
    for k in (1, 8, 60):
        top = likeliest(params, k, teacher)
        ids = np.argsort(-probs, axis=-1)[..., :k]
        np.testing.assert_array_equal(top.ids, ids)
        np.testing.assert_allclose(
            np.exp(top.rest), 1 - np.take_along_axis(probs, ids, -1).sum(-1), atol=1e-6
        )
        kl, _, gradient = find_kl(params, student, top)
        assert (kl > bounds[-1]).all() and (kl < whole).all()
        assert bool(jnp.isfinite(gradient).all())
        bounds.append(kl)
    assert bounds[1].mean() < 0.5 * whole.mean() < 0.9 * whole.mean() < bounds[-1].mean()


def test_a_student_far_from_its_teacher_has_a_finite_divergence_and_gradient(monkeypatch):
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 24)
    params, far, near = head_only("plain")[1], 1e3 * draw_hidden(3), draw_hidden(4)
    for student, teacher in ((far, near), (near, far)):
        wanted = numpy_kl(teacher, student, params["head"])
        for form in (teacher, likeliest(params, VOCAB, teacher)):
            kl, _, gradient = find_kl(params, student, form)
            np.testing.assert_allclose(kl, wanted, rtol=1e-4, atol=1e-3)
            assert bool(jnp.isfinite(gradient).all())


WEIGHTS = {"kl_weight": 0.5, "token_weight": 3.0}


def test_a_student_that_predicts_as_its_teacher_has_its_next_token_loss_alone(student):
    """KL is zero to the bit, forward; its gradient is what rounding leaves of zero."""
    train, frozen = partition(student)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.grad, has_aux=True)
    def run(train, order):
        params = combine(train, frozen)
        teacher = FNS.hidden(params, TOKENS)[1][::order]
        loss, terms = lrec_terms(FNS, teacher, params, TOKENS, reduction="sum", **WEIGHTS)
        return terms["kl"], (loss, terms)

    def largest(gradients) -> float:
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))

    gradients, (loss, terms) = run(train, 1)
    assert terms["kl"] == 0.0
    assert float(loss) == pytest.approx(3.0 * float(terms["next_token"]), rel=1e-7)
    assert largest(gradients) < 1e-5
    gradients, (_, terms) = run(train, -1)
    assert terms["kl"] > 1.0 and largest(gradients) > 1e-2


def test_the_reductions_are_those_of_the_authors_and_mean_is_sum_over_the_tokens(student):
    """KL is a sum over tokens and CE a mean; a window twice as long doubles KL alone.

    The tokens are said twice one after the other, for a model that looks at one at a time: what
    differs is the one next token at the seam.
    """
    teacher = draw_hidden(4)
    post_norm = numpy_hidden(student)[1]
    head = np.asarray(student["head"], np.float64)
    kl, nll = numpy_kl(teacher, post_norm, head), numpy_nll(post_norm @ head, TOKENS)

    @jax.jit
    def run(tokens, teacher):
        train, frozen = partition(jax.tree.map(jnp.asarray, student))
        train = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), train)

        def both(train):
            each = [
                lrec(FNS, teacher, combine(train, frozen), tokens, reduction=form, **WEIGHTS)
                for form in ("sum", "mean")
            ]
            return jnp.stack(each), jnp.stack(each)

        gradients, values = jax.jacrev(both, has_aux=True)(train)
        return values, jax.tree.leaves(gradients)

    (summed, mean), gradients = run(TOKENS, teacher)
    assert float(summed) == pytest.approx(0.5 * kl.sum() / BATCH + 3.0 * nll.mean(), rel=1e-5)
    assert float(mean) == pytest.approx(float(summed) / LENGTH, rel=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(LENGTH * gradient[1], gradient[0], rtol=1e-4, atol=1e-6)
    twice = np.concatenate([TOKENS, TOKENS], axis=1)
    (summed_twice, _), _ = run(twice, np.concatenate([teacher, teacher], axis=1))
    seam = numpy_nll((post_norm @ head)[:, [-1, -1]], TOKENS[:, [-1, 0]])[:, 0]
    nll_twice = (2 * nll.sum(1) + seam).mean() / (2 * LENGTH - 1)
    wanted = 2 * 0.5 * kl.sum() / BATCH + 3.0 * nll_twice
    assert float(summed_twice) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("form", ["hidden", "top"])
def test_no_divergence_holds_an_array_as_wide_as_the_vocabulary_in_chunks(monkeypatch, form):
    params = head_only("plain")[1]
    post_norm = jax.ShapeDtypeStruct((BATCH, LENGTH, D), jnp.float32)

    def trace() -> str:
        def run(student, teacher):
            if form == "top":
                teacher = find_top(FNS, params, teacher, 5)
            return jnp.sum(kl_terms(FNS, teacher, params, student, TOKENS)[0])

        return str(jax.make_jaxpr(jax.grad(run))(post_norm, post_norm))

    wide, narrow = (f"f32[{BATCH},{LENGTH},{width}]" for width in (VOCAB, 24))
    assert wide in trace()
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 24)
    assert wide not in trace() and narrow in trace()


def test_a_head_of_unknown_width_is_applied_whole(monkeypatch):
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 1)
    params = head_only("plain")[1]
    unknown = dataclasses.replace(FNS, vocab_size=None)
    post_norm = np.random.RandomState(3).standard_normal((BATCH, LENGTH, D)).astype(np.float32)
    nll = next_token_nll(unknown, params, post_norm, TOKENS)
    np.testing.assert_allclose(nll, numpy_nll(post_norm @ params["head"], TOKENS), rtol=1e-5)


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
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 24)
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
