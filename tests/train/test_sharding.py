"""A mesh changes where arrays live and nothing else."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lqec_jax.core.sites import in_groups
from lqec_jax.core.tree import get_at
from lqec_jax.core.types import Schedule
from lqec_jax.errors import InputError
from lqec_jax.models.decoder import model_fns
from lqec_jax.train import fit as fitting
from lqec_jax.train.fit import fit
from lqec_jax.train.sharding import make_mesh, param_shardings
from lqec_jax.train.update import TrainState, make_update
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from lqec_kernels.outliers import Outliers
from tests.train.tiny import adapters, draw_decoder, make_config, make_plain_problem, make_problem

UPDATES, BATCH = 3, 4


class Run(NamedTuple):
    first: TrainState
    last: TrainState
    shardings: Any
    losses: list[float]
    traces: int
    program: str | None


def run_updates(problem, mesh) -> Run:
    """Does a few updates and keeps what there is to say of them."""
    traces = []

    def loss(params, batch):
        traces.append(None)
        return problem.loss(params, batch)

    optimizer = optax.adam(1e-2)
    state, shardings, _ = fitting._place(problem.fns, problem.params, optimizer, "adapters", mesh)
    update = make_update(loss, optimizer, state_sharding=shardings)
    first, losses = state, []
    for number in range(UPDATES):
        batch = fitting._on_devices(problem.batch(number + np.arange(BATCH)), mesh)
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
    count = len(traces)
    program = mesh and update.lower(state, batch).compile().as_text()
    return Run(first, state, shardings, losses, count, program)


@pytest.fixture(scope="module")
def problem():
    return make_problem(layers=2)


@pytest.fixture(scope="module")
def alone(problem):
    return run_updates(problem, None)


@pytest.fixture(scope="module")
def spread(problem):
    return run_updates(problem, make_mesh(data=2, model=2))


def test_four_devices_give_the_result_of_one(alone, spread):
    np.testing.assert_allclose(spread.losses, alone.losses, atol=1e-5)
    assert alone.losses[2] < alone.losses[0]
    for came, wanted in zip(adapters(spread.last.train), adapters(alone.last.train), strict=True):
        np.testing.assert_allclose(came, wanted, atol=1e-5)


def shard_shapes(state: TrainState, path: str) -> tuple:
    leaf = get_at(state.params["blocks"][0], f"{path}/kernel")
    arrays = (
        leaf.base.codes,
        leaf.base.scales,
        leaf.base.zeros,
        *jax.tree.leaves(leaf.corrections),
    )
    return tuple(array.addressable_shards[0].data.shape for array in arrays)


def test_packed_arrays_are_split_with_the_weight_they_stand_for(spread):
    # Whole: codes [2, 4, 64], scales [2, 2, 64], zeros [2, 2, 4], a [2, 64, 4], b [2, 4, 64].
    assert shard_shapes(spread.last, "attn/q") == (
        (2, 4, 32), (2, 2, 32), (2, 2, 2), (2, 64, 4), (2, 4, 32),
    )  # fmt: skip
    assert shard_shapes(spread.last, "attn/o") == (
        (2, 2, 64), (2, 1, 64), (2, 1, 4), (2, 32, 4), (2, 4, 64),
    )  # fmt: skip


def test_moments_are_split_like_what_they_belong_to(spread):
    moments = spread.last.opt_state[0].mu
    q = get_at(moments["blocks"][0], "attn/q/kernel").corrections[0]
    assert q.b.addressable_shards[0].data.shape == (2, 4, 32)
    assert q.b.sharding.spec == PartitionSpec(None, None, "model")


def test_windows_are_split_over_data(problem):
    mesh = make_mesh(data=2, model=2)
    batch = fitting._on_devices(problem.batch(np.arange(BATCH)), mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (BATCH // 2, 16)
    odd = fitting._on_devices(problem.batch(np.arange(3)), mesh)
    assert odd["tokens"].addressable_shards[0].data.shape == (3, 16)


@pytest.mark.parametrize("name", ["alone", "spread"])
def test_an_update_consumes_its_state(name, request):
    run = request.getfixturevalue(name)
    consumed = jax.tree.leaves((run.first.train, run.first.frozen, run.first.opt_state))
    assert len(consumed) > 50
    assert all(array.is_deleted() for array in consumed)


def test_an_update_is_traced_once_and_leaves_arrays_where_they_were(spread):
    assert spread.traces == 1
    came = jax.tree.map(lambda array: array.sharding, spread.last)
    assert jax.tree.leaves(came) == jax.tree.leaves(spread.shardings)


def test_devices_exchange_activations_but_no_weights(spread):
    assert " all-reduce(" in spread.program
    assert not any(f" {name}(" in spread.program for name in ("all-gather", "all-to-all"))


def test_parts_of_a_batch_lie_on_all_devices():
    # A part that lay on one device would be worked on by both.
    problem, optimizer, mesh = make_plain_problem(d=32), optax.sgd(1e-2), make_mesh(data=2)
    state, shardings, _ = fitting._place(problem.fns, problem.params, optimizer, "adapters", mesh)
    batch = fitting._on_devices(problem.batch(np.arange(8)), mesh)
    update = make_update(problem.loss, optimizer, accumulate=4, state_sharding=shardings)
    program = update.lower(state, batch).compile().as_text()
    assert "f32[1,16,32]" in program and "f32[2,16,32]" not in program


def test_what_would_straddle_two_devices_is_held_whole():
    # 96 inputs are 3 runs of 32 codes, 96 outputs 3 runs of 32 zeros, 32 outputs one.
    config = make_config(d_ff=96, kv_heads=2)
    params = draw_decoder(config, (2,))
    shardings, notes = param_shardings(model_fns(config), params, make_mesh(model=2))
    named = sorted(note.split()[0] for note in notes)
    assert named == ["attn/k", "attn/v", "mlp/down", "mlp/gate", "mlp/up"]
    assert "d_in=96 is not a multiple of 2 devices x 32" in "".join(notes)
    block = shardings["blocks"][0]
    whole = {s.spec for s in jax.tree.leaves(get_at(block, "mlp/down/kernel"))}
    assert whole == {PartitionSpec()}
    split = get_at(block, "attn/q/kernel").base.codes
    assert split.spec == PartitionSpec(None, None, "model")


def test_pooled_adapters_are_split_where_no_pool_straddles():
    fns = model_fns(make_config())
    params = {"blocks": ({"attn": {}},)}
    for path, pool in (("q", 16), ("o", 16), ("k", 64), ("v", 64)):
        a, b = np.ones((2, 64 // pool, 4), np.float32), np.ones((2, 4, 64), np.float32)
        leaf = CompressedLinear(Dense(np.ones((2, 64, 64))), (LowRank(a, b, pool),))
        params["blocks"][0]["attn"][path] = {"kernel": leaf}
    fns = dataclasses.replace(fns, sites=in_groups(fns.linear_groups, ("attn/o", "attn/v")))
    shardings, _ = param_shardings(fns, params, make_mesh(model=2))
    assert jax.tree.structure(shardings) == jax.tree.structure(params)
    specs = {
        path: tuple(s.spec for s in jax.tree.leaves(node["kernel"].corrections))
        for path, node in shardings["blocks"][0]["attn"].items()
    }
    columns = (PartitionSpec(None, None, None), PartitionSpec(None, None, "model"))
    assert specs["q"] == specs["k"] == columns
    rows = PartitionSpec(None, "model", None), PartitionSpec(None, None, None)
    assert specs["o"] == rows
    assert specs["v"] == (PartitionSpec(None, None, None),) * 2  # one pool of all 64 inputs


def test_too_many_devices_are_refused():
    with pytest.raises(InputError, match="data=4 x model=2 needs 8 devices; 4 are here"):
        make_mesh(data=4, model=2)


def test_fit_on_a_mesh_gives_the_result_of_one_device():
    problem = make_plain_problem()
    schedule = Schedule(updates=6, batch=4, accumulate=2, eval_every=2)

    def run(mesh):
        return fit(problem.fns, problem.params, problem.objective(val=4), optax.adam(1e-3),
                   schedule, jax.random.key(3), mesh=mesh)  # fmt: skip

    alone, spread = run(None), run(make_mesh(data=2, model=2))
    assert alone.best_update == spread.best_update > 0
    for came, wanted in zip(spread.history, alone.history, strict=True):
        np.testing.assert_allclose(came.val_loss, wanted.val_loss, atol=1e-5)
    for came, wanted in zip(adapters(spread.params), adapters(alone.params), strict=True):
        np.testing.assert_allclose(came, wanted, atol=1e-5)


def test_rounded_adapters_are_split_by_their_groups():
    fns = model_fns(make_config())
    rounded = QuantizedLowRank.round(np.ones((2, 64, 4)), np.ones((2, 4, 256)), bits=4,
                                     group_size=64)  # fmt: skip
    leaf = CompressedLinear(Dense(np.ones((2, 64, 256))), (rounded,))
    params = {"blocks": ({"attn": {"q": {"kernel": leaf}, "o": {"kernel": leaf}}},)}
    shardings, _ = param_shardings(fns, params, make_mesh(model=2))
    placed = {path: get_at(shardings["blocks"][0], f"attn/{path}/kernel") for path in "qo"}
    assert jax.tree.structure(placed["q"]) == jax.tree.structure(leaf)
    column, row = (placed[path].corrections[0] for path in "qo")
    # d_out=256 is two devices of two groups; d_in=64 is one group, which straddles.
    assert column.b.codes.spec[-2] == column.b.scales.spec[-2] == "model"
    assert "model" not in (*column.a.codes.spec, *row.a.codes.spec, *row.b.codes.spec)


def test_outliers_are_held_whole():
    fns = model_fns(make_config())
    outliers = Outliers(np.zeros((2, 4), np.uint32), np.ones((2, 4)), 64, 64)
    leaf = CompressedLinear(Dense(np.ones((2, 64, 64))), (outliers,))
    params = {"blocks": ({"attn": {"q": {"kernel": leaf}, "o": {"kernel": leaf}}},)}
    shardings, _ = param_shardings(fns, params, make_mesh(model=2))
    for path in "qo":
        placed = get_at(shardings["blocks"][0], f"attn/{path}/kernel")
        assert {s.spec for s in jax.tree.leaves(placed.corrections)} == {PartitionSpec(None, None)}
        assert "model" in placed.base.w.spec
