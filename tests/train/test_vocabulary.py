"""What a head says, in chunks of the vocabulary: next tokens and divergences, against numpy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.tree import combine, partition
from lqec_jax.train import vocabulary
from lqec_jax.train.losses import Divergence, ModelLoss, NextToken, lrec
from lqec_jax.train.vocabulary import (
    LogProbs,
    find_log_probs,
    find_top,
    kl_terms,
    next_token_nll,
)
from tests.train.oracles import (
    BATCH,
    FNS,
    LENGTH,
    TOKENS,
    WEIGHTS,
    D,
    bound_logits_rounding,
    draw_student,
    head_only,
    numpy_hidden,
    numpy_nll,
)
from tests.train.tiny import VOCAB

SUMMED = ModelLoss((Divergence(WEIGHTS["kl_weight"], "sum"), NextToken(WEIGHTS["token_weight"])))


@pytest.fixture(scope="module")
def student() -> dict:
    return draw_student()


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
        monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", chunk)
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
        monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", chunk)
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
    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", 24)
    params, far, near = head_only("plain")[1], 1e3 * draw_hidden(3), draw_hidden(4)
    for student, teacher in ((far, near), (near, far)):
        wanted = numpy_kl(teacher, student, params["head"])
        for form in (teacher, likeliest(params, VOCAB, teacher)):
            kl, _, gradient = find_kl(params, student, form)
            np.testing.assert_allclose(kl, wanted, rtol=1e-4, atol=1e-3)
            assert bool(jnp.isfinite(gradient).all())


def test_a_student_that_predicts_as_its_teacher_has_its_next_token_loss_alone(student):
    """KL is what rounding leaves of zero, forward and in its gradient.

    Teacher and student are two walks through one model, which a compiler may fuse in two ways, so
    their logits differ by rounding, in which KL is quadratic (Hoeffding: by a range r, r² / 8 at
    most); the rest is the rounding of two sums over the vocabulary and of their logarithms.
    """
    train, frozen = partition(student)

    @partial(jax.jit, static_argnums=1)
    @partial(jax.grad, has_aux=True)
    def run(train, order):
        params = combine(train, frozen)
        teacher = FNS.hidden(params, TOKENS)[1][::order]
        loss, terms = SUMMED(FNS, params, {"tokens": TOKENS, "predictions": teacher})
        return terms["kl"], (loss, terms)

    def largest(gradients) -> float:
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))

    unit = float(jnp.finfo(jnp.float32).eps) / 2
    sums = 2 * (VOCAB + 16) * unit  # and 16 for exponents, logarithms and the last differences
    gradients, (loss, terms) = run(train, 1)
    assert abs(terms["kl"]) < LENGTH * (sums + (4 * bound_logits_rounding(student)) ** 2 / 8)
    parts = 3.0 * float(terms["next_token"]) + 0.5 * float(terms["kl"])
    assert float(loss) == pytest.approx(parts, rel=4 * unit)
    others, (_, terms) = run(train, -1)
    assert terms["kl"] > 1.0 and largest(others) > 1e-2
    assert largest(gradients) < 1e-3 * largest(others)


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
    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", 24)
    assert wide not in trace() and narrow in trace()


# The next-token loss in chunks of the vocabulary


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

    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", chunk)
    chunked, chunked_gradients = nll_and_gradients(fns, params, post_norm)
    np.testing.assert_allclose(chunked, wanted, rtol=1e-5)
    for came, direct in zip(chunked_gradients, gradients, strict=True):
        size = float(jnp.abs(direct).max())
        assert size > 0.1
        np.testing.assert_allclose(came, direct, rtol=1e-5, atol=1e-5 * size)


def test_logits_too_large_for_exp_are_no_trouble_in_chunks(monkeypatch):
    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", 24)
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
    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", 24)
    assert wide not in trace() and narrow in trace()


def test_a_head_of_unknown_width_is_applied_whole(monkeypatch):
    monkeypatch.setattr(vocabulary, "VOCAB_CHUNK", 1)
    params = head_only("plain")[1]
    unknown = dataclasses.replace(FNS, vocab_size=None)
    post_norm = np.random.RandomState(3).standard_normal((BATCH, LENGTH, D)).astype(np.float32)
    nll = next_token_nll(unknown, params, post_norm, TOKENS)
    np.testing.assert_allclose(nll, numpy_nll(post_norm @ params["head"], TOKENS), rtol=1e-5)
