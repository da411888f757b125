"""Sizes to the byte: an artifact's arrays as shapes, named and laid out by what writes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lqec_jax.core.sites import get_all, put_all
from lqec_jax.core.tree import set_at
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import name_arrays
from lqec_jax.io.artifact.leaves import name_format
from lqec_jax.io.files import measure_tensors, read_json
from lqec_jax.io.sources.source import open_dense, open_folder
from lqec_jax.io.tensor_file import shard_arrays
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.parameters import with_constants
from lqec_jax.recipe import Recipe
from lqec_jax.runs.linears import preview
from lqec_kernels.formats import CompressedLinear

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sizes:
    """What a recipe makes of a model, in bytes; nothing of it was read or computed.

    Attributes:
      weights: of every weight of the linears of all blocks together.
      linears: stored bytes of those linears.
      files: bytes of the artifact's safetensors files.
      dense_block, block: one block's arrays, dense and compressed.
      outer: embedding, last norm and head.
      adapters: numbers in low-rank corrections.
      leaves: what becomes of one block's linears, as shapes.
      groups: (d_in, sum of d_out) of the linears that read one input, in data-flow order.
      largest: numbers in the largest linear.
    """

    config: ModelConfig
    stored_dtype: np.dtype
    rows: tuple[dict[str, Any], ...]
    weights: int
    linears: int
    files: int
    dense_block: int
    block: int
    outer: int
    adapters: int
    leaves: tuple[CompressedLinear, ...]
    groups: tuple[tuple[int, int], ...]
    largest: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.linears / self.weights

    @property
    def widest(self) -> int:
        """Returns the largest d_in of a linear."""
        return max(row["d_in"] for row in self.rows)

    @property
    def dense(self) -> int:
        return self.outer + self.config.layers * self.dense_block

    @property
    def student(self) -> int:
        """Returns the bytes of the whole compressed model's arrays."""
        return self.outer + self.config.layers * self.block


def measure_model(folder: str, recipe: Recipe) -> Sizes:
    """Measures what `recipe` makes of a checkpoint, from its config.json and headers.

    A folder with a config.json and no weights is measured by its `torch_dtype`.

    Raises:
      InputError: no such folder or hub id; a config or a header that is not a model this library
        knows; a step that refuses a shape.
    """
    config, dtype = _open(folder)
    family = families.family(config.family)
    fns = model_fns(config)
    shapes = family.block_shapes(config)
    leaves = preview(fns, {site.path: site.shape for site in fns.sites}, recipe)
    dense: Params = {}
    for path, shape in shapes.items():
        dense = set_at(dense, path, jax.ShapeDtypeStruct(shape, dtype))
    dense = with_constants(config, 0, dense)
    block = put_all(dense, leaves)
    outer: Params = {}
    for path, stored in family.outer_tensors(config).items():
        outer = set_at(outer, path, jax.ShapeDtypeStruct(stored.inner_shape, dtype))
    return _measure(config, np.dtype(dtype), fns.linear_groups, dense, block, outer)


def _measure(config, dtype, groups, dense: Params, block: Params, outer: Params) -> Sizes:
    kernels = get_all(block, [path for group in groups for path in group])
    rows = tuple(_row(path, leaf, config.layers) for path, leaf in kernels.items())
    params = {**outer, "blocks": ((_stack(block, config.layers)),)}
    arrays, _ = name_arrays(jax.tree.map(_stand_in, params))
    adapters = sum(
        a.size for leaf in kernels.values() for c in leaf.corrections for a in jax.tree.leaves(c)
    )
    counts = [leaf.d_in * leaf.d_out for leaf in kernels.values()]
    return Sizes(
        config=config,
        stored_dtype=dtype,
        rows=rows,
        weights=config.layers * sum(counts),
        linears=sum(row["stored_bytes"] for row in rows),
        files=sum(measure_tensors(shard) for shard in shard_arrays(arrays)),
        dense_block=_bytes(dense),
        block=_bytes(block),
        outer=_bytes(outer),
        adapters=config.layers * adapters,
        leaves=tuple(kernels.values()),
        groups=tuple(
            (kernels[group[0]].d_in, sum(kernels[path].d_out for path in group)) for group in groups
        ),
        largest=max(counts),
    )


def _row(path: str, leaf: CompressedLinear, layers: int) -> dict[str, Any]:
    return {
        "path": path,
        "count": layers,
        "d_in": leaf.d_in,
        "d_out": leaf.d_out,
        "format": name_format(leaf),
        "bits_per_weight": leaf.bits_per_weight,
        "stored_bytes": layers * leaf.stored_bits() // 8,
    }


def _stack(block: Params, layers: int) -> Params:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((layers, *s.shape), s.dtype), block)


def _stand_in(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns an array of that shape and dtype which takes no memory."""
    return np.broadcast_to(np.zeros((), shape.dtype), shape.shape)


def _bytes(tree: Any) -> int:
    return sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(tree))


def _open(name: str) -> tuple[ModelConfig, Any]:
    """Returns the model and the dtype its weights are stored in."""
    found = open_folder(name)
    if found.kind in ("bare", "flax"):  # of Flax weights the headers say nothing
        raw = read_json(found.folder / "config.json")
        return families.read_config(raw), _named_dtype(found.folder, raw)
    checkpoint, config, family = open_dense(found)
    return config, checkpoint.dtype(family.outer_tensors(config)["embed/embedding"].name)


def _named_dtype(folder: Any, raw: Mapping[str, Any]) -> Any:
    name = raw.get("dtype", raw.get("torch_dtype", "float32"))
    if name not in DTYPES:
        raise InputError(
            f"{folder}/config.json: dtype {name!r}, and there are no weights to look at; one of "
            f"{', '.join(DTYPES)} was wanted"
        )
    return jax.numpy.dtype(name)
