"""`lqec methods`: the table of methods."""


def methods() -> None:
    """The table of methods that a recipe is made of."""
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
