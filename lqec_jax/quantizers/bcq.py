"""Binary-coded quantization: a weight is a sum of scaled signs, group by group.

ŵ = Σ_{i<b} α_i B_i (+ z), the form that LUT-GEMM multiplies by, Park et al. 2022, arXiv:2206.09557;
the fit is that of Xu et al. 2018, arXiv:1802.00150: greedy on the residual, then in turns the least
squares of α given B and the nearest of the 2^b sums given α. Every uniform grid is such a sum,
exactly: α_i = s 2^(i-1), z = s ((2^b - 1)/2 - zero).

Reference: naver-aics/lut-gemm. Differs: the fit begins at an even grid too, and every group keeps
the best round it met; α is rounded to its stored dtype before B is chosen; the normal equations are
solved by elimination, not by conjugate gradients.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, resolve_group
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_jax.errors import InputError
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import Affine, CompressedLinear
from lqec_kernels.packing import unpack
from lqec_kernels.sparse import Masked

REFERENCE = "naver-aics/lut-gemm@f34d0df examples/bcq.py"

# Planes may coincide; a millionth of their square keeps the normal equations solvable.
RIDGE = 1e-6


def quantize(w, bits: int, group_size: int, *, starts=("greedy", "even"), rounds=15, shift=False,
             dtype=jnp.float16) -> BitPlanes:  # fmt: skip
    """Fits a sum of scaled signs to every group.

    min over α, z, B of Σ (w - Σ_i α_i B_i - z)²

    Args:
      w: float32 [d_in, d_out].
      bits: how many planes, 1-4.
      group_size: inputs that share their α; divides d_in.
      starts: of `STARTS`, where the rounds begin.
      rounds: of least squares and nearest sums after each start.
      shift: fits z too; without it, z is zero and nothing is stored.
      dtype: of α and z.
    Returns:
      For each group the fit with the least error among all rounds of all starts.
    Cost: `rounds` · (2^bits + bits²) passes over w a start, `bits` copies of it held.
      jit: yes; vmap: yes.
    """
    grouped = grids.group_rows(w, group_size)

    def attempt(state, factors):
        least, best, codes = state
        factors = store(factors, bits, dtype)
        codes = find_codes(grouped, factors, bits)
        error = measure(grouped, codes, factors, bits)
        best = jnp.where(error < least, factors, best)
        return jnp.minimum(error, least), best, codes

    def follow(state, start):
        state = attempt(state, start)
        return jax.lax.fori_loop(0, rounds, go_on, state), None

    def go_on(_, state):
        return attempt(state, fit_factors(grouped, state[2], bits, shift=shift))

    first = jnp.stack([STARTS[name](grouped, bits, shift=shift) for name in starts])
    nothing = (jnp.full(first.shape[2:], jnp.inf), first[0], jnp.zeros(grouped.shape, jnp.uint8))
    (_, factors, _), _ = jax.lax.scan(follow, nothing, first)
    codes = find_codes(grouped, factors, bits).reshape(w.shape)  # [d_in, d_out]
    shifts = factors[bits, :, 0].astype(dtype) if shift else None
    alphas = factors[:bits, :, 0].astype(dtype)
    return BitPlanes.from_signs(split_bits(codes, bits), alphas, shifts, group_size=group_size)


def start_greedily(w: jax.Array, bits: int, *, shift: bool) -> jax.Array:
    """Returns α_i = mean |r_i| of what the planes before it leave, and z: [bits + 1, G, 1, n]."""
    mean = jnp.mean(w, axis=1, keepdims=True)
    mean = mean if shift else jnp.zeros_like(mean)
    rest, factors = w - mean, []
    for _ in range(bits):
        factors.append(jnp.mean(jnp.abs(rest), axis=1, keepdims=True))
        rest = rest - jnp.where(rest >= 0, factors[-1], -factors[-1])
    return jnp.stack([*factors, mean])


def start_evenly(w: jax.Array, bits: int, *, shift: bool) -> jax.Array:
    """Returns the α of a uniform grid over the group's range, each half of the one before it."""
    mean = jnp.mean(w, axis=1, keepdims=True)
    mean = mean if shift else jnp.zeros_like(mean)
    largest = jnp.max(jnp.abs(w - mean), axis=1, keepdims=True)
    return jnp.stack([*(largest / 2.0 ** (i + 1) for i in range(bits)), mean])


STARTS = {"greedy": start_greedily, "even": start_evenly}


def fit_factors(w: jax.Array, codes: jax.Array, bits: int, *, shift: bool) -> jax.Array:
    """Returns the least squares α and z of given planes, [bits + 1, G, 1, n]."""
    terms = [jnp.where(codes >> i & 1, 1.0, -1.0) for i in range(bits)]
    if shift:
        terms.append(jnp.ones_like(w))

    def mean(array: jax.Array) -> jax.Array:
        return jnp.mean(array, axis=1, keepdims=True)

    gram = [[mean(a * b) + RIDGE * (a is b) for b in terms] for a in terms]
    solution = _solve(gram, [mean(a * w) for a in terms])
    return jnp.stack(solution if shift else [*solution, jnp.zeros_like(solution[0])])


