"""What a teacher predicts of every token, written once where it is not to be computed anew.

A file of log-probabilities in float16 takes 2 bytes a token and vocabulary entry (10 GB for 320
windows of 512 tokens and 32000 entries); the k likeliest tokens and the mass of the others take
8 k + 4 bytes a token, and their KL is a lower bound of the whole one.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.disk import make_array
from lqec_jax.core.types import ModelProblem, Params
from lqec_jax.core.walking import cut_rows
from lqec_jax.errors import InputError
from lqec_jax.train.vocabulary import LogProbs, TopK, find_log_probs, find_top


def bytes_of(logits: str, k: int, vocab: int) -> int:
    """Returns what is kept on disk of one token; nothing where predictions are recomputed."""
    if logits == "streamed":
        return 2 * vocab
    return _top_dtype(k).itemsize if logits == "top_k" else 0


def write_log_probs(problem: ModelProblem) -> Callable[[np.ndarray], LogProbs]:
    """Writes every token's log-probabilities; returns window numbers -> LogProbs.

    Log-probabilities and not logits: float16 keeps those near zero best, the likely ones.
    """
    fns = problem.fns
    kept = _keep(problem, np.dtype(np.float16), (_head_width(problem),))
    least = float(np.finfo(np.float16).min)

    def find(params: Params, pre_norm: jax.Array) -> jax.Array:
        found = find_log_probs(fns, params, fns.norm(params, pre_norm)).log_probs
        return jnp.maximum(found, least).astype(jnp.float16)

    # One window at a time: its logits are the whole vocabulary's.
    for rows, found in _answer(problem, find, [slice(n, n + 1) for n in range(len(kept))]):
        kept[rows] = found
    return lambda numbers: LogProbs(np.asarray(kept[numbers]))


def write_top(method: str, problem: ModelProblem, k: int) -> Callable[[np.ndarray], TopK]:
    """Writes every token's likeliest followers; returns window numbers -> TopK.

    Raises:
      InputError: k is more than the vocabulary.
    """
    fns, vocab = problem.fns, _head_width(problem)
    if k > vocab:
        raise InputError(f"{method}: top_k={k} is more than the vocabulary of {vocab}; ask for "
                         "fewer")  # fmt: skip
    kept = _keep(problem, _top_dtype(k), ())

    def find(params: Params, pre_norm: jax.Array) -> TopK:
        return find_top(fns, params, fns.norm(params, pre_norm), k)

    for rows, found in _answer(problem, find, cut_rows(*kept.shape)):
        for name, array in found._asdict().items():
            kept[name][rows] = array

    def read(numbers: np.ndarray) -> TopK:
        rows = kept[numbers]
        return TopK(*(np.ascontiguousarray(rows[name]) for name in TopK._fields))

    return read


def _top_dtype(k: int) -> np.dtype:
    """Returns what is kept of one token; the fields are those of `TopK`."""
    return np.dtype([("ids", "<i4", (k,)), ("log_probs", "<f4", (k,)), ("rest", "<f4")])


def _keep(problem: ModelProblem, dtype: np.dtype, each: tuple[int, ...]) -> np.ndarray:
    """Makes an array [n, t, *each], on disk where there is a place."""
    shape = (*problem.teacher.shape[:2], *each)
    if problem.work.scratch is None:
        return np.empty(shape, dtype)
    return make_array(problem.work.scratch, dtype, shape)


def _answer(problem: ModelProblem, find: Callable, cut: list[slice]) -> Iterator[tuple]:
    """Yields runs of windows and what `find` says of the teacher's hidden states there."""
    outer = problem.outer or {
        name: value for name, value in problem.params.items() if name != "blocks"
    }
    compiled = jax.jit(find)
    for rows in cut:
        yield rows, jax.device_get(compiled(outer, np.asarray(problem.teacher[rows])))


def _head_width(problem: ModelProblem) -> int:
    if problem.fns.vocab_size:
        return problem.fns.vocab_size
    shape = jax.ShapeDtypeStruct((1, problem.teacher.shape[-1]), jnp.float32)
    return jax.eval_shape(problem.fns.head, problem.params, shape).shape[-1]
