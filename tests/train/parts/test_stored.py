"""Fine-tuning: what moves, what is read through a rounding, and that what was read is stored."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import sites
from lqec_jax.core.tree import combine, partition
from lqec_jax.core.types import ModelProblem, Windows
from lqec_jax.errors import InputError
from lqec_jax.models.decoder import init_params
from lqec_jax.train.losses import ModelLoss, NextToken
from lqec_jax.train.parts import Norms, Rest, StoredAdapters
from lqec_jax.train.parts.stored import Unrounded
from lqec_jax.train.steps import read_weight
from lqec_jax.trainings.finetune import CHOICES, finetune
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.sparse import Masked
from tests.train.tiny import make_config, make_plain_problem, training_of

TRAIN = 6
SETTINGS = {"optimizer": "adamw", "lr": 0.02, "decay": "cosine", "warmup": 2, "updates": 12,
            "batch": 2, "accumulate": 1, "patience": 0, "eval_every": 4}  # fmt: skip
PART = StoredAdapters().named("finetune")
PLAIN = make_plain_problem(windows=8, d=32)
KEEP = np.random.default_rng(0).random((1, 32, 32)) < 0.5


def with_leaves(change):
    params = jax.tree.map(jnp.asarray, PLAIN.params)
    return sites.map_model(params, PLAIN.fns.sites, lambda leaf, _: change(leaf))


def rounded(leaf):
    """Puts a mask around the base and the adapter into four bits."""
    adapter = leaf.corrections[0]
    few = QuantizedLowRank.round(adapter.a, adapter.b, bits=4, group_size=16)
    return replace(leaf, base=Masked.from_mask(leaf.base, KEEP), corrections=(few,))


def pose(params) -> ModelProblem:
    """Returns a problem without a teacher, whose text says what every token counts."""
    length = PLAIN.tokens.shape[1] - 1
    weights = np.full((8, length), 1 / length, np.float32)
    windows = Windows(PLAIN.tokens, TRAIN, weights)
    return PLAIN.pose(val=8 - TRAIN, params=params, windows=windows, teacher=None)


def loss_by_hand(params, tokens, weights) -> float:
    """Returns the weighted loss of rows by numpy, from the model's logits."""
    logits = PLAIN.fns.head(params, PLAIN.fns.hidden(params, tokens)[1])
    logits = np.asarray(logits, np.float64)[:, :-1]
    likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(likely, tokens[:, 1:, None], axis=-1)[..., 0]
    return float((nll * weights).sum(axis=1).mean())


@pytest.fixture(scope="module")
def through():
    return finetune(**SETTINGS).run(pose(with_leaves(rounded)))


def test_what_is_stored_is_what_was_trained(through):
    before = with_leaves(rounded)
    problem = pose(before)
    held = problem.windows.tokens[TRAIN:], problem.windows.weights[TRAIN:]
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
    opened = with_leaves(lambda leaf: PART.begin(rounded(leaf), jax.random.key(0)))
    nudged = jax.tree.map(lambda a: 1.03 * a if a.dtype == jnp.float32 else a, opened)
    reading = lambda leaf, _: read_weight((PART,), leaf)  # noqa: E731
    read = sites.map_model(nudged, PLAIN.fns.sites, reading)
    windows = pose(nudged).windows
    batch = {"tokens": windows.tokens[:2], "weights": windows.weights[:2]}

    def gradient(params):
        train, frozen = partition(params, "adapters")

        def loss(train):
            whole = sites.map_model(combine(train, frozen), PLAIN.fns.sites, reading)
            return ModelLoss((NextToken(),))(PLAIN.fns, whole, batch)[0]

        return jax.grad(loss)(train)

    for one, other in zip(*map(jax.tree.leaves, (gradient(nudged), gradient(read))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    trained, came = (p["blocks"][0]["mix"]["kernel"].corrections[0] for p in (nudged, read))
    assert isinstance(trained, Unrounded) and bool(jnp.any(trained.a != came.a))
    np.testing.assert_array_equal(came.a, trained.close().factors().a)


def test_scales_move_by_a_part_of_themselves_and_stay_what_they_were():
    before = with_leaves(lambda leaf: replace(leaf, corrections=()))
    settings = SETTINGS | {"train": "scales", "lr": 0.05, "updates": 8}
    solution = finetune(**settings).run(pose(before))
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
    solution = finetune(**settings).run(pose(before))
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
                partition(params, training_of(finetune(train=train)).moves)[0]
            )
        }
        for train in CHOICES
    }
    assert named["adapters"] == named["scales"] == named["scales+zeros"] == set()
    assert "['norm']['scale']" in named["adapters+norms"]
    assert "['blocks'][0]['attn_norm']['scale']" in named["adapters+norms"]
    assert all("norm" in name for name in named["adapters+norms"])
    assert {"['embed']['embedding']", "['head']['kernel']"} <= named["adapters+rest"]
    assert named["adapters+norms"] < named["adapters+rest"]


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
        finetune(**SETTINGS | changes)
    assert str(caught.value).startswith("finetune: ") and "\n" not in str(caught.value)


def test_adapters_that_are_not_there_are_asked_for():
    key = jax.random.key(0)
    bare = with_leaves(lambda leaf: replace(leaf, corrections=()))
    leaf = bare["blocks"][0]["mix"]["kernel"]
    with pytest.raises(InputError, match="no adapters; give rank=16 for new ones"):
        PART.begin(leaf, key)
    of_rank_3 = StoredAdapters(rank=3).named("finetune")
    new = of_rank_3.begin(leaf, key)
    assert new.corrections[0].rank == 3 and (new.corrections[0].b == 0).all()
    assert new.corrections[0].a.dtype == jnp.float16
    few = rounded(with_leaves(lambda leaf: leaf)["blocks"][0]["mix"]["kernel"])
    with pytest.raises(InputError, match="quantized adapters of rank 4; leave rank out"):
        of_rank_3.begin(few, key)


def test_without_a_gain_rounded_adapters_are_those_that_came_beside_what_others_put_in():
    few = rounded(with_leaves(lambda leaf: leaf)["blocks"][0]["mix"]["kernel"])
    begun = PART.begin(few, jax.random.key(0))
    other = replace(begun, base=few.base.inner)  # as a part before or after it may have left it
    for leaf, base in ((begun, few.base), (other, few.base.inner)):
        kept = PART.unmoved(leaf, few)
        assert kept.corrections is few.corrections and kept.base is base


def test_norms_and_the_rest_are_no_numbers_of_a_weight():
    leaf = with_leaves(lambda leaf: leaf)["blocks"][0]["mix"]["kernel"]
    assert Norms().count(leaf) == Rest().count(leaf) == 0
    assert PART.count(leaf) == PART.count(rounded(leaf)) == 4 * (32 + 32)
