"""Factories of steps: presets filled in, and the step told its arguments."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any

from lqec_jax.core.arguments import check_choice


def makes_step(
    *, presets: Mapping[str, Mapping[str, Any]] | None = None, order: str = ""
) -> Callable:
    """Decorates a factory of named arguments, whose step prints all of them.

    An argument that is left at None is what the preset has for it. The step's `arguments` are those
    that the factory was called with, but where it says others itself.

    Args:
      presets: name -> argument -> value; the factory's `preset` names one and is not printed.
      order: the arguments as they are printed, which is part of a run's fingerprint; as in the
        signature unless said.
    Raises:
      InputError: when the factory is called with a preset that is not there.
    """
    presets = presets or {}

    def decorate(factory: Callable) -> Callable:
        defaults = {name: p.default for name, p in signature(factory).parameters.items()}
        printed = order.split() or [name for name in defaults if name != "preset"]

        @wraps(factory)
        def make(**given: Any) -> Any:
            chosen = defaults | given
            if presets:
                check_choice(factory.__name__, "preset", chosen["preset"], presets)
                preset = presets[chosen["preset"]]
                chosen |= {name: v for name, v in preset.items() if chosen[name] is None}
            step = factory(**chosen)
            said = {name: step.arguments.get(name, chosen[name]) for name in printed}
            return replace(step, arguments=said)

        return make

    return decorate
