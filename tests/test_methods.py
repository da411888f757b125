"""The table of methods."""

from inspect import signature

import pytest

from lqec_jax.core.types import LinearStep, TrainingStep
from lqec_jax.errors import InputError
from lqec_jax.methods import METHODS, find_factory

# Methods whose bits are an argument, as (lowest, highest); '2' alone is a width that is fixed.
WIDTHS = {
    name: tuple(map(int, row.bits.partition(",")[0].split("-")))
    for name, row in METHODS.items()
    if "-" in row.bits[1:]
}


@pytest.mark.parametrize("name", METHODS)
def test_a_row_tells_the_truth_about_its_step(name):
    row, step = METHODS[name], find_factory(name)()
    assert isinstance(step, LinearStep if row.scope == "linear" else TrainingStep)
    assert (step.name, step.scope) == (name, row.scope)
    assert set(step.arguments) <= set(signature(find_factory(name)).parameters)
    assert ("bits" in step.arguments) == (name in WIDTHS)
    assert step.objective_name
    if step.scope == "linear":
        assert step.objective is not None
    else:
        assert step.schedule.updates or step.schedule.epochs


@pytest.mark.parametrize("name", WIDTHS)
def test_the_bits_of_a_row_are_those_its_factory_takes(name):
    low, high = WIDTHS[name]
    for bits in (low, high):
        assert find_factory(name)(bits=bits).arguments["bits"] == bits
    for bits in (low - 1, high + 1):
        with pytest.raises(InputError, match=f"^{name}: bits={bits}"):
            find_factory(name)(bits=bits)


@pytest.mark.parametrize("name", ["RTN", "rtm", "", "__class__", "lqec_jax.quantizers.rtn:rtn"])
def test_an_unknown_method_is_refused(name):
    with pytest.raises(InputError, match="recipe: unknown method") as caught:
        find_factory(name)
    assert repr(name) in str(caught.value)


def test_the_nearest_method_is_named():
    with pytest.raises(InputError, match=r"unknown method 'rillq'; did you mean 'rilq'\?"):
        find_factory("rillq")
