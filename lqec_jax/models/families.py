"""THE TABLE of model families: a checkpoint's `model_type` -> the module that maps it.

A family maps and computes nothing: its module has `FAMILY`, which says how config.json is read and
what the checkpoint calls each parameter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from lqec_jax.core.sites import linear_path
from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.models import parameters
from lqec_jax.models.config import ModelConfig

FAMILIES = {
    "gemma2": "lqec_jax.models.gemma2",
    "llama": "lqec_jax.models.llama",
    "mistral": "lqec_jax.models.mistral",
    "opt": "lqec_jax.models.opt",
    "qwen2": "lqec_jax.models.qwen2",
    "qwen3": "lqec_jax.models.qwen3",
}


class Fused(NamedTuple):
    """A module that a checkpoint keeps for several linears, `qkv_proj`; a line of `Family.names`.

    Their outputs lie one after another, in the order of `linears`. It is what reading needs; an
    export to such a checkpoint would have to join them again.
    """

    name: str
    linears: tuple[str, ...]


class Cut(NamedTuple):
    """Which part of a stored tensor a parameter is: start to stop - 1 along a stored axis."""

    axis: int
    start: int
    stop: int


class StoredTensor(NamedTuple):
    """Where a parameter lies in a checkpoint.

    `name` of a block's tensor holds `{layer}`. `shape` is that of the whole stored tensor, of which
    the parameter is the `cut`, or all of it. A `transposed` tensor is stored [..., d_out, d_in] and
    is [..., d_in, d_out] inside.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    cut: Cut | None = None

    @property
    def inner_shape(self) -> tuple[int, ...]:
        shape = list(self.shape)
        if self.cut:
            shape[self.cut.axis] = self.cut.stop - self.cut.start
        return _swap_last(tuple(shape)) if self.transposed else tuple(shape)


@dataclass(frozen=True)
class Family:
    """One family's mapping.

    Attributes:
      read_config: config.json, parsed -> ModelConfig; refuses what it does not model.
      names: module path ('attn/q'; 'embed/embedding' and 'embed/positions' in full) -> its name in
        a checkpoint, without `.weight` or `.bias`, or the `Fused` one that it is a part of; a
        block's holds `{layer}`.
    """

    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    names: Mapping[str, str | Fused]

    def block_tensors(self, config: ModelConfig) -> dict[str, StoredTensor]:
        """Returns parameter path -> stored tensor for one block; format the name with `layer=`."""
        return self._stored(parameters.block_shapes(config))

    def outer_tensors(self, config: ModelConfig) -> dict[str, StoredTensor]:
        """Returns parameter path -> stored tensor outside the blocks; no head when it is tied."""
        return self._stored(parameters.outer_shapes(config))

    def block_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Returns parameter path -> shape inside, kernels [d_in, d_out], for one block."""
        return parameters.block_shapes(config)

    def _stored(self, shapes: parameters.Shapes) -> dict[str, StoredTensor]:
        tensors = {}
        for path, shape in shapes.items():
            module, _, leaf = path.rpartition("/")
            name, cut = self.names[path if path in self.names else module], None
            kernel = linear_path(path) is not None
            if isinstance(name, Fused):
                widths = [shapes[f"{linear}/{leaf}"][-1] for linear in name.linears]
                start = sum(widths[: name.linears.index(module)])
                cut = Cut(len(shape) - (2 if kernel else 1), start, start + shape[-1])
                name, shape = name.name, (*shape[:-1], sum(widths))
            full = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
            tensors[path] = StoredTensor(full, _swap_last(shape) if kernel else shape, kernel, cut)
        return tensors


def _swap_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a stored kernel's transpose, of one or of a stack of them."""
    return (*shape[:-2], shape[-1], shape[-2])


def family(model_type: str) -> Family:
    """Returns one family's mapping; raises `InputError` for a `model_type` not in the table."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = did_you_mean(str(model_type), FAMILIES)
        raise InputError(f"config.json: model_type {model_type!r} is not supported{near}")
    return import_module(FAMILIES[model_type]).FAMILY


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face config.json, already parsed, of any family in the table.

    Raises: InputError: no or an unknown `model_type`; a key the family does not model.
    """
    if "model_type" not in raw:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"config.json: model_type is missing; wanted one of: {known}; add it")
    return family(raw["model_type"]).read_config(raw)
