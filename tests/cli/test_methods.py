"""`lqec methods` prints the table, all of it, and all that a method says of itself."""

import inspect

import pytest

from lqec_jax.cli import main
from lqec_jax.methods import METHODS, find_factory


def test_every_method_is_a_row_with_all_it_says(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "sees", "bits", "statistics", "paper", "idea"]
    rows = {line.split()[0]: line for line in lines[1:] if line.strip()}
    for name, method in METHODS.items():
        for cell in (method.scope, method.bits, method.statistics, method.paper, method.idea):
            assert cell in rows[name]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_every_argument_its_default_and_what_it_is(name, capsys):
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    for argument, parameter in inspect.signature(find_factory(name)).parameters.items():
        assert f"{argument}={parameter.default!r}" in out
        assert out.count(argument) >= 2, f"{argument} is not explained"


def test_an_unknown_method_is_one_line(capsys):
    assert main(["methods", "gtpq"]) == 2
    assert "unknown method 'gtpq'; did you mean 'gptq'?" in " ".join(
        capsys.readouterr().err.split()
    )
