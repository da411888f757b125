"""Factories of steps: presets fill what was left out, and a step prints all that made it."""

import pytest

from lqec_jax.core.factories import makes_step
from lqec_jax.core.types import LinearStep
from lqec_jax.errors import InputError

PRESETS = {"ours": {"lr": 0.1, "updates": 8}, "paper": {"lr": None, "updates": 2}}


@makes_step(presets=PRESETS, order="updates weight lr")
def method(*, lr=None, updates=None, weight=None, preset="ours") -> LinearStep:
    """Makes a step."""
    said = {} if weight else {"weight": 0.5}
    return LinearStep("method", lambda problem, leaf: (lr, updates), said)


@makes_step()
def plain(*, bits=2, groups=(1,)) -> LinearStep:
    return LinearStep("plain", print, {})


def test_what_is_left_out_is_the_preset_s_and_what_is_given_wins():
    assert method().run(None, None) == (0.1, 8)
    assert method(updates=3).run(None, None) == (0.1, 3)
    assert method(preset="paper").run(None, None) == (None, 2)
    with pytest.raises(InputError, match="method: preset='theirs'; one of 'ours', 'paper' was"):
        method(preset="theirs")


def test_a_step_prints_every_argument_in_order_and_what_it_says_itself():
    assert str(method(lr=0.2)) == "method(updates=8, weight=0.5, lr=0.2)"
    assert str(method(weight=0.7)) == "method(updates=8, weight=0.7, lr=0.1)"
    assert str(plain(groups=(2, 3))) == "plain(bits=2, groups=(2, 3))"


def test_it_keeps_the_factory_s_name_and_words():
    assert method.__name__ == "method" and method.__doc__ == "Makes a step."
    with pytest.raises(TypeError, match="unknown"):
        method(unknown=1)
