"""What trainings of the whole model lower. Every mean is taken in float32 or wider.

    L = Σ weight · term,   terms: the discrepancy of hidden states, the divergence of predictions,
                                  the next token

A loss is a sum of terms, frozen records that find what they compare with in the batch and hold no
array, so that programs are kept by value. `prepare` says what a batch is to bring.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.types import ModelFns, ModelProblem, Params
from lqec_jax.errors import InputError
from lqec_jax.train import predictions
from lqec_jax.train.vocabulary import LogProbs, Teacher, TopK, kl_terms, next_token_nll

__all__ = ["Discrepancy", "Divergence", "LogProbs", "ModelLoss", "NextToken", "TopK", "lrec",
           "mean_square", "next_token_nll", "rilq"]  # fmt: skip

Target = Literal["post_norm", "pre_norm", "logits"]
Reduction = Literal["sum", "mean"]


class Seen:
    """A student's answers to one batch, each computed when a term first asks for it."""

    def __init__(self, fns: ModelFns, params: Params, batch: dict, terms: tuple["Term", ...]):
        self.fns, self.params, self.batch = fns, params, batch
        self._diverges = any(isinstance(term, Divergence) for term in terms)

    @property
    def tokens(self) -> jax.Array:
        return self.batch["tokens"]

    @cached_property
    def hidden(self) -> tuple[jax.Array, jax.Array]:
        """Pre-norm and post-norm hidden states, [b, t, d] each."""
        return self.fns.hidden(self.params, self.tokens)

    @cached_property
    def kl(self) -> tuple[jax.Array, jax.Array]:
        """KL of every token and next-token losses: one walk of the vocabulary gives both."""
        teacher = self.batch.get("predictions")
        if teacher is None:
            teacher = self.normed_teacher
        return kl_terms(self.fns, teacher, self.params, self.hidden[1], self.tokens)

    @cached_property
    def nll(self) -> jax.Array:
        """-log p(x[t+1]), float32 [b, t - 1]."""
        if self._diverges:
            return self.kl[1]
        return next_token_nll(self.fns, self.params, self.hidden[1], self.tokens)

    @cached_property
    def normed_teacher(self) -> jax.Array:
        """The teacher's post-norm hidden states, by its own norm where the student has another."""
        if "answers" in self.batch:
            return self.batch["answers"]
        return self.fns.norm(self.params, self.batch["teacher"])


class Term(Protocol):
    """One term of a loss: equal by value, without arrays."""

    name: str

    def prepare(self, method: str, problem: ModelProblem) -> dict[str, Callable]:
        """Returns what a batch is to bring: name -> (window numbers) -> array, windows leading."""

    def weigh(self, length: int) -> float:
        """Returns what the term counts over windows of so many tokens."""

    def measure(self, seen: Seen) -> jax.Array:
        """Returns the mean over the batch's windows."""


@dataclass(frozen=True)
class Discrepancy:
    """mean((H_q - H)²) of what both models answer: RILQ's model-wise term (arXiv:2412.01129).

    Attributes:
      target: where they are compared: 'post_norm' or 'pre_norm' hidden states, or 'logits', of
        which two arrays [b, t, vocab] are held.
    """

    weight: float = 0.5
    target: Target = "post_norm"
    name: str = "discrepancy"

    def prepare(self, method: str, problem: ModelProblem) -> dict[str, Callable]:
        if self.target == "logits" and problem.outer is not None:
            raise InputError(
                f"{method}: target='logits' reads both models by one head, and an earlier step has "
                "trained the student's; use 'post_norm'"
            )
        states = _teacher_states(problem)
        return _normed(problem, states) if self.target == "post_norm" else {"teacher": states}

    def weigh(self, length: int) -> float:
        return self.weight

    def measure(self, seen: Seen) -> jax.Array:
        if self.target == "post_norm":
            return mean_square(seen.hidden[1], seen.normed_teacher)
        teacher = seen.batch["teacher"]
        if self.target == "pre_norm":
            return mean_square(seen.hidden[0], teacher)
        logits = seen.fns.head(seen.params, seen.fns.norm(seen.params, teacher))
        return mean_square(seen.fns.head(seen.params, seen.hidden[1]), logits)


