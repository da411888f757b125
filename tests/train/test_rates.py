"""How far an update moves: rates, their fall, and one optimizer for parts of several kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import Schedule
from lqec_jax.errors import InputError
from lqec_jax.train.parts import Adapters, Scales, Zeros
from lqec_jax.train.rates import (
    Rates,
    check_schedule,
    find_label,
    make_optimizer,
    times_value,
)
from lqec_kernels.formats import Affine, CompressedLinear, LowRank


def test_the_rate_rises_and_falls():
    def rates(**settings):
        rate = Rates(**settings).follow(1.0, 10)
        return [float(rate(n)) for n in range(11)]

    cosine = rates(warmup=4, decay="cosine")
    np.testing.assert_allclose(cosine[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert cosine[4:] == sorted(cosine[4:], reverse=True) and cosine[10] == pytest.approx(0)
    np.testing.assert_allclose(rates(warmup=0, decay="linear"), 1 - np.arange(11) / 10, atol=1e-6)
    assert rates(warmup=0.2, decay="constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 9)
    assert rates(last=0.05)[10] == pytest.approx(0.05)
    assert Rates(decay="constant").follow(0.5, 10) == 0.5


def test_steps_become_fractions_of_what_they_change():
    scales = {"s": jnp.array([1e-3, 1.0, -100.0])}
    optimizer = Rates(0.01, decay="constant").chain(0.01, 10, after=(times_value(),))
    step, _ = optimizer.update({"s": jnp.array([5.0, -1e-3, 1.0])}, optimizer.init(scales), scales)
    np.testing.assert_allclose(step["s"], [-1e-5, 0.01, -1.0], rtol=1e-3)


def test_decay_is_a_share_of_what_is_there_beside_adams_step():
    params = {"w": jnp.array([2.0, -4.0])}
    optimizer = Rates(decay="constant", weight_decay=0.1).chain(0.5, 10)
    step, _ = optimizer.update({"w": jnp.array([1.0, 1.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(step["w"], [-0.5 * 1.2, -0.5 * 0.6], rtol=1e-4)


def test_adafactor_clips_an_update_to_an_rms_of_one():
    params = {"w": jnp.ones((4, 4))}
    optimizer = Rates(decay="constant", optimizer="adafactor").chain(0.1, 10)
    step, _ = optimizer.update({"w": 1e3 * jnp.ones((4, 4))}, optimizer.init(params), params)
    assert float(jnp.sqrt(jnp.mean(step["w"] ** 2))) <= 0.1 * (1 + 1e-6)


def leaf_of() -> CompressedLinear:
    codes, scales = jnp.zeros((32, 8), jnp.uint8), jnp.full((1, 8), 0.5)
    base = Affine.from_codes(codes, scales, None, bits=2, group_size=32)
    base = Affine(base.codes, scales, jnp.ones((1, 8)), 2, 32, 32)
    return CompressedLinear(base, (LowRank(jnp.ones((32, 4)), jnp.ones((4, 8))),))


def test_each_part_moves_by_its_own_rate():
    """One update of Adam moves everything by its rate; of a scale, by that share of its value."""
    parts = (Scales(rates=Rates(0.01, "constant")), Zeros(rates=Rates(0.3, "constant")),
             Adapters(alpha=4.0, rates=Rates(0.02, "constant")))  # fmt: skip
    leaf = leaf_of()
    moving = jax.tree_util.tree_map_with_path(
        lambda path, array: array if find_label(parts, path, array) else None, leaf
    )
    assert moving.base.codes is None
    optimizer = make_optimizer(parts, 64, 10)
    moved, _ = optimizer.update(jax.tree.map(jnp.ones_like, moving), optimizer.init(moving), moving)
    np.testing.assert_allclose(moved.base.scales, -0.01 * 0.5, rtol=1e-4)
    np.testing.assert_allclose(moved.base.zeros, -0.3, rtol=1e-4)
    for array in jax.tree.leaves(moved.corrections):
        np.testing.assert_allclose(array, -0.02, rtol=1e-4)


def test_the_first_part_that_names_an_array_moves_it():
    (path,) = (path for path, _ in jax.tree_util.tree_leaves_with_path(leaf_of())
               if path[-1].name == "scales")  # fmt: skip
    parts = Scales(kind="mine"), Scales()
    assert find_label(parts, path, jnp.ones(3)) == "mine"
    assert find_label((Adapters(),), path, jnp.ones(3)) is None


def test_equal_parts_have_one_optimizer():
    make = lambda lr: make_optimizer((Scales(rates=Rates(lr)), Adapters()), 64, 7)  # noqa: E731
    assert make(0.1) is make(0.1) and make(0.1) is not make(0.2)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (Rates(optimizer="sgd"), "optimizer='sgd'"),
        (Rates(decay="stairs"), "decay='stairs'"),
        (Rates(-1.0), "clip_lr=-1.0; a number >= 0"),
        (Rates(weight_decay=-1.0), "weight_decay=-1.0"),
        (Rates(warmup=1.5), "warmup=1.5; a number from 0 to 1"),
        (Rates(warmup=-1), "warmup=-1; an integer >= 0"),
        (Rates(optimizer="adam", weight_decay=0.1), "optimizer='adam', which has none"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates, said):
    with pytest.raises(InputError, match="^a_method: ") as caught:
        rates.check("a_method", "clip_lr")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (Schedule(updates=0), "updates=0; an integer >= 1"),
        (Schedule(epochs=0), "epochs=0; an integer >= 1"),
        (Schedule(batch=0), "batch=0"),
        (Schedule(eval_every=0), "eval_every=0"),
        (Schedule(patience=-1), "patience=-1"),
        (Schedule(batch=8, accumulate=3), "batch=8 does not divide into accumulate=3"),
    ],
)
def test_schedules_that_cannot_be_are_refused(schedule, said):
    check_schedule("a_method", Schedule(epochs=2, batch=None, accumulate=None, eval_every=None))
    with pytest.raises(InputError, match="^a_method: ") as caught:
        check_schedule("a_method", schedule)
    assert said in str(caught.value)
