"""Losses against numpy in float64, and their gradients against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.tree import combine, get_at, is_compressed, partition
from lqec_jax.models.decoder import init_params, model_fns
from lqec_jax.train import losses
from lqec_jax.train.losses import mean_square, next_token_nll, rilq, rilq_terms
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.train.tiny import VOCAB, make_config, plain_fns, plain_params

D, BATCH, LENGTH = 32, 2, 7
BITS = (2, 3)
TARGETS = ("post_norm", "pre_norm", "logits")
FNS = plain_fns()
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (BATCH, LENGTH))


@pytest.fixture(scope="module")
def student() -> dict:
    # One program compiles in a fraction of the time of its operations one by one.
    return jax.jit(lambda: plain_params(BITS, D))()


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


@pytest.mark.parametrize("target", TARGETS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(student, target):
    """Q = W and b = 0: no discrepancy, and no gradient of it; another weight has both."""

    def start(leaf: CompressedLinear) -> CompressedLinear:
        (adapter,) = leaf.corrections
        zero = LowRank(adapter.a, jnp.zeros_like(adapter.b))
        return CompressedLinear(Dense(leaf.dense()), (zero,))

    exact = jax.tree.map(
        lambda n: start(n) if is_compressed(n) else n, student, is_leaf=is_compressed
    )
    dense = jax.tree.map(
        lambda n: n.dense() if is_compressed(n) else n, student, is_leaf=is_compressed
    )
    pre, post = jax.jit(FNS.hidden)(dense, TOKENS)

    @jax.jit
    @jax.value_and_grad
    def run(train, frozen, teacher):
        weights = {"model_weight": 1.0, "token_weight": 0.0}
        return rilq(FNS, teacher, combine(train, frozen), TOKENS, target=target, **weights)

    def largest(gradient) -> float:
        return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))

    teacher = post if target == "post_norm" else pre
    loss, gradient = run(*partition(exact), teacher)
    assert float(loss) < 1e-12
    assert largest(gradient) < 1e-7
    loss, gradient = run(*partition(exact), teacher[::-1])
    assert float(loss) > 0.1
    assert largest(gradient) > 1e-3


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
    if kind == "plain":
        return FNS, {"head": plain_params((), D)["head"]}
    config = make_config(layers=1, d=D, d_ff=D, tied_head=kind == "tied")
    params = init_params(config, jax.random.key(2))
    name = "embed" if kind == "tied" else "head"
    return model_fns(config), {name: params[name]}


def nll_and_gradients(fns, params, post_norm):
    """Returns the loss of each token, and the gradient of a sum that weighs each its own way."""
    weights = 1.0 + np.arange(BATCH * (LENGTH - 1)).reshape(BATCH, LENGTH - 1)

    def run(params, post_norm):
        nll = next_token_nll(fns, params, post_norm, TOKENS)
        return jnp.sum(nll * weights), nll

    (_, nll), gradients = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, post_norm)
    return nll, jax.tree.leaves(gradients)


@pytest.mark.parametrize(
    ("kind", "chunk"), [("plain", 24), ("plain", 63), ("tied", 24), ("untied", 7)]
)
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
    wanted = numpy_nll(post_norm.astype(np.float64) @ np.asarray(params["head"]), TOKENS)
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


def test_a_head_of_unknown_width_is_applied_whole(monkeypatch):
    monkeypatch.setattr(losses, "VOCAB_CHUNK", 1)
    params = head_only("plain")[1]
    unknown = dataclasses.replace(FNS, vocab_size=None)
    post_norm = np.random.RandomState(3).standard_normal((BATCH, LENGTH, D)).astype(np.float32)
    nll = next_token_nll(unknown, params, post_norm, TOKENS)
    np.testing.assert_allclose(nll, numpy_nll(post_norm @ params["head"], TOKENS), rtol=1e-5)


# Gradients


def entries(train: dict) -> list[tuple[int, str, tuple]]:
    """Returns three places in each factor of each linear: (segment, factor, index)."""
    random, places = np.random.RandomState(5), []
    for number, segment in enumerate(train["blocks"]):
        (adapter,) = get_at(segment, "mix/kernel").corrections
        for factor in ("a", "b"):
            shape = getattr(adapter, factor).shape
            flat = random.choice(np.prod(shape), 3, replace=False)
            places += [(number, factor, np.unravel_index(place, shape)) for place in flat]
    return places


def read(tree: dict, number: int, factor: str) -> jax.Array:
    return getattr(get_at(tree["blocks"][number], "mix/kernel").corrections[0], factor)


def moved(train: dict, number: int, factor: str, index: tuple, by: float) -> dict:
    array = read(train, number, factor)
    other = np.array(array)
    other[index] += by
    return jax.tree.map(lambda leaf: jnp.asarray(other) if leaf is array else leaf, train)


@pytest.mark.parametrize(
    ("target", "chunk"), [("post_norm", VOCAB), ("pre_norm", 24), ("logits", VOCAB)]
)
def test_gradients_are_finite_differences(monkeypatch, student, teacher_hidden, target, chunk):
    monkeypatch.setattr(losses, "VOCAB_CHUNK", chunk)
    with jax.enable_x64(True):
        widen = lambda leaf: (  # noqa: E731
            leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        )
        train, frozen = partition(jax.tree.map(widen, student))
        teacher = jnp.asarray(teacher_hidden, jnp.float64)

        @jax.jit
        @jax.value_and_grad
        def run(train):
            weights = {"model_weight": 0.7, "token_weight": 0.4}
            return rilq(FNS, teacher, combine(train, frozen), TOKENS, target=target, **weights)

        loss, gradient = run(train)
        assert loss.dtype == jnp.float64
        places = entries(train)
        assert len(places) == 3 * 2 * len(BITS)
        for place in places:
            *factor, index = place
            ahead, behind = (run(moved(train, *place, by))[0] for by in (1e-4, -1e-4))
            wanted = float(ahead - behind) / 2e-4
            assert abs(wanted) > 1e-7, place
            assert float(read(gradient, *factor)[index]) == pytest.approx(wanted, rel=1e-5), place
