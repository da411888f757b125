"""Models small enough to train in a test: packed weights with adapters, beside a teacher's answers.

Everything is drawn by numpy, because compiling a hundred small programs takes longer than any test.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.linear import linear
from lqec_jax.core.sites import in_groups
from lqec_jax.core.tree import set_at
from lqec_jax.core.types import (
    BlockProblem,
    ModelFns,
    ModelProblem,
    Params,
    TrainingStep,
    Windows,
    Work,
)
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import init_params, model_fns
from lqec_jax.train.fit import Objective
from lqec_jax.train.losses import Discrepancy, ModelLoss, NextToken
from lqec_jax.train.parts.part import Part, attributes, put_weight
from lqec_jax.train.steps import Training
from lqec_kernels.formats import Affine, Base, CompressedLinear, Dense, LowRank
from lqec_kernels.packing import words_for

GROUP, RANK, VOCAB = 32, 4, 64
RILQ = ModelLoss((Discrepancy(0.5), NextToken(0.5)))


class Problem(NamedTuple):
    """A student and what a loss asks: tokens int32 [n, t], teacher pre-norm float32 [n, t, d]."""

    fns: ModelFns
    params: Params
    tokens: np.ndarray
    teacher: np.ndarray

    def loss(self, params: Params, batch: dict) -> tuple[jax.Array, dict]:
        """RILQ's loss on a batch."""
        return RILQ(self.fns, params, batch)

    def batch(self, numbers) -> dict:
        return {"tokens": self.tokens[numbers], "teacher": self.teacher[numbers]}

    def objective(self, val: int) -> Objective:
        return Objective(self.loss, self.batch, len(self.tokens) - val, val)

    def pose(self, val: int, key: jax.Array | None = None, **changes) -> ModelProblem:
        """Returns the same as a training of the whole model sees it."""
        windows = Windows(self.tokens, len(self.tokens) - val)
        work = Work(jax.random.key(0) if key is None else key)
        facts = {"params": self.params, "windows": windows, "work": work, "teacher": self.teacher}
        return ModelProblem(self.fns, **(facts | changes))


def training_of(step: TrainingStep) -> Training:
    """Returns what a step trains."""
    return step.run.args[0]


