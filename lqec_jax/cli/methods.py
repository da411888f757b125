"""`lqec methods`: the table of methods, or all that one of them says of itself."""

from lqec_jax.cli.options import argument

Name = argument(str | None, "One method: its idea, arguments and defaults.")


def methods(name: Name = None) -> None:
    """The table of methods that a recipe is made of."""
    if name is None:
        _print_all()
    else:
        _print_one(name)


def _print_all() -> None:
    from lqec_jax.cli.printing import print_line, print_table
    from lqec_jax.methods import METHODS

    columns = ("method", "sees", "bits", "statistics", "paper", "idea")
    rows = [
        (name, row.scope, row.bits, row.statistics, row.paper, row.idea)
        for name, row in METHODS.items()
    ]
    print_table(columns, rows)
    print_line()
    print_line('A recipe chains them: "rtn(bits=2, group_size=64) | rilq(rank=16)".')
    print_line("`lqec methods NAME` says more of one.")


def _print_one(name: str) -> None:
    import inspect
    import sys

    from lqec_jax.cli.printing import print_line
    from lqec_jax.methods import find_factory

    factory = find_factory(name)
    defaults = {n: p.default for n, p in inspect.signature(factory).parameters.items()}
    print_line(f"{name}({', '.join(f'{n}={value!r}' for n, value in defaults.items())})")
    print_line()
    print_line(inspect.getdoc(sys.modules[factory.__module__]) or "")
    print_line()
    print_line(inspect.getdoc(factory) or "")
