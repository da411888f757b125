"""The best rank-r correction of the weight error, blind to the inputs.

min over a, b of ||w - ŵ - a b||_F², solved by the truncated SVD (Eckart-Young 1936), under the
names that papers have for it: the start of LoftQ (arXiv:2310.08659); LQER (Zhang et al. 2024,
arXiv:2402.02446) before it weighs inputs, LoRC in ZeroQuant-V2 (arXiv:2303.08302); naive LoRA in
SLiM (Mozaffari et al. 2025, arXiv:2410.09615). They differ in the rank they are compared at, and in
the bits of the factors, for which `quantize_adapter` may follow.
"""

from collections.abc import Mapping
from typing import Any

import jax

from lqec_jax.core.closed_form import truncate
from lqec_jax.core.corrections import make_correction, store
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error

REFERENCE = "closed form"


def svd(*, rank: int | float = 64, dtype: str = "float16") -> LinearStep:
    """Makes the step that adds the rank-r approximation of what is still missing.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out).
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    return _make("svd", {"rank": rank, "dtype": dtype})


def lqer(*, rank: int | float = 64, dtype: str = "float16") -> LinearStep:
    """Makes the step of `svd` under LQER's name.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 32 at 4 bits, 256 at 2;
        LoRC's is 8.
      dtype: in which the factors are stored, 'float16' or 'float32'; the authors' is 8 bits.
    """
    return _make("lqer", {"rank": rank, "dtype": dtype})


def naive_lora(*, rank: int | float = 0.1, dtype: str = "float16") -> LinearStep:
    """Makes the step of `svd` with the rank that SLiM compares it at.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out).
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    return _make("naive_lora", {"rank": rank, "dtype": dtype})


def _make(name: str, arguments: Mapping[str, Any]) -> LinearStep:
    def solve(error: jax.Array, problem: LinearProblem, rank: int) -> tuple:
        return store(*truncate(error, rank), arguments["dtype"]), ()

    return make_correction(name, arguments, solve, weight_error, "relative weight error")
