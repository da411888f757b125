"""`lqec methods` prints the table, all of it."""

from lqec_jax.cli import main
from lqec_jax.methods import METHODS


def test_every_method_is_a_row_with_all_it_says(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "sees", "bits", "statistics", "paper", "idea"]
    rows = {line.split()[0]: line for line in lines[1:] if line.strip()}
    for name, method in METHODS.items():
        for cell in (method.scope, method.bits, method.statistics, method.paper, method.idea):
            assert cell in rows[name]
