"""The command line: parses, prints, and turns errors into exit codes; the work is `lqec_jax.api`'s.

Nothing here imports jax before a command that needs it runs.
"""

from lqec_jax.cli.app import main

__all__ = ["main"]
