"""A model parameter by parameter, under the names of a Hugging Face folder: what writers share.

Kernels are transposed back to [d_out, d_in]; a compressed weight becomes the one matrix that it
stands for, transforms and corrections included.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lqec_jax.core.tree import each_block, get_at, is_compressed
from lqec_jax.errors import InputError
from lqec_jax.io.carried import copy_carried
from lqec_jax.io.files import write_json
from lqec_jax.models import families
from lqec_jax.models.families import StoredTensor
from lqec_jax.models.model import Model
from lqec_kernels.formats import CompressedLinear

FLOATS = {"float32", "bfloat16", "float16"}


class Placed(NamedTuple):
    """One parameter and where a checkpoint keeps it.

    `path` is ours with the block's number, 'blocks/3/attn/q/kernel'; `value` an array or a
    CompressedLinear.
    """

    path: str
    stored: StoredTensor
    value: Any

    @property
    def module(self) -> str:
        """Returns the name of the module that holds a kernel."""
        return self.stored.name.removesuffix(".weight")


def walk(model: Model) -> Iterator[Placed]:
    """Yields every parameter of a model, one block in memory at a time."""
    family = families.family(model.config.family)
    for path, stored in family.outer_tensors(model.config).items():
        yield Placed(path, stored, get_at(model.params, path))
    tensors = family.block_tensors(model.config)
    for layer, block in enumerate(each_block(model.params)):
        for path, stored in tensors.items():
            named = stored._replace(name=stored.name.format(layer=layer))
            yield Placed(f"blocks/{layer}/{path}", named, get_at(block, path))


@jax.jit
def to_dense(leaf: CompressedLinear) -> jax.Array:
    """Returns a compressed weight as one float32 matrix; one program for each make of weight."""
    return leaf.dense()


def to_stored(placed: Placed, dtype: np.dtype | None) -> np.ndarray:
    """Returns a parameter as the checkpoint keeps it: dense, its orientation, one dtype."""
    value = to_dense(placed.value) if is_compressed(placed.value) else placed.value
    array = np.asarray(value)
    return cast(array.T if placed.stored.transposed else array, dtype, placed.path)


def cast(array: np.ndarray, dtype: np.dtype | None, path: str) -> np.ndarray:
    """Rounds an array to `dtype`; None leaves it.

    Raises:
      InputError: a value is beyond the dtype's range.
    """
    if dtype is None or array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # counted below, and named
        rounded = array.astype(dtype)
    lost = int(np.count_nonzero(np.isinf(rounded) & np.isfinite(array)))
    if lost:
        raise InputError(
            f"export: {path} has {lost} values beyond the range of {dtype.name}; choose --dtype "
            "bfloat16 or float32"
        )
    return rounded


def write_config(
    model: Model,
    folder: Path,
    dtype: np.dtype | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json as given, but for dtype and quantization, and the files that are carried.

    Without a dtype it names the embedding's, in which transformers then computes.
    """
    stored = dtype or np.dtype(model.params["embed"]["embedding"].dtype)
    raw = dict(model.raw_config)
    for key in {"torch_dtype"} | ({"dtype"} & set(raw)):
        raw[key] = stored.name if stored.name in FLOATS else "float32"
    if quantization is not None:
        raw["quantization_config"] = quantization
    write_json(folder / "config.json", raw)
    copy_carried(model, folder)
