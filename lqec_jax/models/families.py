"""THE TABLE of model families: a checkpoint's `model_type` -> the module that maps it.

A family module maps and computes nothing. It has `read_config(raw) -> ModelConfig`,
`block_tensors(config)` and `outer_tensors(config)`, which name each parameter's stored tensor, and
`block_shapes(config)`, the parameter shapes inside.
"""

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.models.config import ModelConfig

FAMILIES = {
    "llama": "lqec_jax.models.llama",
}


class StoredTensor(NamedTuple):
    """Where a parameter lies in a checkpoint.

    `name` of a block's tensor holds `{layer}`. `shape` is the stored one; a `transposed` tensor is
    stored [d_out, d_in] and is [d_in, d_out] inside.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def inner_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def family(model_type: str) -> ModuleType:
    """Returns the module of one family; raises `InputError` for a `model_type` not in the table."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = did_you_mean(str(model_type), FAMILIES)
        raise InputError(f"config.json: model_type {model_type!r} is not supported{near}")
    return import_module(FAMILIES[model_type])


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face config.json, already parsed, of any family in the table.

    Raises: InputError: no or an unknown `model_type`; a key the family does not model.
    """
    if "model_type" not in raw:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"config.json: model_type is missing; wanted one of: {known}; add it")
    return family(raw["model_type"]).read_config(raw)
