"""A student of one linear a block, its heads, and what they answer, once more in float64."""

import numpy as np

from lqec_jax.models.decoder import model_fns
from tests.train.tiny import VOCAB, draw_linear, draw_plain, make_config, plain_fns

D, LAYERS, BATCH, LENGTH = 32, 2, 2, 7
FNS = plain_fns()
TOKENS = np.random.RandomState(0).randint(0, VOCAB, (BATCH, LENGTH))
WEIGHTS = {"kl_weight": 0.5, "token_weight": 3.0}


def draw_student() -> dict:
    kernel = draw_linear(np.random.default_rng(2), 2, LAYERS, D, D)
    return {**draw_plain((), D), "blocks": ({"mix": {"kernel": kernel}},)}


def head_only(kind: str):
    """Returns (functions, parameters) with one of the three kinds of head."""
    kernel = np.random.RandomState(2).standard_normal((D, VOCAB)).astype(np.float32) / D**0.5
    if kind == "plain":
        return FNS, {"head": kernel}
    fns = model_fns(make_config(layers=1, d=D, tied_head=kind == "tied"))
    if kind == "tied":
        return fns, {"embed": {"embedding": kernel.T}}
    return fns, {"head": {"kernel": kernel}}


def numpy_norm(h: np.ndarray) -> np.ndarray:
    return h / np.sqrt(1 + np.mean(h**2, axis=-1, keepdims=True))


def numpy_hidden(params: dict) -> tuple[np.ndarray, np.ndarray]:
    h = np.asarray(params["embed"], np.float64)[TOKENS]
    for segment in params["blocks"]:
        for w in np.asarray(segment["mix"]["kernel"].dense(), np.float64):
            h = h + np.tanh(h @ w)
    return h, numpy_norm(h)


def bound_logits_rounding(params: dict) -> float:
    """Returns how far a logit computed in float32 may lie from the exact one, in any order of sums.

    A sum of n products is off by at most n units of roundoff of the sum of their absolute values;
    what came in wrong leaves tanh no larger than it was, and the norm at most doubled.
    """
    unit = np.finfo(np.float32).eps / 2
    h = np.asarray(params["embed"], np.float64)[TOKENS]
    error = np.zeros_like(h)
    for segment in params["blocks"]:
        leaf = segment["mix"]["kernel"]
        terms = [np.abs(np.asarray(leaf.base.dense(), np.float64))]
        terms += [np.abs(np.asarray(c.a, np.float64)) @ np.abs(np.asarray(c.b, np.float64))
                  for c in leaf.corrections]  # fmt: skip
        for w, largest in zip(np.asarray(leaf.dense(), np.float64), sum(terms), strict=True):
            error = error + error @ largest + 2 * D * unit * (np.abs(h) @ largest)
            h = h + np.tanh(h @ w)
            error = error + 8 * unit * (1 + np.abs(h))  # tanh to a few last places, and the sum
    post_norm = np.abs(numpy_norm(h))
    error = 2 * error.max(-1, keepdims=True) + 2 * D * unit * post_norm
    head = np.abs(np.asarray(params["head"], np.float64))
    return float(np.max(error @ head + D * unit * (post_norm @ head)))


def numpy_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)[:, :-1]
    largest = logits.max(-1, keepdims=True)
    total = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    return total - np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
