"""One update: gradients of the whole batch, adapters in float32, everything else left alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lqec_jax.train
from lqec_jax.core.tree import combine, partition
from lqec_jax.errors import InputError
from lqec_jax.train import update as module
from lqec_jax.train.update import (
    TrainState,
    choose_options,
    count_parts,
    init_state,
    make_update,
)
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.train.tiny import Problem, adapters, make_plain_problem

UPDATES = 3


def as_bytes(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def problem() -> Problem:
    problem = make_plain_problem(length=7, d=32)
    # One block is enough. Arrays of the device, as a user's are, could be taken from their owner.
    params = {**problem.params, "blocks": problem.params["blocks"][:1]}
    return problem._replace(params=jax.tree.map(jnp.array, params))


@pytest.fixture(scope="module")
def batch(problem) -> dict:
    return problem.batch(np.arange(8))


class Ran(NamedTuple):
    """What there was before, between and after `UPDATES` updates."""

    first: TrainState
    copy_of_first: TrainState
    last: TrainState
    metrics: list[dict]
    traces: list[int]


@pytest.fixture(scope="module")
def ran(problem, batch) -> Ran:
    """Runs whole batches by gradient descent at rate 1, whose step is the gradient itself."""
    count, traces, metrics = 0, [], []

    def loss(params, part):
        nonlocal count
        count += 1
        return problem.loss(params, part)

    optimizer = optax.sgd(1.0, momentum=0.5)
    update = make_update(loss, optimizer)
    first = state = init_state(problem.params, optimizer)
    copy_of_first = jax.tree.map(np.array, first)
    for _ in range(UPDATES):
        state, said = update(state, batch)
        traces.append(count)
        metrics.append(jax.device_get(said))
    return Ran(first, copy_of_first, state, metrics, traces)


@pytest.fixture(scope="module")
def expected(problem, batch) -> tuple[float, list[np.ndarray]]:
    """Returns the loss and its gradient at the start, with nothing of `make_update` in between."""
    train, frozen = partition(problem.params)
    train = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), train)
    loss = lambda train: problem.loss(combine(train, frozen), batch)[0]  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(train)
    return float(value), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


def test_the_package_offers_it():
    assert lqec_jax.train.make_update is make_update


def test_float16_adapters_are_trained_in_float32(problem):
    state = init_state(problem.params, optax.adam(1e-3))
    given = partition(problem.params)[0]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(given)} == {"float16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.train)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.opt_state[0].mu)} == {"float32"}
    for came, wanted in zip(adapters(state.params), adapters(problem.params), strict=True):
        np.testing.assert_array_equal(came, wanted)
    assert as_bytes(state.frozen) == as_bytes(partition(problem.params)[1])
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)


def test_another_selection_is_trained_instead(problem):
    state = init_state(problem.params, optax.sgd(1.0), "scales")
    names = {str(path[-1]) for path, _ in jax.tree_util.tree_leaves_with_path(state.train)}
    assert names == {".scales"}
    with pytest.raises(InputError, match="did you mean 'scales'"):
        init_state(problem.params, optax.sgd(1.0), "scale")


def test_the_first_step_is_the_gradient(ran, expected):
    loss, gradient = expected
    assert ran.metrics[0]["loss"] == pytest.approx(loss, rel=1e-6)
    norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in gradient))
    assert ran.metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 1e-2


def test_metrics_are_those_of_the_loss_and_two_more(ran):
    for metrics in ran.metrics:
        assert metrics.keys() == {"loss", "grad_norm", "discrepancy", "next_token"}
        half = 0.5 * (metrics["discrepancy"] + metrics["next_token"])
        assert metrics["loss"] == pytest.approx(half, rel=1e-6)
    losses = [float(metrics["loss"]) for metrics in ran.metrics]
    assert losses[2] < losses[1] < losses[0]
    assert int(ran.last.step) == UPDATES


def test_what_is_not_trained_keeps_its_bits(problem, ran):
    given = partition(problem.params)[1]
    assert as_bytes(ran.last.frozen) == as_bytes(given)
    is_compressed = lambda node: isinstance(node, CompressedLinear)  # noqa: E731
    leaves = jax.tree.leaves(ran.last.params, is_leaf=is_compressed)
    bases = [leaf.base for leaf in leaves if is_compressed(leaf)]
    assert len(bases) == 1
    assert {str(base.codes.dtype) for base in bases} == {"uint32"}
    for before, after in zip(adapters(problem.params), adapters(ran.last.params), strict=True):
        assert np.abs(after - before).max() > 1e-4


def test_the_state_is_donated_and_the_parameters_given_are_not(problem, ran):
    donated = jax.tree.leaves((ran.first.train, ran.first.opt_state, ran.first.frozen))
    assert all(leaf.is_deleted() for leaf in donated)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(problem.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(ran.last))


def test_later_updates_are_not_traced_again(ran):
    assert ran.traces[0] >= 1
    assert ran.traces == ran.traces[:1] * UPDATES


def test_four_parts_are_the_whole_batch(problem, batch, ran, expected):
    optimizer = optax.sgd(1.0, momentum=0.5)
    state = jax.tree.map(jnp.asarray, ran.copy_of_first)
    state, metrics = make_update(problem.loss, optimizer, accumulate=4)(state, batch)
    for name, value in ran.metrics[0].items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-6), name
    start = jax.tree.leaves(ran.copy_of_first.train)
    for before, after, g in zip(start, jax.tree.leaves(state.train), expected[1], strict=True):
        np.testing.assert_allclose(after, before - g, rtol=0, atol=1e-6)
    # What is compared is not all round-off.
    assert max(np.abs(g).max() for g in expected[1]) > 1e-3


def test_parts_are_dealt_like_cards():
    dealt = module._deal(jnp.arange(8), 4)
    np.testing.assert_array_equal(dealt, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert module._deal(jnp.zeros((6, 5, 2)), 3).shape == (3, 2, 5, 2)


def small_update(optimizer):
    """Returns an update of a 2 x 2 weight and the state before it."""

    def loss(params, x):
        return jnp.mean(jnp.square(x @ params["w"].dense() - 1.0)), {}

    base, adapter = Dense(jnp.eye(2)), LowRank(jnp.ones((2, 1)), jnp.zeros((1, 2)))
    params = {"w": CompressedLinear(base, (adapter,))}
    return make_update(loss, optimizer, accumulate=2), init_state(params, optimizer)


def test_accumulated_gradients_are_a_mean():
    # The loss is mean((x + (x·1) b - 1)²), whose gradient by b is that of a two-term regression.
    update, state = small_update(optax.sgd(1.0))
    x = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [1.0, 1.0]], np.float32)
    state, metrics = update(state, x)
    gradient = (x.sum(1, keepdims=True) * (x - 1)).sum(0) * 2 / x.size
    np.testing.assert_allclose(state.train["w"].corrections[0].b[0], -gradient, rtol=1e-6)
    assert float(metrics["loss"]) == pytest.approx(np.mean((x - 1) ** 2), rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "length", "devices", "parts"),
    [(8, 256, 1, 4), (8, 64, 1, 1), (8, 4096, 1, 8), (8, 256, 2, 2), (8, 4096, 2, 4),
     (6, 200, 1, 3), (3, 4096, 2, 1)],
)  # fmt: skip
def test_a_batch_is_walked_in_parts_that_every_device_can_share(batch, length, devices, parts):
    assert count_parts(batch, length, devices) == parts
    assert batch % parts == 0 and (batch // parts % devices == 0 or parts == 1)


def test_one_segment_is_compiled_in_the_usual_order_and_several_in_the_lean_one():
    assert choose_options(1) is None
    (name, value), = choose_options(2).items()  # fmt: skip
    assert name == "xla_cpu_scheduler_type" and value.endswith("MEMORY_OPTIMIZED")


def test_it_may_be_called_from_inside_another_program():
    update, state = small_update(optax.adam(1e-2))
    batches = jax.random.normal(jax.random.key(0), (5, 4, 2))
    together, metrics = jax.jit(lambda state: jax.lax.scan(update, state, batches))(state)
    alone = []
    for x in batches:
        state, said = update(state, x)
        alone.append(float(said["loss"]))
    np.testing.assert_allclose(metrics["loss"], alone, rtol=1e-6)
    for t, a in zip(jax.tree.leaves(together), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(t, a, atol=1e-6)