def _solve(matrix: list[list[jax.Array]], right: list[jax.Array]) -> list[jax.Array]:
    """Solves many small positive definite systems at once; entries are arrays of one shape."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for k, pivot in enumerate(rows):
        for row in rows[k + 1 :]:
            factor = row[k] / pivot[k]
            row[k:] = [r - factor * p for r, p in zip(row[k:], pivot[k:], strict=True)]
    solution: list[jax.Array] = []
    for k in reversed(range(len(rows))):
        known = zip(rows[k][k + 1 : -1], solution, strict=True)
        solution.insert(0, (rows[k][-1] - sum(a * x for a, x in known)) / rows[k][k])
    return solution


def store(factors: jax.Array, bits: int, dtype) -> jax.Array:
    """Orders α from large to small, none negative, and rounds all to their stored values."""
    alphas = jnp.flip(jnp.sort(jnp.abs(factors[:bits]), axis=0), axis=0)
    factors = jnp.concatenate([alphas, factors[bits:]])
    return store_number(factors, dtype).astype(jnp.float32)


def level_of(code, factors: jax.Array, bits: int) -> jax.Array:
    """Returns z + Σ ±α_i, the sign of α_i being bit i of a code."""
    signs = [jnp.where(code >> i & 1, factors[i], -factors[i]) for i in range(bits)]
    return sum(signs, factors[bits])


def find_codes(w: jax.Array, factors: jax.Array, bits: int) -> jax.Array:
    """Returns which of the 2^b sums is nearest, uint8 [G, group, n]; the first of equal ones."""

    def compare(code, best):
        distance = jnp.abs(w - level_of(code, factors, bits))
        nearer = distance < best[0]
        return jnp.where(nearer, distance, best[0]), jnp.where(
            nearer, code.astype(jnp.uint8), best[1]
        )

    start = (jnp.full(w.shape, jnp.inf, jnp.float32), jnp.zeros(w.shape, jnp.uint8))
    return jax.lax.fori_loop(0, 2**bits, compare, start)[1]


def measure(w: jax.Array, codes: jax.Array, factors: jax.Array, bits: int) -> jax.Array:
    """Returns the squared error of every group, [G, 1, n]."""
    return jnp.sum(jnp.square(w - level_of(codes, factors, bits)), axis=1, keepdims=True)


def split_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Takes codes [d_in, d_out] apart into planes [bits, d_in, d_out] of ones and zeros."""
    return jnp.stack([codes >> i & 1 for i in range(bits)])


def recode(base: Affine) -> BitPlanes:
    """Writes a uniform grid as planes of signs: the same weight.

    u = Σ 2^i c_i with c_i = (B_i + 1)/2, so s (u - zero) = Σ s 2^(i-1) B_i + s ((2^b - 1)/2 - zero)

    Exact to float32 round-off; α keeps the scales' dtype, which loses the last place of a float16
    scale below 2^-13. The shifts are float32: between two levels, float16 has no place for them.
    """
    words, scales, zeros = base.columns()
    scales = scales.astype(jnp.float32)
    zeros = 2.0 ** (base.bits - 1) if zeros is None else zeros.astype(jnp.float32)
    alphas = jnp.stack([scales * 2.0 ** (i - 1) for i in range(base.bits)])
    alphas = store_number(alphas, base.scales.dtype)
    shifts = scales * ((2**base.bits - 1) / 2 - zeros)
    signs = split_bits(unpack(words, base.bits, base.d_in), base.bits)
    return BitPlanes.from_signs(signs, alphas, shifts, group_size=base.group_size)


def bcq(
    *,
    bits: int = 3,
    group_size: int | None = 64,
    init: str = "both",
    rounds: int = 15,
    shift: bool = False,
    scale_dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base by a sum of scaled signs; needs no data.

    Args:
      bits: 1-4 planes.
      group_size: must divide every d_in it meets; None is one group a column.
      init: where the fit begins: 'greedy', as the authors' does; 'even', at a uniform grid; 'both',
        for each group the better end, which lowers the error of Gaussian groups of 64 by 0.5, 7
        and 22 percent at 2, 3 and 4 bits. 'base' fits nothing: it rewrites a uniform base, that of
        `rtn`, `gptq` or another step before this one; the other arguments are not read.
      rounds: of the alternating fit; 15 is the authors' number.
      shift: fits a shift too, at as many bits as another α; without it levels are symmetric.
      scale_dtype: 'float16' or 'float32'.
    """
    check_choice("bcq", "init", init, ("both", *STARTS, "base"))
    check_int("bcq", "bits", bits, 1, 4)
    if group_size is not None:
        check_int("bcq", "group_size", group_size, 1)
    check_int("bcq", "rounds", rounds, 0)
    check_choice("bcq", "shift", shift, (True, False))
    check_choice("bcq", "scale_dtype", scale_dtype, ("float16", "float32"))
    arguments = {"bits": bits, "group_size": group_size, "init": init, "rounds": rounds,
                 "shift": shift, "scale_dtype": scale_dtype}  # fmt: skip

    def fit(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        w = base_target(leaf)
        group = resolve_group("bcq", group_size, w.shape[0])
        base = quantize(w, bits, group, starts=tuple(STARTS) if init == "both" else (init,),
                        rounds=rounds, shift=shift, dtype=jnp.dtype(scale_dtype))  # fmt: skip
        return replace_base(leaf, base)

    def rewrite(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        uniform = leaf.base.inner if isinstance(leaf.base, Masked) else leaf.base
        if not isinstance(uniform, Affine):
            raise InputError(
                f"bcq: init='base' rewrites a uniform base and found {type(uniform).__name__}; "
                "put a step such as rtn(...) before it, or leave init out"
            )
        return replace_base(leaf, recode(uniform))

    return LinearStep(
        name="bcq",
        run=rewrite if init == "base" else fit,
        arguments={"init": init} if init == "base" else arguments,
        objective=weight_error,
        objective_name="relative weight error",
    )
