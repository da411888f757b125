"""`python -m lqec_jax`: the command line without its script."""

import sys

from lqec_jax.cli import main

sys.exit(main())
