"""Corrections for what inputs see: each is the best of its rank in the norm that it names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.compensation.svd import naive_lora
from lqec_jax.compensation.whitened import (
    eora,
    l2qer,
    qera,
    qera_approx,
    slim_lora,
    weigh_heuristic,
    weigh_saliency,
)
from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.errors import InputError
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, Hadamard, LowRank

D_IN, D_OUT, RANK = 48, 32, 5


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
ROUNDED = np.round(W)
X = (draw(600, D_IN, seed=1) @ (np.eye(D_IN) + draw(D_IN, D_IN, seed=2) / 4)) * np.exp(
    draw(D_IN, seed=3)
)
RMS, ABSMEAN, GRAM = np.sqrt(np.mean(X**2, 0)), np.mean(np.abs(X), 0), X.T @ X / len(X)
LEAF = CompressedLinear(Dense(jnp.asarray(ROUNDED)))
# Each face and the weights of squared errors that it claims, written out.
FACES = {
    "naive_lora": (naive_lora, {}, np.ones(D_IN)),
    "l2qer": (l2qer, {}, ABSMEAN**2),
    "slim_lora": (slim_lora, {}, RMS**2 + np.min(RMS) ** 2),
    "slim_lora of the paper": (
        slim_lora,
        {"saliency": "absmean"},
        (ABSMEAN + np.min(ABSMEAN)) ** 2,
    ),
    "qera_approx": (qera_approx, {}, RMS**2),
    "qera": (qera, {}, GRAM),
}


def pose(step) -> LinearProblem:
    known = {"rms": RMS, "absmean": ABSMEAN, "gram": GRAM}
    stats = {name: jnp.asarray(known[name], jnp.float32) for name in step.needs}
    return LinearProblem(jnp.asarray(W), LinearStats(**stats), jax.random.key(0))


def solve(step, leaf: CompressedLinear = LEAF) -> tuple:
    return jax.jit(lambda problem, leaf: run_linear(step, problem, leaf))(pose(step), leaf)


def run(step, leaf: CompressedLinear = LEAF) -> CompressedLinear:
    return solve(step, leaf)[0]


def missing(leaf: CompressedLinear) -> np.ndarray:
    return np.asarray(W - leaf.dense(), np.float64)


def energy(error: np.ndarray, weight: np.ndarray) -> float:
    """Returns tr(Δᵀ G Δ), of a gram or of its diagonal."""
    weight = np.diag(weight) if weight.ndim == 1 else weight
    return float(np.sum(error * (weight @ error)))


def tail(error: np.ndarray, weight: np.ndarray, rank: int = RANK) -> float:
    root = np.diag(np.sqrt(weight)) if weight.ndim == 1 else np.linalg.cholesky(weight).T
    return float(np.sum(np.linalg.svd(root @ error, compute_uv=False)[rank:] ** 2))


@pytest.fixture(scope="module")
def left() -> dict[str, np.ndarray]:
    """Returns what each face leaves of the error."""
    return {
        name: missing(run(make(rank=RANK, dtype="float32", **said)))
        for name, (make, said, _) in FACES.items()
    }


@pytest.mark.parametrize("name", FACES)
def test_what_is_left_is_the_tail_in_its_own_norm(name, left):
    weight = FACES[name][2]
    assert energy(left[name], weight) == pytest.approx(tail(W - ROUNDED, weight), rel=1e-5)


@pytest.mark.parametrize("name", FACES)
def test_each_is_the_best_in_its_own_norm(name, left):
    weight = FACES[name][2]
    best = energy(left[name], weight)
    for error in left.values():
        assert best <= energy(error, weight) * (1 + 1e-6)
    if name != "naive_lora":
        assert best < 0.9 * energy(left["naive_lora"], weight)


def test_slim_gains_in_saliency_what_it_loses_in_frobenius(left):
    ones, saliency = np.ones(D_IN), FACES["slim_lora"][2]
    assert energy(left["slim_lora"], saliency) < energy(left["naive_lora"], saliency)
    assert energy(left["naive_lora"], ones) < energy(left["slim_lora"], ones)


def test_two_names_of_one_solution_give_the_same_bytes():
    one, other = (run(make(rank=RANK)).corrections[0] for make in (qera, eora))
    np.testing.assert_array_equal(one.a, other.a)
    np.testing.assert_array_equal(one.b, other.b)


def test_a_sketch_is_as_good_to_a_part_in_a_thousand(left):
    error = missing(run(qera(rank=RANK, passes=4, dtype="float32")))
    least = energy(left["qera"], GRAM)
    assert abs(energy(error, GRAM) / least - 1) < 1e-3
    assert not np.array_equal(error, left["qera"])


@pytest.mark.parametrize("transform", ["scale", "rotation"])
@pytest.mark.parametrize("make", [qera, qera_approx])
def test_it_sees_the_inputs_before_any_transform(make, transform):
    before = {
        "scale": ChannelScale(jnp.exp(draw(D_IN, seed=5))),
        "rotation": Hadamard.draw(jax.random.key(0), D_IN, 16),
    }[transform]
    earlier = LowRank(jnp.asarray(draw(D_IN, 2)), jnp.asarray(draw(2, D_OUT, seed=6)))
    leaf = CompressedLinear(Dense(jnp.asarray(ROUNDED)), (earlier,), before)
    after = run(make(rank=RANK, dtype="float32"), leaf)
    assert after.input_transform is not None and len(after.corrections) == 2
    weight = GRAM if make is qera else RMS**2
    assert energy(missing(after), weight) == pytest.approx(tail(missing(leaf), weight), rel=1e-5)


def test_a_full_rank_leaves_nothing():
    error = missing(run(qera(rank=1.0, dtype="float32")))
    np.testing.assert_allclose(error, 0, atol=1e-5)


def test_factors_are_stored_in_half_precision_unless_said():
    half, single = run(qera(rank=0.25)), run(qera(rank=0.25, dtype="float32"))
    assert {a.dtype for a in jax.tree.leaves(half.corrections)} == {jnp.dtype("float16")}
    assert {a.dtype for a in jax.tree.leaves(single.corrections)} == {jnp.dtype("float32")}
    assert half.corrections[0].rank == 8
    assert half.stored_bits() - LEAF.stored_bits() == 16 * 8 * (D_IN + D_OUT)
    lost = np.asarray(half.dense() - single.dense(), np.float64)
    assert 0 < energy(lost, np.ones(D_IN)) < 1e-6 * energy(W - ROUNDED, np.ones(D_IN))


def test_the_weights_of_inputs_that_are_never_seen():
    size = jnp.asarray([0.0, 3.0, 2.0])
    np.testing.assert_allclose(weigh_saliency(LinearStats(rms=size)), [4.0, 13.0, 8.0])
    np.testing.assert_allclose(weigh_saliency(LinearStats(absmean=size)), [4.0, 25.0, 16.0])
    least = 1e-4 * 5 / 3
    np.testing.assert_allclose(weigh_heuristic(LinearStats(absmean=size)), [least**2, 9.0, 4.0])
    for weigh, name in ((weigh_saliency, "rms"), (weigh_heuristic, "absmean")):
        np.testing.assert_array_equal(weigh(LinearStats(**{name: jnp.zeros(3)})), 0.0)


@pytest.mark.parametrize("name", FACES)
def test_the_objective_is_its_norm_relative_to_the_weight(name):
    make, said, weight = FACES[name]
    step = make(**said)
    came = step.objective(pose(step), LEAF)
    assert float(came) == pytest.approx(energy(W - ROUNDED, weight) / energy(W, weight), rel=1e-4)


def test_each_asks_for_what_it_uses_only():
    needs = {make.__name__: make().needs for make in (l2qer, qera_approx, qera, eora)}
    assert needs == {
        "l2qer": {"absmean"},
        "qera_approx": {"rms"},
        "qera": {"gram"},
        "eora": {"gram"},
    }
    assert slim_lora().needs == {"rms"} and slim_lora(saliency="absmean").needs == {"absmean"}


@pytest.mark.parametrize("make", [l2qer, slim_lora, qera_approx, qera, eora])
def test_other_arguments_are_refused(make):
    for arguments in ({"rank": 0}, {"rank": 1.5}, {"dtype": "bfloat16"}):
        (argument,) = arguments
        with pytest.raises(InputError, match=f"^{make.__name__}: {argument}="):
            make(**arguments)
    with pytest.raises(InputError, match=f"{make.__name__}: rank=33 is larger than min"):
        run(make(rank=33))


def test_arguments_of_one_face_are_refused_too():
    with pytest.raises(InputError, match="^slim_lora: saliency='gram'"):
        slim_lora(saliency="gram")
    with pytest.raises(InputError, match="^qera: passes=-1"):
        qera(passes=-1)
