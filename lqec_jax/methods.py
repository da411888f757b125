"""THE TABLE: every method, one line each. Adding a method is one file and one line here."""

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from lqec_jax.errors import InputError, did_you_mean


class Method(NamedTuple):
    """A row: where the factory lives, what it sees, and what `lqec methods` prints of it."""

    factory: str
    scope: str
    bits: str
    statistics: str
    paper: str
    idea: str


# fmt: off
METHODS = {
    "rtn": Method("lqec_jax.quantizers.rtn:rtn", "linear", "1-8", "none, or rms", "2210.17323", "round each weight to its group's uniform grid"),
    "svd": Method("lqec_jax.compensation.svd:svd", "linear", "-", "none", "Eckart-Young 1936", "the best rank-r correction of the weight error"),
    "rilq": Method("lqec_jax.compensation.rilq:rilq", "model", "-", "hidden states", "2412.01129", "train all adapters on one model-wise loss + next token"),
}
# fmt: on


def find_factory(name: str) -> Callable:
    """Imports a method's factory.

    Raises:
      InputError: no such method; names the nearest one.
    """
    if name not in METHODS:
        raise InputError(f"recipe: unknown method {name!r}{did_you_mean(name, METHODS)}")
    module, _, factory = METHODS[name].factory.partition(":")
    return getattr(import_module(module), factory)