@dataclass(frozen=True)
class Divergence:
    """KL(teacher || student) of what they predict: LREC's term (arXiv:2306.08162).

    Attributes:
      reduction: 'sum' over a window's tokens, as the authors have it, or their 'mean'.
      logits: how the teacher's predictions come: 'recomputed' from its hidden states, 'streamed'
        from disk, or the `top_k` likeliest; see `train.predictions`.
    """

    weight: float = 1.0
    reduction: Reduction = "mean"
    logits: str = "recomputed"
    top_k: int = 64
    name: str = "kl"

    def prepare(self, method: str, problem: ModelProblem) -> dict[str, Callable]:
        if self.logits == "streamed":
            return {"predictions": predictions.write_log_probs(problem)}
        if self.logits == "top_k":
            return {"predictions": predictions.write_top(method, problem, self.top_k)}
        if problem.outer is not None:
            raise InputError(
                f"{method}: logits='recomputed' reads both models by one head, and an earlier step "
                "has trained the student's; use 'streamed' or 'top_k'"
            )
        return {"teacher": _teacher_states(problem)}

    def scratch_bytes(self, vocab: int) -> int:
        """Returns what is kept on disk of a token's teacher."""
        return predictions.bytes_of(self.logits, self.top_k, vocab)

    def weigh(self, length: int) -> float:
        return self.weight

    def measure(self, seen: Seen) -> jax.Array:
        kl = jnp.mean(seen.kl[0])
        return seen.tokens.shape[1] * kl if self.reduction == "sum" else kl


@dataclass(frozen=True)
class NextToken:
    """The next-token loss: the mean over tokens, or each weighed where the text says how.

    Attributes:
      weight: of the mean over a window's tokens; None is `share` for each of them.
      each: divides the weight by a window's tokens, as `Divergence`'s mean divides its own.
      weighed: a text that says no weights is given equal ones.
    """

    weight: float | None = 1.0
    share: float = 0.0
    each: bool = False
    weighed: bool = False
    name: str = "next_token"

    def prepare(self, method: str, problem: ModelProblem) -> dict[str, Callable]:
        weights = problem.windows.weights
        if weights is None and self.weighed:
            windows, length = problem.windows.tokens[:, 1:].shape
            weights = np.full((windows, length), 1 / length, np.float32)
        return {} if weights is None else {"weights": lambda numbers: weights[numbers]}

    def weigh(self, length: int) -> float:
        weight = self.share * length if self.weight is None else self.weight
        return weight / length if self.each else weight

    def measure(self, seen: Seen) -> jax.Array:
        if "weights" in seen.batch:
            return jnp.mean(jnp.sum(seen.nll * seen.batch["weights"], axis=-1))
        return jnp.mean(seen.nll)


@dataclass(frozen=True)
class ModelLoss:
    """A sum of terms over a whole model, (fns, params, batch) -> (scalar, terms by name)."""

    terms: tuple[Term, ...]

    def __call__(self, fns: ModelFns, params: Params, batch: dict) -> tuple[jax.Array, dict]:
        seen = Seen(fns, params, batch, self.terms)
        length = batch["tokens"].shape[1]
        measured = {term.name: term.measure(seen) for term in self.terms}
        total: Any = None
        for term, value in zip(self.terms, measured.values(), strict=True):
            weighed = term.weigh(length) * value
            total = weighed if total is None else total + weighed
        return total, measured

    def prepare(self, method: str, problem: ModelProblem) -> Callable[[np.ndarray], dict]:
        """Returns window numbers -> a batch that brings what the terms compare with.

        Raises:
          InputError: the problem does not have what a term needs.
        """
        brought = {"tokens": lambda numbers: problem.windows.tokens[numbers]}
        for term in self.terms:
            brought |= term.prepare(method, problem)
        return lambda numbers: {name: read(numbers) for name, read in brought.items()}

    def scratch_bytes(self, vocab: int) -> int:
        """Returns what is kept on disk of a token's teacher."""
        return sum(term.scratch_bytes(vocab) for term in self._diverging())

    def _diverging(self) -> Iterator[Divergence]:
        return (term for term in self.terms if isinstance(term, Divergence))


