"""The decoder of two layers that the authors of trainings were run on, as this library holds it."""

import json
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.tree import get_at, set_at, stack_blocks
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.families import read_config
from lqec_jax.models.llama import FAMILY
from lqec_kernels.formats import Affine, CompressedLinear, LowRank
from tests.golden.authors.problems import GROUP

# Our paths of a block's linears, and what the authors' files call them.
LINEARS = {
    "attn/q": "q_proj", "attn/k": "k_proj", "attn/v": "v_proj", "attn/o": "o_proj",
    "mlp/gate": "gate_proj", "mlp/up": "up_proj", "mlp/down": "down_proj",
}  # fmt: skip
LAYERS, BITS, RANK, ALPHA = 2, 2, 4, 16.0
# Their branch is alpha / rank · x A B; ours is x a b.
FACTOR = ALPHA / RANK


@dataclass(frozen=True)
class TinyLlama:
    """The teacher, the packed student and the text.

    Attributes:
      stored: the arrays of tiny_llama.npz.
    """

    stored: dict

    @cached_property
    def config(self) -> ModelConfig:
        raw = json.loads(str(self.stored["meta"]))["config"]
        return read_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **raw})

    @cached_property
    def fns(self) -> ModelFns:
        return model_fns(self.config)

    @property
    def tokens(self) -> np.ndarray:
        """Returns the text, int32 [30, 32]."""
        return self.stored["tokens"].astype(np.int32)

    @cached_property
    def teacher(self) -> Params:
        """Returns the model of whole weights, whoever asks for it first."""
        with jax.ensure_compile_time_eval():
            return self._read_teacher()

    @cached_property
    def student(self) -> Params:
        """Returns the model of packed weights, without adapters."""
        with jax.ensure_compile_time_eval():
            return jax.jit(self._pack)(self.teacher)

    def _read_teacher(self) -> Params:
        outer = self._read_tree(FAMILY.outer_tensors(self.config))
        blocks = [
            self._read_tree(FAMILY.block_tensors(self.config), layer=n) for n in range(LAYERS)
        ]
        return {**outer, "blocks": stack_blocks(blocks)}

    def _pack(self, teacher: Params) -> Params:
        blocks = teacher["blocks"]
        for path, name in LINEARS.items():
            leaves = [CompressedLinear(self._base(layer, name)) for layer in range(LAYERS)]
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)
            blocks = (set_at(blocks[0], f"{path}/kernel", stacked),)
        return {**teacher, "blocks": blocks}

    @property
    def adapters(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns where trainings begin: path -> (A, B), their numbers, layers leading."""
        return {
            path: tuple(self.stored[f"adapter.{half}.{name}"].astype(np.float32) for half in "AB")
            for path, name in LINEARS.items()
        }

    def hidden(self, params: Params, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the last hidden states before and after the norm."""
        before, after = jax.jit(self.fns.hidden)(params, tokens)
        return np.asarray(before), np.asarray(after)

    def _read_tree(self, tensors: dict, **layer: int) -> Params:
        tree: dict = {}
        for path, tensor in tensors.items():
            array = self.stored[tensor.name.format(**layer).removesuffix(".weight")]
            if path == "head/kernel":  # the only matrix of linears that the file has [out, in]
                array = array.T
            tree = set_at(tree, path, jnp.asarray(array, jnp.float32))
        return tree

    def _base(self, layer: int, name: str) -> Affine:
        part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        key = f"q.model.layers.{layer}.{part}.{name}"
        codes, scales, zeros = (self.stored[f"{key}.{n}"] for n in ("codes", "scale", "zero"))
        return Affine.from_codes(jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(zeros),
                                 bits=BITS, group_size=GROUP)  # fmt: skip


def add_adapters(params: Params, adapters: dict) -> Params:
    """Puts adapters, (A, B) of each path, beside the packed weights, as ours hold them."""
    (segment,) = params["blocks"]
    for path, (a, b) in adapters.items():
        leaf = get_at(segment, f"{path}/kernel")
        correction = LowRank(jnp.asarray(a), FACTOR * jnp.asarray(b))
        segment = set_at(segment, f"{path}/kernel", CompressedLinear(leaf.base, (correction,)))
    return {**params, "blocks": (segment,)}


def stored_adapters(stored: dict, prefix: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns path -> (A, B) of a file, or gradients of them."""
    return {
        path: tuple(stored[f"{prefix}{half}.{name}"] for half in "AB")
        for path, name in LINEARS.items()
    }
