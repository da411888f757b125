"""Pooled adapters in training: how they begin, how they move, and that a run of them can resume."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lqec_jax.core import sites
from lqec_jax.core.bases import mask_base
from lqec_jax.core.linear import linear
from lqec_jax.core.types import ModelProblem, Work
from lqec_jax.errors import InputError
from lqec_jax.runs.checkpoints import Checkpoints
from lqec_jax.train.parts.adapters import (
    LR_TIMES_WIDTH,
    Adapters,
    add_adapter,
    find_adapters,
    store_adapters,
)
from lqec_jax.train.rates import Rates, make_optimizer
from lqec_jax.train.update import init_state, make_update
from lqec_jax.trainings.rilq import rilq
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from tests.train.tiny import GROUP, make_plain_problem

D_IN, D_OUT, LAYERS = 64, 24, 3
KEY = jax.random.key(0)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def make_leaf(group: int = 8, *corrections, layers: tuple[int, ...] = (LAYERS,)):
    words = np.random.RandomState(0).randint(0, 2**32, (*layers, 4, D_OUT), np.uint32)
    scales = np.full((*layers, D_IN // group, D_OUT), 0.1, np.float16)
    base = Affine(jnp.asarray(words), jnp.asarray(scales), None, 2, group, D_IN)
    return CompressedLinear(base, corrections)


# The start


def test_a_pooled_adapter_reads_the_base_s_groups_and_changes_nothing():
    leaf = add_adapter("rilq", make_leaf(), 4, KEY, pool=True)
    (adapter,) = find_adapters(leaf)
    assert (adapter.pool, adapter.a.shape, adapter.b.shape) == (8, (3, 8, 4), (3, 4, D_OUT))
    np.testing.assert_array_equal(leaf.dense(), make_leaf().dense())
    assert 0.8 < float(jnp.std(adapter.a)) / (8 / 4) < 1.2  # pool / rank
    assert add_adapter("lrec", leaf, None, KEY) is leaf
    assert add_adapter("rilq", leaf, 4, KEY, pool=True) is leaf


@pytest.mark.parametrize(("group", "rank", "wanted"), [(8, 9, 8), (32, None, 2), (32, 0.5, 2),
                                                       (8, 0.25, 6)])  # fmt: skip
def test_its_rank_is_at_most_the_number_of_groups(group, rank, wanted):
    leaf = add_adapter("rilq", make_leaf(group), rank, KEY, pool=True, new_rank=16)
    (adapter,) = find_adapters(leaf)
    assert adapter.rank == wanted
    if wanted == D_IN // group:  # as large as a normal one, every group alike
        np.testing.assert_allclose(adapter.a[1], group / wanted**0.5 * np.eye(wanted), rtol=1e-6)
    assert add_adapter("rilq", leaf, rank, KEY, pool=True) is leaf


def test_groups_of_one_input_make_the_usual_adapter():
    pooled, plain = (add_adapter("rilq", make_leaf(1), 4, KEY, pool=p) for p in (True, False))
    assert jax.tree.structure(pooled) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(pooled), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


PLAIN = LowRank(jnp.ones((D_IN, 2)), jnp.ones((2, D_OUT)))
POOLED = LowRank(jnp.ones((8, 2)), jnp.ones((2, D_OUT)), 8)


@pytest.mark.parametrize(
    ("leaf", "rank", "said"),
    [
        (make_leaf(8, PLAIN), None, "pool=True was asked for, but there are adapters that pool 1 "),
        (make_leaf(16, POOLED), None, "that pool 8 inputs, not the groups of 16; leave pool out"),
        (make_leaf(8, POOLED), 3, "rank=3 was asked for, but there are adapters of rank 2"),
        (make_leaf(), 100, "rank=100 is larger than min"),
        (CompressedLinear(Dense(jnp.ones((D_IN, D_OUT)))), 2, "a Dense base has no zero points"),
        (mask_base(make_leaf(8, layers=()), jnp.ones((D_IN, D_OUT), bool)), 2, "in a Masked base"),
        (dataclasses.replace(make_leaf(), input_transform=ChannelScale(jnp.ones((3, D_IN)))), 2,
         "a ChannelScale transform stands between the inputs and the base"),
    ],
)  # fmt: skip
def test_what_cannot_be_pooled_is_refused_in_one_line(leaf, rank, said):
    with pytest.raises(InputError, match="^rilq: ") as caught:
        add_adapter("rilq", leaf, rank, KEY, pool=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="rilq: pool='yes'; one of True, False was wanted"):
        rilq(pool="yes")


def test_what_is_stored_keeps_its_pool_and_what_it_stands_for():
    adapter = LowRank(100 * draw(8, 4), draw(4, D_OUT, seed=1) / 100, 8)
    (kept,) = store_adapters(make_leaf(8, adapter, layers=()), jnp.float16).corrections
    assert (kept.pool, kept.a.dtype) == (8, jnp.float16)
    np.testing.assert_allclose(kept.dense(), adapter.dense(), atol=5e-3)


def test_what_is_trained_is_counted_after_a_merge_too():
    step = rilq(rank=4, pool=True)
    after = jax.eval_shape(step.preview, make_leaf())
    size = 3 * 4 * (8 + D_OUT)
    assert step.count(after) == step.count(make_leaf()) == size
    merged = dataclasses.replace(after, corrections=())
    assert step.count(merged) == size


# The moves


def test_gradients_are_those_of_the_expanded_adapter():
    leaf, x = make_leaf(8, LowRank(draw(8, 2), draw(2, D_OUT), 8), layers=()), draw(5, D_IN)

    @jax.jit
    def gradients(adapter):
        def loss(adapter):
            return jnp.sum(jnp.sin(linear(x, CompressedLinear(leaf.base, (adapter,)))))

        return jax.value_and_grad(loss)(adapter)

    pooled, expanded = gradients(leaf.corrections[0]), gradients(leaf.corrections[0].expanded())
    assert float(pooled[0]) == pytest.approx(float(expanded[0]), rel=1e-5)
    of_means = expanded[1].a.reshape(8, 8, 2).mean(axis=1)  # every row of a counts as `pool` of 1/8
    np.testing.assert_allclose(pooled[1].a, of_means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled[1].b, expanded[1].b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lr", [1e-2, None])
@pytest.mark.parametrize("size", [1.0, 1e-7])  # gradients as small as Adam's epsilon
def test_training_is_that_of_the_form_that_reads_sums(lr, size):
    """y = x w + alpha/r (x̃ A) B with x̃ the sums over each group, by Adam."""
    rank, alpha, pool, updates = 4, 8.0, 8, 5
    w, a, b = draw(D_IN, D_OUT), draw(8, rank, seed=1) / rank, draw(rank, D_OUT, seed=2)
    x, y = draw(32, D_IN, seed=3), draw(32, D_OUT, seed=4)

    def loss_of_y(answer):
        return size * jnp.mean(jnp.square(answer - y))

    weight_decay = 0.1 if lr else 0.0  # which a rate of None does not scale by alpha/rank
    rates = Rates(lr, decay="constant", weight_decay=weight_decay)
    optimizer = make_optimizer((Adapters(alpha=alpha, rates=rates),), 64, updates)
    adapter = LowRank(pool * a, alpha / rank * b, pool)
    params = {"w": CompressedLinear(Dense(jnp.asarray(w)), (adapter,))}
    update = make_update(lambda p, x: (loss_of_y(linear(x, p["w"])), {}), optimizer)
    state = init_state(params, optimizer)
    for _ in range(updates):
        state, _ = update(state, x)
    came = state.params["w"].corrections[0]

    sums = x.reshape(32, 8, pool).sum(axis=-1)
    rate = LR_TIMES_WIDTH / 64 / (alpha / rank) if lr is None else lr
    published = optax.adamw(rate, weight_decay=weight_decay)

    @jax.jit
    def step(factors, state):
        def loss(factors):
            return loss_of_y(x @ w + alpha / rank * ((sums @ factors[0]) @ factors[1]))

        changes, state = published.update(jax.grad(loss)(factors), state, factors)
        return optax.apply_updates(factors, changes), state

    factors = (jnp.asarray(a), jnp.asarray(b))
    told = published.init(factors)
    for _ in range(updates):
        factors, told = step(factors, told)
    np.testing.assert_allclose(came.a, pool * factors[0], atol=2e-4)
    np.testing.assert_allclose(came.b, alpha / rank * factors[1], atol=2e-5)
    assert np.abs(came.a - pool * a).max() > 1e-2


# A run


@pytest.fixture(scope="module")
def problem() -> ModelProblem:
    plain = make_plain_problem()
    params = sites.map_model(
        plain.params, plain.fns.sites, lambda leaf, _: dataclasses.replace(leaf, corrections=())
    )
    return plain.pose(val=len(plain.tokens) - 4, key=jax.random.key(7), params=params)


STEP = rilq(rank=2, pool=True, updates=20, batch=4, eval_every=5, lr=1e-2, token_weight=0.0)


@pytest.fixture(scope="module")
def trained(problem):
    return STEP.run(problem)


def leaves_of(params) -> list[CompressedLinear]:
    return [segment["mix"]["kernel"] for segment in params["blocks"]]


def test_a_run_lowers_its_loss_by_zeros_alone(problem, trained):
    first, best = trained.history[0].val_loss, min(p.val_loss for p in trained.history)
    assert best < 0.9 * first
    for before, after in zip(leaves_of(problem.params), leaves_of(trained.params), strict=True):
        (adapter,) = after.corrections
        assert (adapter.pool, adapter.a.dtype) == (GROUP, jnp.float16)
        seen = jax.eval_shape(STEP.preview, before)
        assert jax.tree.structure(seen) == jax.tree.structure(after)
        change = np.asarray(after.dense() - before.dense())[0]  # [d_in, d_out]
        groups = change.reshape(-1, GROUP, change.shape[-1])
        assert np.abs(groups - groups[:, :1]).max() < 1e-6 < 1e-3 < np.abs(groups).max()


class Killed(Exception):
    pass


class Session:
    """Keeps states on disk and is killed before an update."""

    def __init__(self, folder, kill: int | None):
        self._checkpoints, self._kill = Checkpoints(folder), kill
        self.save, self.restore = self._checkpoints.save, self._checkpoints.restore
        self.close = self._checkpoints.close

    def progress(self, done: int, total: int, message: str) -> None:
        if done == self._kill:
            raise Killed


def test_a_killed_run_resumes_to_the_same_bytes(problem, trained, tmp_path):
    for kill in (13, None):
        session = Session(tmp_path / "training", kill)
        try:
            work = Work(problem.work.key, session=session)
            resumed = STEP.run(dataclasses.replace(problem, work=work))
        except Killed:
            assert kill
        session.close()
    assert resumed.history == trained.history
    for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(trained.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
