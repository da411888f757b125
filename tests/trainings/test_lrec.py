"""LREC: adapters trained together on what the teacher predicts, the packed base untouched."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lqec_jax.train.adapters import make_optimizer

from lqec_jax.core.closed_form import truncate
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.linear import linear
from lqec_jax.core.types import ModelProblem
from lqec_jax.errors import InputError
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview
from lqec_jax.train.fit import NoSession
from lqec_jax.train.update import init_state, make_update
from lqec_jax.trainings import lrec as module
from lqec_jax.trainings.lrec import NEW_RANK, TOKEN_SHARE, lrec, make_objective
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.compensation.toy import (
    FF,
    FNS,
    LENGTH,
    TEACHER,
    TOKENS,
    VOCAB,
    WINDOWS,
    D,
    compress,
    draw,
    kernels,
    numpy_log_probs,
)

TRAIN, RANK = 16, 4
TRAINING = {"rank": RANK, "updates": 60, "batch": 8, "eval_every": 20, "lr": 1e-2}
FORMS = (
    {"logits": "streamed"},
    {"logits": "top_k", "top_k": VOCAB},
    {"logits": "top_k", "top_k": 4},
)


def bare(w) -> CompressedLinear:
    return CompressedLinear(quantize(w, GroupGrid(2, 8)))


def with_svd(w) -> CompressedLinear:
    leaf = bare(w)
    return CompressedLinear(leaf.base, (LowRank(*truncate(w - leaf.dense(), RANK)),))


@pytest.fixture(scope="module")
def problem() -> ModelProblem:
    states = np.asarray(jax.jit(FNS.hidden)(TEACHER, TOKENS)[0])
    return ModelProblem(
        FNS, compress(bare), states, TOKENS[:TRAIN], TOKENS[TRAIN:], jax.random.key(7)
    )


@pytest.fixture(scope="module")
def trained(problem):
    return lrec(**TRAINING).run(problem)


def find_terms(problem, params) -> tuple[float, float]:
    """Returns KL a token and the next-token loss over the validation windows, in float64."""
    p = numpy_log_probs(problem.teacher[TRAIN:])
    q = numpy_log_probs(jax.jit(FNS.hidden)(params, problem.val)[0])
    nll = -np.take_along_axis(q[:, :-1], problem.val[:, 1:, None], axis=-1)
    return np.sum(np.exp(p) * (p - q), axis=-1).mean(), nll.mean()


def find_loss(problem, **arguments) -> float:
    """Returns the loss of the bare model over the validation windows."""
    objective = make_objective(problem, lrec(**arguments).arguments)
    batch = objective.batch(np.arange(TRAIN, WINDOWS))
    return float(jax.jit(objective.loss)(problem.params, batch)[0])


def test_the_loss_is_its_formula(problem):
    kl, nll = find_terms(problem, problem.params)
    weights = {"kl_weight": 0.5, "token_weight": 3.0}
    summed = 0.5 * LENGTH * kl + 3.0 * nll
    assert find_loss(problem, **weights) == pytest.approx(summed, rel=1e-5)
    mean = find_loss(problem, reduction="mean", **weights)
    assert mean == pytest.approx(summed / LENGTH, rel=1e-5)
    # Without a weight, the same beside every token's KL whatever the length.
    assert find_loss(problem) == pytest.approx(LENGTH * (kl + TOKEN_SHARE * nll), rel=1e-5)


def test_a_teacher_is_read_by_its_own_head(problem):
    outer = {"embed": TEACHER["embed"]}
    params = {**problem.params, "embed": 2 * TEACHER["embed"]}
    changed = dataclasses.replace(problem, params=params, outer=outer)
    objective = make_objective(changed, lrec(logits="streamed").arguments)
    found = objective.batch(np.arange(TRAIN))["teacher"].log_probs
    np.testing.assert_allclose(found, numpy_log_probs(problem.teacher[:TRAIN]), 2e-3, 1e-6)
    with pytest.raises(InputError, match="lrec: logits='recomputed' reads both models by one head"):
        make_objective(changed, lrec().arguments)


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_the_teacher_may_come_from_disk(problem, tmp_path, place):
    scratch = tmp_path / "scratch.bin"
    if place == "disk":
        problem = dataclasses.replace(problem, scratch=scratch)
    whole = find_loss(problem, token_weight=0.0)
    losses = []
    for form in FORMS:
        losses.append(find_loss(problem, token_weight=0.0, **form))
        if place == "disk":
            each = lrec(**form).scratch_bytes(VOCAB)
            assert scratch.stat().st_size == WINDOWS * LENGTH * each
    streamed, every, few = losses
    assert streamed == pytest.approx(whole, rel=1e-3)
    assert every == pytest.approx(whole, rel=1e-5)
    assert 0.3 * whole < few < 0.99 * whole
    assert lrec().scratch_bytes(VOCAB) == 0


def test_training_brings_the_predictions_nearer(problem, trained):
    (before, _), (after, _) = (find_terms(problem, p) for p in (problem.params, trained.params))
    assert after < 0.6 * before
    assert trained.history[0].val_loss == pytest.approx(
        LENGTH * (before + TOKEN_SHARE * find_terms(problem, problem.params)[1]), rel=1e-5
    )
    best = min(trained.history, key=lambda point: point.val_loss)
    assert trained.best_update == best.update > 0
    for path, leaf in kernels(trained.params).items():
        (adapter,) = leaf.corrections
        assert adapter.a.dtype == adapter.b.dtype == jnp.float16
        bases = leaf.base, kernels(problem.params)[path].base
        for new, old in zip(*map(jax.tree.leaves, bases), strict=True):
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_the_next_token_loss_alone_is_learned_without_a_teacher(problem):
    # Validation on the training text: what is random cannot be predicted, only remembered.
    known = dataclasses.replace(
        problem, train=TOKENS[:8], val=TOKENS[:8],
        teacher=np.concatenate([problem.teacher[:8]] * 2),
    )  # fmt: skip
    solution = lrec(**TRAINING, kl_weight=0.0, token_weight=1.0).run(known)
    assert solution.history[-1].val_loss < solution.history[0].val_loss - 0.3


def test_what_is_left_out_gets_no_adapter_and_keeps_the_one_it_has(problem):
    few = {**TRAINING, "updates": 4, "eval_every": 2, "leave_out": ("down",)}
    shapes = {"up": (D, FF), "down": (FF, D)}
    solution = lrec(**few).run(problem)
    assert solution.best_update > 0
    leaves = kernels(solution.params)
    assert (len(leaves["up"].corrections), len(leaves["down"].corrections)) == (1, 0)
    recipe = f"rtn(bits=2, group_size=8) | lrec(rank={RANK}, leave_out=('down',))"
    for path, leaf in preview(FNS, shapes, parse_recipe(recipe)).items():
        assert leaf.bits_per_weight == leaves[path].bits_per_weight
    warm = dataclasses.replace(problem, params=compress(with_svd))
    solution = lrec(**few).run(warm)
    assert solution.best_update > 0
    before, after = kernels(warm.params), kernels(solution.params)
    assert np.abs(after["up"].dense() - before["up"].dense()).max() > 1e-3
    for new, old in zip(*map(jax.tree.leaves, (after["down"], before["down"])), strict=True):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    with pytest.raises(InputError, match="lrec: leave_out names no linear.*'dwn'; did you mean"):
        preview(FNS, shapes, parse_recipe("lrec(leave_out=('dwn',))"))


def test_a_new_adapter_has_the_authors_rank_unless_one_is_there(problem):
    with pytest.raises(InputError, match=f"lrec: rank={NEW_RANK} is larger than min"):
        lrec().run(problem)
    warm = dataclasses.replace(problem, params=compress(with_svd))
    seen = jax.eval_shape(lrec().preview, jax.eval_shape(lambda: kernels(warm.params)["up"]))
    assert seen.corrections[0].rank == RANK


@pytest.mark.parametrize("rank", [2, 4])
def test_coupled_decay_is_that_of_the_published_factors(rank):
    alpha, decay, lr, updates = 8.0, 0.3, 1e-2, 4
    w, a, b = draw(D, FF), draw(D, rank, seed=1), draw(rank, FF, seed=2)
    x, y = draw(32, D, seed=3), draw(32, FF, seed=4)

    def lower(answer):
        return jnp.mean(jnp.square(answer - y))

    settings = lrec(rank=rank, alpha=alpha, lr=lr, weight_decay=decay, coupled=True,
                    decay="constant").arguments  # fmt: skip
    optimizer = make_optimizer(settings, width=64)
    params = {"w": CompressedLinear(Dense(w), (LowRank(a, alpha / rank * b),))}
    update = make_update(lambda p, x: (lower(linear(x, p["w"])), {}), optimizer)
    state = init_state(params, optimizer)

    published = optax.chain(optax.add_decayed_weights(decay), optax.adam(lr))
    factors = (jnp.asarray(a), jnp.asarray(b))
    theirs = published.init(factors)

    @jax.jit
    def update_published(factors, theirs):
        loss = lambda f: lower(x @ w + alpha / rank * ((x @ f[0]) @ f[1]))  # noqa: E731
        changes, theirs = published.update(jax.grad(loss)(factors), theirs, factors)
        return optax.apply_updates(factors, changes), theirs

    for _ in range(updates):
        state, _ = update(state, x)
        factors, theirs = update_published(factors, theirs)
    came = state.params["w"].corrections[0]
    np.testing.assert_allclose(came.a, factors[0], atol=1e-5)
    np.testing.assert_allclose(came.b, alpha / rank * factors[1], atol=1e-5)
    assert np.abs(came.a - a).max() > 1e-2


class Kept(NoSession):
    """Keeps training state, and fails before one update."""

    def __init__(self, fails_at: int):
        self.saved, self.fails_at = None, fails_at

    def restore(self, like):
        return self.saved

    def save(self, update, arrays, facts):
        self.saved = jax.tree.map(jnp.copy, arrays), dict(facts)

    def progress(self, done, total, message):
        if done == self.fails_at:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(problem, tmp_path):
    step = lrec(**{**TRAINING, "updates": 8, "eval_every": 2}, logits="top_k", top_k=8)
    problem = dataclasses.replace(problem, scratch=tmp_path / "scratch.bin")
    wanted = step.run(problem)
    assert wanted.best_update == 8
    session = Kept(fails_at=6)
    with pytest.raises(KeyboardInterrupt):
        step.run(dataclasses.replace(problem, session=session))
    assert session.saved[1]["history"][-1][0] == 4
    (tmp_path / "scratch.bin").write_bytes(b"not whole")  # it is written again
    session.fails_at = None
    resumed = step.run(dataclasses.replace(problem, session=session))
    assert resumed.history == wanted.history
    for new, old in zip(*map(jax.tree.leaves, (resumed.params, wanted.params)), strict=True):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_the_papers_settings():
    arguments = lrec(preset="paper").arguments
    paper = {"rank": 32, "alpha": 128.0, "lr": 3e-5, "batch": 7, "weight_decay": 1e-5,
             "coupled": True, "decay": "constant", "kl_weight": 1.0, "token_weight": 120.0,
             "reduction": "sum", "leave_out": ("mlp/down",), "patience": 0}  # fmt: skip
    assert {name: arguments[name] for name in paper} == paper
    assert arguments["updates"] == 10 * (10_000 // 7)
    four = lrec(preset="paper", lr=1e-5, token_weight=10, leave_out=()).arguments
    assert four == arguments | {"lr": 1e-5, "token_weight": 10, "leave_out": ()}
    assert lrec().arguments == lrec(preset="ours").arguments
    assert set(module.PAPER) == set(module.OURS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 0}, "rank=0"),
        ({"reduction": "batchmean"}, "reduction='batchmean'; one of 'sum', 'mean'"),
        ({"logits": "cached"}, "logits='cached'; one of 'recomputed', 'streamed', 'top_k'"),
        ({"top_k": 0}, "top_k=0"),
        ({"token_weight": -1.0}, "token_weight=-1.0"),
        ({"coupled": 1}, "coupled=1; one of True, False"),
        ({"leave_out": "mlp/down"}, "leave_out='mlp/down'; paths such as ('mlp/down',)"),
        ({"preset": "theirs"}, "preset='theirs'; one of 'ours', 'paper'"),
    ],
)
def test_other_arguments_are_refused(arguments, said):
    with pytest.raises(InputError, match="^lrec: ") as caught:
        lrec(**arguments)
    assert said in str(caught.value)


def test_more_likeliest_tokens_than_there_are_is_refused(problem):
    with pytest.raises(InputError, match=r"lrec: top_k=64 is more than the vocabulary of 20"):
        lrec(**TRAINING, logits="top_k").run(problem)
