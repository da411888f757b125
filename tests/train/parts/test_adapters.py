"""Adapters as what is trained: their start, their optimizer, their store."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lqec_jax.core.linear import linear
from lqec_jax.core.types import Schedule
from lqec_jax.errors import InputError
from lqec_jax.train.parts.adapters import (
    DEFAULT_RANK,
    LR_TIMES_WIDTH,
    Adapters,
    add_adapter,
    find_adapters,
    store_adapters,
)
from lqec_jax.train.rates import Rates, check_schedule, make_optimizer
from lqec_jax.train.update import init_state, make_update
from lqec_jax.trainings.rilq import rilq
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, Dense, LowRank

D, FF = 16, 24
SETTINGS = {"rank": 4, "alpha": 16.0, "dtype": "float16"}
RATES = {"lr": 1e-2, "decay": "constant", "weight_decay": 0.0}
TIMES = {"updates": 5, "batch": 8, "accumulate": None, "eval_every": 5, "patience": 5}


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def optimizer_of(width: int, updates: int, alpha: float = 16.0, **rates):
    return make_optimizer((Adapters(alpha=alpha, rates=Rates(**rates)),), width, updates)


def leaf_of(*corrections, layers: tuple[int, ...] = ()) -> CompressedLinear:
    return CompressedLinear(Dense(jnp.asarray(draw(*layers, D, FF))), corrections)


def test_a_new_adapter_changes_nothing_and_an_old_one_stays():
    new = add_adapter("rilq", leaf_of(layers=(3,)), 4, jax.random.key(0))
    (adapter,) = find_adapters(new)
    assert adapter.a.shape == (3, D, 4) and adapter.b.shape == (3, 4, FF)
    np.testing.assert_array_equal(new.dense(), new.base.dense())
    assert 0.15 < float(jnp.std(adapter.a)) < 0.35  # 1 / rank
    assert add_adapter("rilq", new, None, jax.random.key(1)) is new
    with pytest.raises(InputError, match="rilq: rank=8 was asked for, but there are adapters of"):
        add_adapter("rilq", new, 8, jax.random.key(1))


def test_rounded_adapters_are_neither_trained_nor_doubled_unasked():
    rounded = QuantizedLowRank.round(draw(D, 4), draw(4, FF), bits=4, group_size=8)
    with pytest.raises(InputError, match="rilq: the adapters here are rounded, which only finetun"):
        add_adapter("rilq", leaf_of(rounded), None, jax.random.key(0))
    beside = add_adapter("rilq", leaf_of(rounded), 2, jax.random.key(0))
    assert beside.corrections[0] is rounded and find_adapters(beside)[0].rank == 2


def test_without_a_rank_it_is_the_default_and_must_fit():
    with pytest.raises(InputError, match=rf"lrec: rank={DEFAULT_RANK} is larger than min"):
        add_adapter("lrec", leaf_of(), None, jax.random.key(0))


def test_what_is_stored_is_balanced_in_its_dtype_as_the_preview_says():
    adapter = LowRank(jnp.asarray(100 * draw(D, 4)), jnp.asarray(draw(4, FF, seed=1) / 100))
    stored = store_adapters(leaf_of(adapter), jnp.float16)
    kept = stored.corrections[0]
    assert kept.a.dtype == kept.b.dtype == jnp.float16
    np.testing.assert_allclose(
        np.linalg.norm(kept.a, axis=0), np.linalg.norm(kept.b, axis=1), rtol=1e-3
    )
    np.testing.assert_allclose(kept.dense(), adapter.dense(), atol=2e-2)
    shapes = jax.eval_shape(rilq(rank=4).preview, leaf_of())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), stored
    )


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"batch": 8, "accumulate": 3}, "batch=8 does not divide into accumulate=3"),
        ({"decay": "linear"}, "decay='linear'"),
        ({"lr": -1.0}, "lr=-1.0; a number >= 0"),
        ({"updates": 0}, "updates=0; an integer >= 1"),
        ({"patience": -1}, "patience=-1"),
        ({"dtype": "int8"}, "dtype='int8'"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting, said):
    def check(settings: dict) -> None:
        of = lambda known: {name: settings[name] for name in known}  # noqa: E731
        Adapters(**of(SETTINGS), rates=Rates(**of(RATES))).check("lrec")
        check_schedule("lrec", Schedule(**of(TIMES)))

    plain = SETTINGS | RATES | TIMES
    check(plain)
    with pytest.raises(InputError, match="^lrec: ") as caught:
        check(plain | setting)
    assert said in str(caught.value)


def literal_training(a, b, alpha, optimizer, steps, loss_of_y):
    """Trains (A, B) of y = x w + alpha/r (x A) B as it is published."""

    def loss(factors, x, w):
        a, b = factors
        return loss_of_y(x @ w + alpha / a.shape[1] * ((x @ a) @ b))

    @jax.jit
    def update(factors, state, x, w):
        changes, state = optimizer.update(jax.grad(loss)(factors, x, w), state, factors)
        return optax.apply_updates(factors, changes), state

    factors, state = (jnp.asarray(a), jnp.asarray(b)), optimizer.init((a, b))
    for x, w in steps:
        factors, state = update(factors, state, x, w)
    return factors


@pytest.mark.parametrize(
    ("alpha", "weight_decay", "decay", "size"),
    [
        (16.0, 0.0, "constant", 1.0),
        (16.0, 0.1, "constant", 1.0),
        (2.0, 0.05, "cosine", 1.0),
        (16.0, 0.0, "constant", 1e-7),  # gradients as small as Adam's epsilon
    ],
)
@pytest.mark.parametrize("start", ["zero", "warm"])
def test_training_a_and_b_is_training_the_published_factors(
    alpha, weight_decay, decay, size, start
):
    rank, updates, lr = 4, 5, 1e-2
    w, a = draw(D, FF), draw(D, rank, seed=1) / rank
    b = draw(rank, FF, seed=2) * (start == "warm")
    x, y = draw(32, D, seed=3), draw(32, FF, seed=4)

    def loss_of_y(answer):
        return size * jnp.mean(jnp.square(answer - y))

    optimizer = optimizer_of(64, updates, alpha, lr=lr, decay=decay, weight_decay=weight_decay)
    params = {"w": CompressedLinear(Dense(w), (LowRank(a, alpha / rank * b),))}
    update = make_update(lambda p, x: (loss_of_y(linear(x, p["w"])), {}), optimizer)
    state = init_state(params, optimizer)
    for _ in range(updates):
        state, _ = update(state, x)
    came = state.params["w"].corrections[0]

    rate = optax.cosine_decay_schedule(lr, updates) if decay == "cosine" else lr
    published = optax.adamw(rate, weight_decay=weight_decay) if weight_decay else optax.adam(rate)
    wanted_a, wanted_b = literal_training(a, b, alpha, published, [(x, w)] * updates, loss_of_y)
    np.testing.assert_allclose(came.a, wanted_a, atol=1e-5)
    np.testing.assert_allclose(came.b, alpha / rank * wanted_b, atol=1e-5)
    assert np.abs(came.b - alpha / rank * b).max() > 1e-2


@pytest.mark.parametrize("rank", [2, 32])
def test_without_a_learning_rate_b_moves_as_far_at_every_rank(rank):
    width, alpha = 64, 16.0
    a, b = draw(D, rank, seed=1), draw(rank, FF, seed=2)
    gradient = {"w": LowRank(*map(jnp.asarray, (draw(D, rank, seed=3), draw(rank, FF, seed=4))))}

    def move(lr):
        optimizer = optimizer_of(width, 5, alpha, lr=lr, decay="cosine")
        state = optimizer.init({"w": LowRank(a, b)})
        return optimizer.update(gradient, state, {"w": LowRank(a, b)})[0]["w"]

    ours, told = move(None), move(LR_TIMES_WIDTH / width / (alpha / rank))
    np.testing.assert_allclose(ours.a, told.a, rtol=1e-5)
    np.testing.assert_allclose(ours.b, told.b, rtol=1e-5)
    # Adam's first step is a sign.
    np.testing.assert_allclose(np.abs(ours.b), LR_TIMES_WIDTH / width, rtol=1e-4)


def test_it_counts_those_that_are_there_or_those_it_would_add():
    part = Adapters(rank=3)
    assert part.count(leaf_of()) == 3 * (D + FF)
    there = LowRank(jnp.ones((D, 2)), jnp.ones((2, FF)))
    assert part.count(leaf_of(there)) == 2 * (D + FF)
    rounded = QuantizedLowRank.round(draw(D, 4), draw(4, FF), bits=4, group_size=8)
    assert part.count(leaf_of(rounded)) == 4 * (D + FF)


def test_parts_are_equal_by_value():
    assert Adapters(rank=3, rates=Rates(0.1)) == Adapters(rank=3, rates=Rates(0.1))
    assert hash(Adapters(rank=3).named("rilq")) == hash(Adapters(rank=3, method="rilq"))
    assert make_optimizer((Adapters(),), 64, 5) is make_optimizer((Adapters(),), 64, 5)
