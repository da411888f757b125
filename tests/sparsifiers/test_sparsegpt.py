"""SparseGPT: exact masks, and an error that those who prune blindly do not reach."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.masks import Sparsity, parse_sparsity
from lqec_jax.core.types import LinearProblem, LinearStats, output_error
from lqec_jax.errors import InputError
from lqec_jax.sparsifiers.magnitude import choose as choose_by_magnitude
from lqec_jax.sparsifiers.sparsegpt import prune, sparsegpt
from lqec_jax.sparsifiers.wanda import choose as choose_by_wanda
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from lqec_kernels.sparse import Masked, Sparse24

D_IN, D_OUT = 64, 24
RNG = np.random.default_rng(0)
W = RNG.standard_normal((D_IN, D_OUT))
X = RNG.standard_normal((400, D_IN)) @ (np.eye(D_IN) + 0.2 * RNG.standard_normal((D_IN, D_IN)))
X *= np.exp(0.5 * RNG.standard_normal(D_IN))
GRAM = X.T @ X / len(X)


def damp(gram: np.ndarray) -> np.ndarray:
    return gram + 0.01 * np.mean(np.diagonal(gram)) * np.eye(len(gram))


def sweep_right_looking(n: int | None, m: int, fraction: float) -> np.ndarray:
    """SparseGPT as published, float64; of every m inputs n stay, or of all m a share."""
    r = np.linalg.cholesky(np.linalg.inv(damp(GRAM))).T
    w, w_hat, keep = W.copy(), np.empty(W.shape), np.empty(W.shape, bool)
    for i in range(D_IN):
        if i % m == 0:
            score = (w[i : i + m] / np.diagonal(r)[i : i + m, None]) ** 2
            block = np.ones(score.shape, bool)
            if n is None:
                block.reshape(-1)[np.argsort(score.reshape(-1))[: int(fraction * score.size)]] = 0
            else:
                np.put_along_axis(block, np.argsort(score, axis=0)[: m - n], False, axis=0)
            keep[i : i + m] = block
        w_hat[i] = np.where(keep[i], w[i], 0)
        w[i:] -= np.outer(r[i, i:], (w[i] - w_hat[i]) / r[i, i])
    return w_hat


@lru_cache
def compiled(sparsity: Sparsity, grid: GroupGrid | None = None):
    return jax.jit(lambda w, gram: prune(w, gram, sparsity, grid=grid)[:2])


def solve(sparsity, grid=None, w=W, gram=GRAM) -> tuple[np.ndarray, np.ndarray]:
    """Returns (what the base says, what stays)."""
    made = compiled(parse_sparsity("m", sparsity), grid)
    base, keep = made(jnp.asarray(w, jnp.float32), jnp.asarray(gram, jnp.float32))
    return np.asarray(base.dense()), np.asarray(keep)


def loss(w_hat: np.ndarray, w=W, gram=GRAM) -> float:
    error = w - w_hat
    return np.sum(error * (gram @ error)) / np.sum(w * (gram @ w))


@pytest.mark.parametrize(("sparsity", "arguments"), [("2:4", (2, 4, 0.5)), (0.6, (None, 64, 0.6))])
def test_it_is_the_right_looking_form(sparsity, arguments):
    with jax.enable_x64(True):
        made = compiled(parse_sparsity("m", sparsity))
        base, keep = made(jnp.asarray(W), jnp.asarray(GRAM))
        came = np.asarray(base.w)
    assert came.dtype == np.float64
    wanted = sweep_right_looking(*arguments)
    np.testing.assert_array_equal(keep, wanted != 0)
    np.testing.assert_allclose(np.where(keep, came, 0), wanted, atol=1e-10)


def test_masks_are_exact_and_what_goes_is_zero():
    for sparsity, m in (("2:4", 4), (0.6, 64)):
        dense, keep = solve(sparsity)
        if m == 4:
            assert (keep.reshape(-1, 4, D_OUT).sum(1) == 2).all()
        else:
            assert (~keep).sum() == int(0.6 * W.size)
        np.testing.assert_array_equal(dense[~keep], 0)
        # What stays has moved.
        assert np.mean(np.abs(dense[keep] - W[keep]) > 1e-4) > 0.9


@pytest.mark.parametrize(("sparsity", "share"), [("2:4", 0.7), (0.6, 0.95)])
def test_it_loses_less_than_wanda_and_that_less_than_magnitude(sparsity, share):
    wanted = parse_sparsity("m", sparsity)
    reached = np.zeros(3)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal(W.shape)
        x = rng.standard_normal((300, D_IN)) @ (
            np.eye(D_IN) + 0.2 * rng.standard_normal(GRAM.shape)
        )
        x *= np.exp(0.5 * rng.standard_normal(D_IN))
        gram = x.T @ x / len(x)
        by_wanda = choose_by_wanda(jnp.asarray(w), jnp.sqrt(jnp.diagonal(gram)), wanted)
        by_size = choose_by_magnitude(jnp.asarray(w), wanted)
        pruned = (solve(sparsity, None, w, gram)[0], np.where(by_wanda, w, 0),
                  np.where(by_size, w, 0))  # fmt: skip
        reached += [loss(w_hat, w, gram) for w_hat in pruned]
    assert reached[0] < share * reached[1] and reached[1] < 0.95 * reached[2]


def run(step, leaf=None, gram=GRAM):
    stats = LinearStats(gram=jnp.asarray(gram, jnp.float32))
    problem = LinearProblem(jnp.asarray(W, jnp.float32), stats, jax.random.key(0))
    return problem, *jax.jit(step.run)(problem, leaf or CompressedLinear(Dense(problem.w)))


def test_jointly_rounded_two_of_four_take_three_bits():
    problem, leaf, facts = run(sparsegpt(sparsity="2:4", bits=4, group_size=16))
    assert isinstance(leaf.base, Sparse24) and isinstance(leaf.base.inner, Affine)
    assert leaf.bits_per_weight == 3 + (16 + 4 * 32 / D_OUT) / 16
    kept = np.asarray(leaf.base.kept())
    assert (kept.reshape(-1, 4, D_OUT).sum(1) == 2).all()
    alone = loss(solve("2:4")[0])
    assert alone < loss(np.asarray(leaf.dense())) < 1.3 * alone
    assert facts.rung == 0 and sparsegpt().notes(jax.device_get(facts)) == ()


@pytest.mark.parametrize("group_size", [16, None])
def test_jointly_rounded_weights_lie_on_their_grids(group_size):
    grid = GroupGrid(4, group_size)
    dense, keep = solve(0.6, grid)
    masked = np.where(keep, dense, 0)
    assert (~keep).sum() == int(0.6 * W.size)
    alone = loss(solve(0.6)[0])
    assert alone < loss(masked) < 1.5 * alone


def test_what_was_pruned_before_stays_pruned():
    before = np.asarray(RNG.random(W.shape) < 0.7)
    w = jnp.asarray(np.where(before, W, 0), jnp.float32)
    leaf = CompressedLinear(Masked.from_mask(Dense(w), jnp.asarray(before)))
    _, came, _ = run(sparsegpt(sparsity=0.6), leaf)
    dense = np.asarray(came.dense())
    np.testing.assert_array_equal(dense[~before], 0)
    assert (dense == 0).sum() == int(0.6 * W.size)


def test_dead_inputs_go_first_and_nothing_known_is_magnitude():
    dead = np.arange(D_IN) % 4 == 0
    x = X * ~dead
    _, keep = solve("2:4", gram=x.T @ x / len(x))
    assert not keep[dead].any()
    dense, keep = solve("2:4", gram=0 * GRAM)
    by_size = choose_by_magnitude(jnp.asarray(W, jnp.float32), parse_sparsity("m", "2:4"))
    np.testing.assert_array_equal(keep, by_size)
    np.testing.assert_array_equal(dense, np.where(keep, np.float32(W), 0))


def test_a_dense_weight_keeps_its_dtype():
    w = jnp.asarray(W, jnp.bfloat16)
    problem, leaf, _ = run(sparsegpt(sparsity="2:4"), CompressedLinear(Dense(w)))
    assert leaf.base.inner.w.dtype == jnp.bfloat16
    assert output_error(problem, leaf) < 1.1 * loss(solve("2:4")[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bits": 0}, "sparsegpt: bits=0"),
        ({"damp": 2.0}, "sparsegpt: damp=2.0; a number from 1e-06 to 1"),
        ({"sparsity": "1:1"}, "sparsegpt: sparsity='1:1'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError) as caught:
        sparsegpt(**arguments)
    assert str(caught.value).startswith(said)


def test_groups_and_patterns_have_to_fit():
    with pytest.raises(
        InputError, match="group_size=2 is not a multiple of the 4 of sparsity='2:4'"
    ):
        run(sparsegpt(sparsity="2:4", bits=4, group_size=2))
    with pytest.raises(InputError, match="sparsegpt: d_in=64 is not divisible by 6"):
        run(sparsegpt(sparsity="3:6"))