def make_config(layers: int = 2, d: int = 64, d_ff: int = 128, **changes) -> ModelConfig:
    sizes = {"heads": 4, "kv_heads": 4, "head_dim": d // 4, "max_length": 64, "vocab_size": VOCAB}
    return ModelConfig(family="llama", d_model=d, d_ff=d_ff, layers=layers, **(sizes | changes))


def make_problem(windows: int = 8, length: int = 16, **sizes) -> Problem:
    """Returns a decoder of 2-bit weights, its windows, and answers to come near to."""
    config = make_config(**sizes)
    return _with_windows(model_fns(config), draw_decoder(config, (2,)), windows, length)


def make_plain_problem(windows: int = 8, length: int = 16, d: int = 64) -> Problem:
    """Returns the same over `plain_fns`, two blocks of 2 and 3 bits."""
    return _with_windows(plain_fns(), draw_plain((2, 3), d), windows, length)


def make_block_problem(d: int = 32, windows: int = 6, **changes) -> BlockProblem:
    """Returns a block of `plain_fns` and streams of few directions that lie a little apart."""
    random, few = np.random.default_rng(3), d // 4
    w = jnp.asarray(_normal(random, d, d, scale=d**-0.5))
    teacher = _normal(random, windows, 8, few, scale=1.0) @ _normal(random, few, d, scale=0.5)
    facts = {
        "fns": plain_fns(),
        "block": {"mix": {"kernel": CompressedLinear(Dense(w))}},
        "dense": {"mix": {"kernel": w}},
        "teacher": teacher,
        "student": teacher + _normal(random, windows, 8, d, scale=0.1),
        "train": windows - 2,
        "work": Work(jax.random.key(0)),
    }
    return BlockProblem(**(facts | changes))


def _with_windows(fns: ModelFns, params: Params, windows: int, length: int) -> Problem:
    """Adds windows that count upwards, and embeddings as answers: both can be learned."""
    first = np.random.default_rng(0).integers(0, VOCAB, (windows, 1), np.int32)
    tokens = (first + np.arange(length, dtype=np.int32)) % VOCAB
    embedding = jax.tree.leaves(params["embed"])[0]
    return Problem(fns, params, tokens, embedding[tokens])


def draw_decoder(config: ModelConfig, bits: tuple[int, ...]) -> Params:
    """Draws a decoder's parameters; its blocks are as many segments as `bits` has entries."""
    fns, random = model_fns(config), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    block, layers = shapes["blocks"][0], config.layers // len(bits)

    def draw_segment(b: int) -> Params:
        segment = jax.tree.map(lambda s: np.ones((layers, *s.shape[1:]), np.float32), block)
        for path in fns.linears:
            d_in, d_out = _kernel_shape(block, path)
            leaf = draw_linear(random, b, layers, d_in, d_out)
            segment = set_at(segment, f"{path}/kernel", leaf)
        return segment

    d, vocab = config.d_model, config.vocab_size
    return {
        "embed": {"embedding": _normal(random, vocab, d, scale=d**-0.5)},
        "blocks": tuple(draw_segment(b) for b in bits),
        "norm": {"scale": np.ones(d, np.float32)},
        "head": {"kernel": _normal(random, d, vocab, scale=d**-0.5)},
    }


def _kernel_shape(block: Params, path: str) -> tuple[int, int]:
    for key in path.split("/"):
        block = block[key]
    return block["kernel"].shape[-2:]


def draw_linear(random, bits: int, layers: int, d_in: int, d_out: int) -> CompressedLinear:
    """Draws a stack of weights of variance about 1 / d_in; any words are codes."""
    groups = d_in // GROUP
    words = lambda *shape: random.integers(0, 2**32, (layers, *shape), np.uint32)  # noqa: E731
    scales = (0.5 + random.random((layers, groups, d_out))) * d_in**-0.5 * 2.0 ** (1 - bits)
    base = Affine(
        codes=words(words_for(d_in, bits), d_out),
        scales=scales.astype(np.float16),
        zeros=words(groups, words_for(d_out, bits)),
        bits=bits, group_size=GROUP, d_in=d_in,
    )  # fmt: skip
    a = _normal(random, layers, d_in, RANK, scale=0.25).astype(np.float16)
    b = _normal(random, layers, RANK, d_out, scale=0.03).astype(np.float16)
    return CompressedLinear(base, (LowRank(a, b),))


def _normal(random, *shape: int, scale: float) -> np.ndarray:
    return scale * random.standard_normal(shape, np.float32)


@cache
def plain_fns(remat: bool = False) -> ModelFns:
    """Somebody's own model, which keeps its operands' precision: h + tanh(h W) a block."""

    def block(block_params: Params, h: jax.Array):
        h_out = h + jnp.tanh(linear(h, block_params["mix"]["kernel"]))
        return h_out, {"mix": h}

    def norm(params: Params, h: jax.Array) -> jax.Array:
        h = h / jnp.sqrt(1 + jnp.mean(jnp.square(h), axis=-1, keepdims=True))
        return h * params["norm"]["scale"] if "norm" in params else h

    def embed(params: Params, tokens: jax.Array) -> jax.Array:
        return params["embed"][tokens]

    def hidden(params: Params, tokens: jax.Array):
        h = embed(params, tokens)
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
        embed=embed, block=block, hidden=hidden, head=head, sites=in_groups([("mix",)]), norm=norm,
        vocab_size=VOCAB,
    )  # fmt: skip


def draw_plain(bits: tuple[int, ...], d: int) -> Params:
    """Draws parameters for `plain_fns`: a segment of one block for each entry of `bits`."""
    random = np.random.default_rng(1)
    blocks = tuple({"mix": {"kernel": draw_linear(random, b, 1, d, d)}} for b in bits)
    embed, head = _normal(random, VOCAB, d, scale=1.0), _normal(random, d, VOCAB, scale=d**-0.5)
    return {"embed": embed, "blocks": blocks, "head": head}


def adapters(params: Params) -> list[np.ndarray]:
    """Returns every adapter's arrays."""
    is_adapter = lambda node: isinstance(node, LowRank)  # noqa: E731
    found = [n for n in jax.tree.leaves(params, is_leaf=is_adapter) if is_adapter(n)]
    return [np.asarray(array, np.float32) for array in jax.tree.leaves(found)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shrunk:
    """A base times numbers in training."""

    inner: Base
    by: jax.Array

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    @property
    def d_out(self) -> int:
        return self.inner.d_out


@dataclass(frozen=True, kw_only=True)
class Shrink(Part):
    """A part to test trainings with: a weight is multiplied by one number, or by one for each.

    Attributes:
      first: what a training begins with.
      each: whether every weight has its own.
    """

    first: float = 0.5
    each: bool = False

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        shape = (leaf.d_in, leaf.d_out) if self.each else ()
        return replace(leaf, base=Shrunk(leaf.base, jnp.full(shape, self.first, jnp.float32)))

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return "by" if attributes(path)[-1:] == ["by"] else None

    def read(self, leaf: CompressedLinear) -> CompressedLinear | jax.Array:
        base = leaf.base
        return put_weight(replace(leaf, base=base.inner), base.by * base.inner.dense())

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        return replace(leaf, base=Dense(leaf.base.by * leaf.base.inner.dense()))

    def optimizers(self, width: int, updates: int) -> dict:
        return {"by": self.rates.chain(self.rates.lr, updates)}
