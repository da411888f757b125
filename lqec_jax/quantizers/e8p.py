"""E8P: vectors of eight weights rounded to a lattice, each vector making up for those before it.

Tseng et al. 2024, arXiv:2402.04396 (QuIP#). Both sides of the weight are rotated (`rotations`),
then tr(Δᵀ G Δ), Δ = w - ŵ, G the rotated gram, is lowered by a sweep over blocks of eight inputs
(`core.ldlq`), each rounded to ŵ_k = s · (nearest of 65,536 points of E8P to target_k / s), found
exactly. s is one number a weight. At 3 and 4 bits what E8P leaves over is rounded again, to 256
points of E8 or to E8P:

    bits                            2        3        4
    squared error of N(0, 1)   0.0913   0.0295   0.0083

Reference: closed form; written from the paper's equations, its code was not used. Differs: the last
29 of E8P's patterns are our choice (see `lqec_kernels.lattice`), so are the scales, each where the
squared error of normal weights is least (at 4 bits 0.9 and 1/3.9, where the paper's 1.03 and 1/3.45
give 0.0096); a later pass over the blocks keeps a vector's old point where the new one is worse;
the weight is not rescaled by channel before, and nothing is fine-tuned after: `rilq` may follow.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lqec_jax.core import damping
from lqec_jax.core.arguments import check_int, check_number
from lqec_jax.core.bases import base_target, inner_gram, kept, replace_base
from lqec_jax.core.ldlq import ldlq
from lqec_jax.core.rotations import largest_block, rotate_inputs, rotate_outputs
from lqec_jax.core.types import LinearProblem, LinearStep, output_error
from lqec_jax.errors import InputError
from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.sums import Sum
from lqec_kernels.tables import find_table

REFERENCE = "closed form"
DIM = 8
# bits -> (lattice units in the weight's rms, what comes after E8P: table and how much finer it is).
STAGES = {2: (1.03, None), 3: (0.98, ("e8", 2.04)), 4: (0.9, ("e8p", 3.9))}


def round_to_lattice(y: jax.Array, bits: int) -> tuple[jax.Array, tuple]:
    """Returns the points nearest to vectors y [8, m] in lattice units, and their codes.

    Each of the codes is uint32 [1, m], one for E8P and at more than 2 bits one for what it leaves.
    """
    table = find_table("e8p")
    first = table.encode(y[None])
    point = table.decode(first)[0]
    after = STAGES[bits][1]
    if after is None:
        return point, (first,)
    table, finer = find_table(after[0]), after[1]
    second = table.encode((y - point)[None] * finer)
    return point + table.decode(second)[0] / finer, (first, second)


def quantize(w, gram, bits: int, *, damp=0.01, passes=0, keep=None) -> tuple:
    """Rounds a weight's blocks of eight inputs to the lattice so that its output error is small.

    Args:
      w: float32 [d_in, d_out], already rotated.
      gram: E[x xᵀ] of the rotated inputs, float32 [d_in, d_in], whatever its rank.
      bits: 2, 3 or 4.
      damp: of the gram, in units of its mean diagonal.
      passes: over all blocks after the sweep, see `_refine`.
      keep: bool [d_in, d_out]; other weights are zero in ŵ, whatever their codes. None keeps all.
    Returns:
      (Codebook, or at more than 2 bits a Sum of two; facts of the damping).
    Raises:
      InputError: d_in is no multiple of 8.
    Cost: d_in³/3 + (1 + passes) · d_in² · d_out multiply-adds and 8192 operations a vector; holds
      the gram and two more of its size, w and the errors.  jit: yes.
    """
    d_in = w.shape[0]
    if d_in % DIM:
        raise InputError(
            f"e8p: d_in={d_in} is no multiple of {DIM}; quantize this weight by another"
        )
    lower, facts = damping.factor_reverse(gram, damp)
    rms = jnp.sqrt(jnp.mean(jnp.square(w)))
    scale = rms / STAGES[bits][0]
    unit = jnp.where(scale > 0, scale, 1.0)

    def quantize_block(target: jax.Array, number: jax.Array):
        point, codes = round_to_lattice(target / unit, bits)
        w_hat = scale * point
        if keep is not None:
            w_hat = jnp.where(lax.dynamic_slice_in_dim(keep, number * DIM, DIM), w_hat, 0.0)
        return w_hat, (w_hat, codes)

    w_hat, codes = ldlq(w, lower, quantize_block, DIM)
    state = (w - w_hat.reshape(w.shape), codes)  # [d_in, d_out]
    if passes:
        state = _refine(w, lower, state, quantize_block, passes)
    codes = [code[:, 0] for code in state[1]]  # [d_in / 8, d_out]
    return _pack(codes, scale, bits, d_in), facts


def _refine(w, lower, state: tuple, quantize_block, passes: int) -> tuple:
    """Rounds each block anew with all the others as they are, `passes` times around at most.

    With H = Lᵀ L and the errors Δ, block k is best at t_k = ŵ_k + H_kk⁻¹ Σ_j H_kj Δ_j, and any ŵ_k
    costs (t_k - ŵ_k)ᵀ H_kk (t_k - ŵ_k) more: a column takes the new point only where that is less.
    A pass that changes nothing is the last.
    """
    gram = jnp.matmul(lower.T, lower, precision="highest")
    blocks = jnp.arange(w.shape[0]).reshape(-1, DIM)  # [blocks, 8]
    inverses = jnp.linalg.inv(gram[blocks[:, :, None], blocks[:, None]])

    def step(number: jax.Array, state: tuple) -> tuple:
        errors, codes, changed = state
        first = number * DIM
        across = lax.dynamic_slice_in_dim(gram, first, DIM)  # [8, d_in]
        own = lax.dynamic_slice_in_dim(across, first, DIM, axis=1)  # [8, 8]
        rows, old = (lax.dynamic_slice_in_dim(a, first, DIM) for a in (w, errors))
        pull = jnp.matmul(across, errors, precision="highest")
        target = rows - old + jnp.matmul(inverses[number], pull, precision="highest")
        w_hat, (_, new_codes) = quantize_block(target, number)

        def cost(w_hat: jax.Array) -> jax.Array:
            miss = target - w_hat
            return jnp.sum(miss * jnp.matmul(own, miss, precision="highest"), axis=0)

        better = cost(w_hat) < cost(rows - old)  # [d_out]
        error = jnp.where(better, rows - w_hat, old)
        codes = jax.tree.map(
            lambda kept, new: kept.at[number].set(jnp.where(better, new, kept[number])),
            codes, new_codes,
        )  # fmt: skip
        errors = lax.dynamic_update_slice_in_dim(errors, error, first, 0)
        return errors, codes, changed | better.any()

    def once_around(state: tuple) -> tuple:
        done, _, errors, codes = state
        start = (errors, codes, jnp.bool(False))
        errors, codes, changed = lax.fori_loop(0, len(blocks), step, start)
        return done + 1, changed, errors, codes

    start = (jnp.int32(0), jnp.bool(True), *state)
    return lax.while_loop(lambda s: (s[0] < passes) & s[1], once_around, start)[2:]


def _pack(codes: list[jax.Array], scale: jax.Array, bits: int, d_in: int) -> Codebook | Sum:
    def pack(code: jax.Array, table: str, scale: jax.Array) -> Codebook:
        return Codebook.from_codes(code, scale[None, None], table=table, group_size=d_in, d_in=d_in)

    first, *second = codes
    base = pack(first, "e8p", scale)
    if not second:
        return base
    table, finer = STAGES[bits][1]
    return Sum(base, pack(second[0], table, scale / finer))


def e8p(*, bits: int = 2, damp: float = 0.01, passes: int = 10) -> LinearStep:
    """Makes the step that rotates both sides and rounds to E8P with error feedback.

    Rotations that are there already, from `hadamard`, are taken as they are.

    Args:
      bits: 2, 3 or 4.
      damp: first rung of the ladder, in units of the gram's mean diagonal. The authors' is 0.01.
      passes: at most so many over all blocks after the sweep, each as long as the sweep; 10 is the
        authors'. On a model of 1M parameters they take the perplexity at 2 bits from 6.8 to 4.5.
    """
    check_int("e8p", "bits", bits, 2, 4)
    check_number("e8p", "damp", damp, 1e-6, 1.0)
    check_int("e8p", "passes", passes, 0)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> tuple:
        input_key, output_key = jax.random.split(problem.key)
        block = largest_block("e8p", "d_in", leaf.d_in)
        leaf = rotate_inputs("e8p", leaf, input_key, block)
        block = largest_block("e8p", "d_out", leaf.d_out)
        leaf = rotate_outputs("e8p", leaf, output_key, block)
        gram = inner_gram(problem, leaf)
        base, facts = quantize(
            base_target(leaf), gram, bits, damp=damp, passes=passes, keep=kept(leaf)
        )
        return replace_base(leaf, base), facts

    return LinearStep(
        name="e8p",
        run=run,
        arguments={"bits": bits, "damp": damp, "passes": passes},
        needs=frozenset({"gram"}),
        notes=damping.describe,
        objective=output_error,
        objective_name="relative output error",
    )
