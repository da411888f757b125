"""Devices as a (data, model) mesh, and where each array of a model lives on it.

Windows are split over `data`. Weights follow Megatron: a column-parallel weight is split along
d_out, a row-parallel one (it reads what the former wrote) along d_in. Packed arrays are split on
the same axes as the weight they stand for, and only where no run of 32 codes and no group straddles
two devices; otherwise that weight is held whole by every device, and said to be.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lqec_jax.core.sites import linear_path
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.errors import InputError
from lqec_kernels.formats import Base, CompressedLinear, Correction

DATA, MODEL = "data", "model"


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """Returns a mesh over the first data·model devices, its axes under the compiler's control.

    Raises:
      InputError: there are not so many devices.
    """
    devices = jax.devices()
    if data * model > len(devices):
        raise InputError(
            f"mesh: data={data} x model={model} needs {data * model} devices; "
            f"{len(devices)} are here; choose a smaller mesh"
        )
    grid = np.array(devices[: data * model]).reshape(data, model)
    # The default, AxisType.Explicit, refuses optimizer steps and decompositions of sharded arrays.
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def shard_params(fns: ModelFns, params: Params, mesh: Mesh) -> tuple[Params, tuple[str, ...]]:
    """Puts a model on a mesh.

    Returns:
      The parameters as sharded arrays, and one line for each kind of weight that had to be
      replicated, with the reason.
    """
    shardings, notes = param_shardings(fns, params, mesh)
    return jax.tree.map(put, params, shardings), notes


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array on devices of one or more processes; all processes hold it, or its parts."""
    spread = isinstance(array, jax.Array) and not array.is_fully_addressable
    if jax.process_count() == 1 or spread:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def param_shardings(fns: ModelFns, params: Params, mesh: Mesh) -> tuple[Params, tuple[str, ...]]:
    """Returns a tree of shardings shaped like `params`, and notes on what is replicated."""
    parts = mesh.shape[MODEL]
    whole = NamedSharding(mesh, PartitionSpec())
    notes: dict[str, None] = {}

    def place(path: tuple, node: Any) -> Any:
        name = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        name = linear_path(name.removeprefix("blocks/"))
        if name not in fns.linears or parts == 1:
            return jax.tree.map(lambda _: whole, node)
        axis = -2 if name in fns.row_parallel else -1
        reason = _straddles(node, axis, parts)
        if reason:
            notes[f"{name} is held whole by every device: {reason}"] = None
            return jax.tree.map(lambda _: whole, node)
        return _place_linear(node, axis, mesh)

    is_leaf = lambda node: isinstance(node, CompressedLinear)  # noqa: E731
    shardings = jax.tree_util.tree_map_with_path(place, params, is_leaf=is_leaf)
    return shardings, tuple(notes)


def _straddles(node: Any, axis: int, parts: int) -> str:
    """Says why a weight cannot be split evenly along an axis; empty if it can."""
    width, unit = _measure(node.base if isinstance(node, CompressedLinear) else node, axis)
    if width % (parts * unit):
        what = "d_out" if axis == -1 else "d_in"
        return f"{what}={width} is not a multiple of {parts} devices x {unit}"
    return ""


def _measure(node: Base | jax.Array, axis: int) -> tuple[int, int]:
    """Returns how many inputs (axis -2) or outputs (-1) there are, and how many go together."""
    if hasattr(node, "unit"):
        return (node.d_in if axis == -2 else node.d_out), node.unit(axis)
    return node.shape[axis], 1


def _place_linear(node: Any, axis: int, mesh: Mesh) -> Any:
    """Shards every array of a weight along the axis that stands for d_in (-2) or d_out (-1).

    An array without that axis, or with one that the devices cannot share, is held by all of them.
    """

    def spec(array: jax.Array, axis: int | None) -> NamedSharding:
        names = [None] * array.ndim
        if axis is not None and array.ndim >= -axis and array.shape[axis] % mesh.shape[MODEL] == 0:
            names[axis] = MODEL
        return NamedSharding(mesh, PartitionSpec(*names))

    def along(axis: int | None) -> Callable:
        return lambda array: spec(array, axis)

    if not isinstance(node, CompressedLinear):
        return spec(node, axis)

    def place_correction(correction: Correction) -> Correction:
        """Splits the fields on the split side where none of their units straddles."""
        placed = jax.tree.map(along(None), correction)
        for name, where in correction.axes(axis).items():
            field = getattr(correction, name)
            width, unit = _measure(field, where)
            if width % (mesh.shape[MODEL] * unit) == 0:
                placed = dataclasses.replace(placed, **{name: jax.tree.map(along(where), field)})
        return placed

    one_axis = -1 if axis == -2 else None  # a transform's vector follows the side it acts on
    return CompressedLinear(
        base=jax.tree.map(along(axis), node.base),
        corrections=tuple(place_correction(c) for c in node.corrections),
        input_transform=jax.tree.map(along(one_axis), node.input_transform),
        output_transform=jax.tree.map(along(-1 if axis == -1 else None), node.output_transform),
        input_grid=node.input_grid,
    )
