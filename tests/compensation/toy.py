"""A model of two kinds of linears, small enough to train in a test, and what it answers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core import sites
from lqec_jax.core.linear import linear
from lqec_jax.core.types import ModelFns, Params
from lqec_kernels.formats import CompressedLinear

D, FF, VOCAB, LAYERS, LENGTH = 16, 24, 20, 2, 8
WINDOWS = 24


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def _block(params, h):
    inner = jnp.tanh(linear(h, params["up"]["kernel"]))
    return h + linear(inner, params["down"]["kernel"]), {"up": h, "down": inner}


def _norm(params, h):
    return h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True))


def _hidden(params, tokens):
    h = params["embed"][tokens]
    for segment in params["blocks"]:
        h, _ = jax.lax.scan(lambda h, one: (_block(one, h)[0], None), h, segment)
    return h, _norm(params, h)


FNS = ModelFns(
    embed=lambda params, tokens: params["embed"][tokens],
    block=_block,
    hidden=_hidden,
    head=lambda params, x, start=0, size=None: x @ params["embed"].T,
    sites=sites.in_groups((("up",), ("down",))),
    norm=_norm,
)
TEACHER = {
    "embed": jnp.asarray(draw(VOCAB, D, seed=3)),
    "blocks": (
        {
            "up": {"kernel": draw(LAYERS, D, FF, seed=1) / D**0.5},
            "down": {"kernel": draw(LAYERS, FF, D, seed=2) / FF**0.5},
        },
    ),
}
TOKENS = np.random.RandomState(5).randint(0, VOCAB, (WINDOWS, LENGTH)).astype(np.int32)


def compress(change: Callable[[jax.Array], CompressedLinear]) -> Params:
    """Returns the teacher with every weight replaced by `change` of it."""
    segment = TEACHER["blocks"][0]
    return {**TEACHER, "blocks": (sites.map_block(segment, FNS.sites, jax.jit(jax.vmap(change))),)}


def kernels(params: Params) -> dict[str, CompressedLinear]:
    """Returns path -> stacked weight."""
    return sites.get_all(params["blocks"][0], FNS.sites)


def numpy_log_probs(pre_norm: np.ndarray) -> np.ndarray:
    """Returns what is predicted after the last block's states, in float64."""
    h = np.asarray(pre_norm, np.float64)
    h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True))
    logits = h @ np.asarray(TEACHER["embed"], np.float64).T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
