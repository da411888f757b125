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


def numpy_nll(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)[:, :-1]
    largest = logits.max(-1, keepdims=True)
    total = largest[..., 0] + np.log(np.exp(logits - largest).sum(-1))
    return total - np.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
