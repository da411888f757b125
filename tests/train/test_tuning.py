"""Fine-tuning: what moves, what is read through a rounding, and that what was read is stored."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lqec_jax.train.adapters import map_linears
from lqec_jax.train.tuning import Tuning, make_rate, make_selection, tune

from lqec_jax.core.tree import combine, get_at, partition
from lqec_jax.errors import InputError
from lqec_jax.models.decoder import init_params
from lqec_jax.train import tuning
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.sparse import Masked
from tests.train.tiny import make_config, make_plain_problem

TRAIN = 6
SETTINGS = {"rank": None, "train": "adapters", "optimizer": "adamw", "lr": 0.02, "decay": "cosine",
            "warmup": 2, "updates": 12, "batch": 2, "accumulate": 1, "weight_decay": 0.0,
            "patience": 0, "eval_every": 4, "dtype": "float16"}  # fmt: skip
PLAIN = make_plain_problem(windows=8, d=32)
KEEP = np.random.default_rng(0).random((1, 32, 32)) < 0.5


def with_leaves(change):
    params = jax.tree.map(jnp.asarray, PLAIN.params)
    return map_linears(PLAIN.fns, params, lambda leaf, _: change(leaf))


def rounded(leaf):
    """Puts a mask around the base and the adapter into four bits."""
    adapter = leaf.corrections[0]
    few = QuantizedLowRank.round(adapter.a, adapter.b, bits=4, group_size=16)
    return replace(leaf, base=Masked.from_mask(leaf.base, KEEP), corrections=(few,))


def pose(params, **changes) -> Tuning:
    weights = np.full((8, PLAIN.tokens.shape[1] - 1), 1 / (PLAIN.tokens.shape[1] - 1), np.float32)
    facts = {"fns": PLAIN.fns, "params": params, "tokens": PLAIN.tokens, "weights": weights,
             "train": TRAIN, "width": 32, "key": jax.random.key(0)}  # fmt: skip
    return Tuning(**(facts | changes))


def loss_by_hand(params, tokens, weights) -> float:
    """Returns the weighted loss of rows by numpy, from the model's logits."""
    logits = PLAIN.fns.head(params, PLAIN.fns.hidden(params, tokens)[1])
    logits = np.asarray(logits, np.float64)[:, :-1]
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(likely, tokens[:, 1:, None], axis=-1)[..., 0]
    return float((nll * weights).sum(axis=1).mean())


@pytest.fixture(scope="module")
def through():
    return tune("finetune", pose(with_leaves(rounded)), SETTINGS)


def test_what_is_stored_is_what_was_trained(through):
    before = with_leaves(rounded)
    problem = pose(before)
    held = problem.tokens[TRAIN:], problem.weights[TRAIN:]
    losses = {point.update: point.val_loss for point in through.history}
    assert losses[0] == pytest.approx(loss_by_hand(before, *held), rel=1e-5)
    best = losses[through.best_update]
    assert best == pytest.approx(loss_by_hand(through.params, *held), rel=1e-5)
    assert best < losses[0] - 0.02
    count = sum(4 * (32 + 32) for _ in range(2))
    assert through.notes[0] == (
        f"trained: the adapters alone, {count} numbers; adapters are quantized, and were trained "
        "through their rounding"
    )


def test_nothing_but_adapters_moves_and_zeros_stay(through):
    before = with_leaves(rounded)
    assert jax.tree.structure(through.params) == jax.tree.structure(before)
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(p) for p in (before, through.params)),
                strict=True)  # fmt: skip
    for (path, was), (_, now) in pairs:
        assert was.dtype == now.dtype
        moved = "corrections" in jax.tree_util.keystr(path)
        assert bool(jnp.any(was != now)) == moved, path
    for segment in through.params["blocks"]:
        assert (np.asarray(segment["mix"]["kernel"].base.dense())[~KEEP] == 0).all()


def test_a_rounding_passes_gradients_unchanged():
    opened, roundings = tuning.open_adapters(PLAIN.fns, with_leaves(rounded))
    nudged = jax.tree.map(lambda a: 1.03 * a if a.dtype == jnp.float32 else a, opened)
    read = tuning.round_through(PLAIN.fns, nudged, roundings)
    problem = pose(nudged)
    batch = {"tokens": problem.tokens[:2], "weights": problem.weights[:2]}

    def gradient(params, roundings):
        train, frozen = partition(params, "adapters")
        objective = tuning._make_objective(problem, roundings, None)
        return jax.grad(lambda t: objective.loss(combine(t, frozen), batch)[0])(train)

    came, wanted = gradient(nudged, roundings), gradient(read, {})
    for one, other in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    leaves = [p["blocks"][0]["mix"]["kernel"].corrections[0] for p in (nudged, read)]
    assert bool(jnp.any(leaves[0].a != leaves[1].a))
    again = tuning.round_adapter(leaves[0], roundings[0][0]).factors()
    np.testing.assert_array_equal(leaves[1].a, again.a)


