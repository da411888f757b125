"""What gradient methods lower. Every mean is taken in float32 or wider."""

from typing import Literal

import jax
import jax.numpy as jnp

from lqec_jax.core.types import ModelFns, Params

Target = Literal["post_norm", "pre_norm", "logits"]

# Vocabulary columns whose logits are held at once; a whole head where it is narrower.
VOCAB_CHUNK = 8192


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
    return rilq_terms(
        fns,
        teacher_hidden,
        student_params,
        tokens,
        model_weight=model_weight,
        token_weight=token_weight,
        target=target,
    )[0]


def rilq_terms(
    fns: ModelFns, teacher_hidden, student_params, tokens, *, model_weight, token_weight, target
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss of `rilq` and its two terms by name."""
    pre_norm, post_norm = fns.hidden(student_params, tokens)
    if target == "logits":
        teacher = fns.head(student_params, fns.norm(student_params, teacher_hidden))
        student = fns.head(student_params, post_norm)
    else:
        teacher, student = teacher_hidden, post_norm if target == "post_norm" else pre_norm
    discrepancy = mean_square(student, teacher)
    token_loss = jnp.mean(next_token_nll(fns, student_params, post_norm, tokens))
    loss = model_weight * discrepancy + token_weight * token_loss
    return loss, {"discrepancy": discrepancy, "next_token": token_loss}


def mean_square(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns mean((x - y)²)."""
    dtype = jnp.result_type(x, y, jnp.float32)
    return jnp.mean(jnp.square(x.astype(dtype) - y.astype(dtype)))


def next_token_nll(
    fns: ModelFns, params: Params, post_norm: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Returns -log p(x[t+1] | x[..t]) in nats for t < T - 1, float32 [b, t - 1].

    The head is applied to `VOCAB_CHUNK` columns at a time, and again in the backward pass, so no
    [b, t, vocab] array is held for a wide vocabulary.
    """
    hidden, labels = post_norm[:, :-1], tokens[:, 1:]
    if fns.vocab_size is None or fns.vocab_size <= VOCAB_CHUNK:
        logits = fns.head(params, hidden)
        label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - label
    return _chunked_nll(fns, params, hidden, labels)


def _chunked_nll(fns: ModelFns, params: Params, hidden: jax.Array, labels: jax.Array):
    """Running log-sum-exp over chunks of the vocabulary.

    The last chunk begins early enough to be whole, and its columns already seen are masked.
    """
    vocab = fns.vocab_size

    @jax.checkpoint
    def visit(carry, first):
        total, label = carry
        start = jnp.minimum(first, vocab - VOCAB_CHUNK)
        logits = fns.head(params, hidden, start, VOCAB_CHUNK)
        column = start + jnp.arange(VOCAB_CHUNK)
        fresh = jnp.where(column >= first, logits, -jnp.inf)
        total = jnp.logaddexp(total, jax.nn.logsumexp(fresh, axis=-1))
        inside = (labels >= first) & (labels < first + VOCAB_CHUNK)
        place = jnp.clip(labels - start, 0, VOCAB_CHUNK - 1)
        here = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
        return (total, jnp.where(inside, here, label)), None

    # A finite start keeps every gradient finite: that of logaddexp(-inf, -inf) is not a number.
    dtype = jnp.result_type(hidden, jnp.float32)
    start = (jnp.full(labels.shape, -1e30, dtype), jnp.zeros(labels.shape, dtype))
    (total, label), _ = jax.lax.scan(visit, start, jnp.arange(0, vocab, VOCAB_CHUNK))
    return total - label