def _teacher_states(problem: ModelProblem) -> Callable:
    return lambda numbers: np.asarray(problem.teacher[numbers])


def _normed(problem: ModelProblem, states: Callable) -> dict[str, Callable]:
    """Returns the teacher's states, behind its own norm where the student's was trained."""
    if problem.outer is None:
        return {"teacher": states}
    norm, outer = jax.jit(problem.fns.norm), problem.outer
    return {"answers": lambda numbers: np.asarray(norm(outer, states(numbers)))}


def rilq(
    fns: ModelFns,
    teacher_hidden: jax.Array,
    student_params: Params,
    tokens: jax.Array,
    *,
    model_weight: float = 0.5,
    token_weight: float = 0.5,
    target: Target = "post_norm",
) -> jax.Array:
    """Returns RILQ's loss: the model-wise discrepancy plus the next-token loss.

        L = model_weight · mean((H_q - H)²) + token_weight · mean CE(head(H_q)[t], x[t+1])

    RILQ (arXiv:2412.01129). The paper compares outputs of the last decoder layer; its released code
    compares them after the final norm, which is better conditioned and the default here.

    Args:
      fns: the model.
      teacher_hidden: what the teacher answers, [b, t, d]: pre-norm hidden states for 'pre_norm' and
        'logits', post-norm ones for 'post_norm'.
      student_params: the compressed model.
      tokens: int [b, t].
      target: where the two models are compared.
    Returns:
      float32 scalar. Logits for the next-token loss are held a chunk of the vocabulary at a time;
      target='logits' holds two [b, t, vocab] arrays.
    """
    loss = ModelLoss((Discrepancy(model_weight, target), NextToken(token_weight)))
    name = "answers" if target == "post_norm" else "teacher"
    return loss(fns, student_params, {"tokens": tokens, name: teacher_hidden})[0]


def lrec(
    fns: ModelFns,
    teacher: Teacher,
    student_params: Params,
    tokens: jax.Array,
    *,
    kl_weight: float = 1.0,
    token_weight: float = 120.0,
    reduction: Reduction = "sum",
) -> jax.Array:
    """Returns LREC's loss: the divergence from the teacher's predictions plus the next-token loss.

        L = kl_weight · 1/b Σ_{b,t} KL(teacher || student) + token_weight · mean CE(student, x[t+1])

    INT2.1 (arXiv:2306.08162), with its code's reductions: KL is summed over vocabulary and tokens
    and divided by the windows alone, CE is a mean over tokens. 'mean' is L / T, KL a mean over
    tokens and token_weight divided by T: the same direction, of a size that does not grow with T.

    Args:
      fns: the model.
      teacher: its post-norm hidden states [b, t, d], from which its logits are computed anew with
        the student's head, which it shares; its `LogProbs`; or its `TopK`, by which the KL is that
        of k + 1 outcomes, a lower bound of the whole one.
      student_params: the compressed model.
      tokens: int [b, T].
    Returns:
      float32 scalar. Both models' logits are held `VOCAB_CHUNK` columns at a time, forward and
      backward; a teacher given as `LogProbs` is [b, t, vocab] itself.
    """
    terms = Divergence(kl_weight, reduction), NextToken(token_weight, each=reduction == "mean")
    batch = {"tokens": tokens, "predictions": teacher}
    return ModelLoss(terms)(fns, student_params, batch)[0]


def mean_square(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns mean((x - y)²)."""
    dtype = jnp.result_type(x, y, jnp.float32)
    return jnp.mean(jnp.square(x.astype(dtype) - y.astype(dtype)))