def test_scales_move_by_a_part_of_themselves_and_stay_what_they_were():
    before = with_leaves(lambda leaf: replace(leaf, corrections=()))
    settings = SETTINGS | {"train": "scales", "lr": 0.05, "updates": 8}
    solution = tune("finetune", pose(before), settings)
    losses = [point.val_loss for point in solution.history]
    assert solution.best_update and min(losses) < losses[0] - 0.01
    pairs = zip(*(jax.tree_util.tree_leaves_with_path(p) for p in (before, solution.params)),
                strict=True)  # fmt: skip
    for (path, was), (_, now) in pairs:
        assert was.dtype == now.dtype
        assert bool(jnp.any(was != now)) == jax.tree_util.keystr(path).endswith(".scales")


def test_the_rest_can_move_too_by_adafactor():
    before = with_leaves(lambda leaf: leaf)
    settings = SETTINGS | {"train": "adapters+rest", "optimizer": "adafactor", "decay": "linear",
                           "updates": 4}  # fmt: skip
    solution = tune("finetune", pose(before), settings)
    assert solution.best_update == 4
    for name in ("embed", "head"):
        assert bool(jnp.any(before[name] != solution.params[name]))
    assert solution.notes[0].startswith("trained: adapters, norms, biases, embedding and head, ")


def test_what_each_choice_selects():
    params = jax.eval_shape(lambda: init_params(make_config(), jax.random.key(0)))
    named = {
        train: {
            jax.tree_util.keystr(path)
            for path, _ in jax.tree_util.tree_leaves_with_path(
                partition(params, make_selection(train))[0]
            )
        }
        for train in tuning.CHOICES
    }
    assert named["adapters"] == named["scales"] == set()
    assert "['norm']['scale']" in named["adapters+norms"]
    assert "['blocks'][0]['attn_norm']['scale']" in named["adapters+norms"]
    assert all("norm" in name for name in named["adapters+norms"])
    assert {"['embed']['embedding']", "['head']['kernel']"} <= named["adapters+rest"]
    assert named["adapters+norms"] < named["adapters+rest"]


def test_the_rate_rises_and_falls():
    def rates(**changes):
        rate = make_rate(1.0, SETTINGS | {"updates": 10} | changes)
        return [float(rate(n)) for n in range(11)]

    cosine = rates(warmup=4, decay="cosine")
    np.testing.assert_allclose(cosine[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert cosine[4:] == sorted(cosine[4:], reverse=True) and cosine[10] == pytest.approx(0)
    np.testing.assert_allclose(rates(warmup=0, decay="linear"), 1 - np.arange(11) / 10, atol=1e-6)
    assert rates(warmup=0.2, decay="constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "everything"}, "one of 'adapters', 'scales'"),
        ({"optimizer": "sgd"}, "one of 'adamw'"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "which has none"),
        ({"warmup": 1.5}, "a number from 0 to 1"),
        ({"warmup": -1}, "an integer >= 0"),
        ({"batch": 4, "accumulate": 3}, "choose a divisor"),
        ({"rank": 0}, "an integer >= 1"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        tuning.check_settings("finetune", SETTINGS | changes)
    assert str(caught.value).startswith("finetune: ") and "\n" not in str(caught.value)


def test_adapters_that_are_not_there_are_asked_for():
    bare = get_at(with_leaves(lambda leaf: replace(leaf, corrections=())), "blocks")[0]
    leaf = bare["mix"]["kernel"]
    with pytest.raises(InputError, match="no adapters; give rank=16 for new ones"):
        tuning.begin("finetune", leaf, SETTINGS, jax.random.key(0))
    new = tuning.begin("finetune", leaf, SETTINGS | {"rank": 3}, jax.random.key(0))
    assert new.corrections[0].rank == 3 and (new.corrections[0].b == 0).all()
    few = rounded(get_at(with_leaves(lambda leaf: leaf), "blocks")[0]["mix"]["kernel"])
    with pytest.raises(InputError, match="quantized adapters of rank 4; leave rank out"):
        tuning.begin("finetune", few, SETTINGS | {"rank": 3}, jax.random.key(0))
    assert tuning.begin("finetune", few, SETTINGS, jax.random.key(0)) is few
