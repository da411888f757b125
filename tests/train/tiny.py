"""A decoder small enough to train in a test: quantized, with adapters, beside its teacher's answers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from lqec_kernels.formats import CompressedLinear, LowRank

from lqec_jax.core.linear import linear
from lqec_jax.core.tree import get_at, set_at
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import init_params, model_fns
from lqec_jax.quantizers.rtn import quantize
from lqec_jax.train.fit import Objective
from lqec_jax.train.losses import rilq_terms

GROUP, RANK, VOCAB = 32, 4, 64


class Problem(NamedTuple):
    """A student and what a loss asks: tokens int32 [n, t], teacher pre-norm float32 [n, t, d]."""

    fns: ModelFns
    params: Params
    tokens: np.ndarray
    teacher: np.ndarray

    def loss(self, params: Params, batch: dict) -> tuple[jax.Array, dict]:
        """RILQ's loss on a batch."""
        teacher = self.fns.norm(params, batch["teacher"])
        return rilq_terms(self.fns, teacher, params, batch["tokens"],
                          model_weight=0.5, token_weight=0.5, target="post_norm")  # fmt: skip

    def batch(self, numbers) -> dict:
        return {"tokens": self.tokens[numbers], "teacher": self.teacher[numbers]}

    def objective(self, val: int) -> Objective:
        return Objective(self.loss, self.batch, len(self.tokens) - val, val)


def make_config(layers: int = 2, d: int = 64, d_ff: int = 128, **changes) -> ModelConfig:
    sizes = {"heads": 4, "kv_heads": 4, "head_dim": d // 4, "max_length": 64, "vocab_size": VOCAB}
    return ModelConfig(family="llama", d_model=d, d_ff=d_ff, layers=layers, **(sizes | changes))


def make_problem(windows: int = 8, length: int = 16, seed: int = 0, **sizes) -> Problem:
    """Quantizes a random decoder to 2 bits and lets it answer beside the dense one."""
    config = make_config(**sizes)
    fns = model_fns(config)
    dense_key, adapter_key, token_key = jax.random.split(jax.random.key(seed), 3)
    dense = init_params(config, dense_key)
    tokens = jax.random.randint(token_key, (windows, length), 0, config.vocab_size)
    teacher = jax.jit(fns.hidden)(dense, tokens)[0]
    blocks = tuple(compress(fns, segment, 2, adapter_key) for segment in dense["blocks"])
    return Problem(fns, {**dense, "blocks": blocks}, np.asarray(tokens), np.asarray(teacher))


def make_plain_problem(windows: int = 8, length: int = 16, d: int = 64) -> Problem:
    """Returns the same over `plain_fns`, two blocks, the teacher's answers drawn at random."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCAB, (windows, length), np.int32)
    teacher = random.standard_normal((windows, length, d), np.float32)
    return Problem(plain_fns(), plain_params((2, 3), d), tokens, teacher)


def compress(fns: ModelFns, segment: Params, bits: int, key: jax.Array) -> Params:
    """Rounds every linear of a stack of blocks and gives it an adapter, both halves not zero."""
    for number, path in enumerate(fns.linears):
        w = get_at(segment, f"{path}/kernel")
        layers, d_in, d_out = w.shape
        base = jax.vmap(lambda w: quantize(w, bits, GROUP))(w)
        a_key, b_key = jax.random.split(jax.random.fold_in(key, number))
        a = jax.random.normal(a_key, (layers, d_in, RANK), jnp.float16) / RANK
        b = jax.random.normal(b_key, (layers, RANK, d_out), jnp.float16) / 30
        segment = set_at(segment, f"{path}/kernel", CompressedLinear(base, (LowRank(a, b),)))
    return segment


def adapters(params: Params) -> list[np.ndarray]:
    """Returns every adapter's arrays."""
    is_adapter = lambda node: isinstance(node, LowRank)  # noqa: E731
    found = [n for n in jax.tree.leaves(params, is_leaf=is_adapter) if is_adapter(n)]
    return [np.asarray(array, np.float32) for array in jax.tree.leaves(found)]


def plain_fns(remat: bool = False) -> ModelFns:
    """Somebody's own model, which keeps its operands' precision: h + tanh(h W) a block."""

    def block(block_params: Params, h: jax.Array):
        h_out = h + jnp.tanh(linear(h, block_params["mix"]["kernel"]))
        return h_out, {"mix": h}

    def norm(params: Params, h: jax.Array) -> jax.Array:
        return h / jnp.sqrt(1 + jnp.mean(jnp.square(h), axis=-1, keepdims=True))

    def hidden(params: Params, tokens: jax.Array):
        h = params["embed"][tokens]
        step = lambda h, block_params: (block(block_params, h)[0], None)  # noqa: E731
        for segment in params["blocks"]:
            h, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, h, segment)
        return h, norm(params, h)

    def head(params: Params, post_norm: jax.Array, start=0, size: int | None = None) -> jax.Array:
        kernel = params["head"]
        if size is not None:
            kernel = jax.lax.dynamic_slice_in_dim(kernel, start, size, 1)
        return post_norm @ kernel

    return ModelFns(
        embed=lambda params, tokens: params["embed"][tokens],
        block=block, hidden=hidden, head=head, linear_groups=(("mix",),), norm=norm,
        vocab_size=VOCAB,
    )  # fmt: skip


def plain_params(bits: tuple[int, ...], d: int) -> Params:
    """Returns parameters for `plain_fns`: a segment of one block for each entry of `bits`."""
    embed_key, head_key, block_key = jax.random.split(jax.random.key(1), 3)
    segments = []
    for number, b in enumerate(bits):
        key = jax.random.fold_in(block_key, number)
        segment = {"mix": {"kernel": jax.random.normal(key, (1, d, d)) / d**0.5}}
        segments.append(compress(plain_fns(), segment, b, key))
    embed = jax.random.normal(embed_key, (VOCAB, d))
    head = jax.random.normal(head_key, (d, VOCAB)) / d**0.5
    return {"embed": embed, "blocks": tuple(segments), "head": head}
