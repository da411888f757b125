"""Parameter trees as named arrays plus a description of every compressed weight, and back.

A dense array keeps its path, 'attn_norm.scale'. A compressed weight becomes one array a field,
'attn.q.base.codes', and one description: which format each operator is, with its static fields, and
those of the operators inside it. A new format needs one line in `FORMATS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import jax
import numpy as np

from lqec_jax.core.sites import linear_path, put
from lqec_jax.core.tree import is_compressed, set_at
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_kernels import (
    adapters,
    bitplanes,
    codebook,
    formats,
    outliers,
    sparse,
    sums,
    transforms,
)
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.inputs import InputGrid
from lqec_kernels.repacking import REPACKED, DenseCopy

FORMATS: dict[str, type] = {
    "dense": formats.Dense,
    "affine": formats.Affine,
    "low_rank": formats.LowRank,
    "quantized_low_rank": adapters.QuantizedLowRank,
    "channel_scale": transforms.ChannelScale,
    "hadamard": transforms.Hadamard,
    "codebook": codebook.Codebook,
    "double_scales": codebook.DoubleScales,
    "sum": sums.Sum,
    "bit_planes": bitplanes.BitPlanes,
    "outliers": outliers.Outliers,
    "masked": sparse.Masked,
    "sparse24": sparse.Sparse24,
}
_NAMES = {cls: name for name, cls in FORMATS.items()}


def check_stored(verb: str, params: Params) -> None:
    """Refuses weights in a form that is for products and that no file holds."""
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    if any(is_compressed(w) and isinstance(w.base, (*REPACKED, DenseCopy)) for w in leaves):
        raise InputError(
            f"{verb}: the weights are repacked for products, which no file holds; give the model "
            "that `repack` was given"
        )


def flatten(tree: Params, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """Takes nested dicts apart.

    Returns:
      Arrays by dotted name, and descriptions of the compressed weights by path ('attn/q').
    """
    arrays: dict[str, np.ndarray] = {}
    weights: dict[str, dict] = {}
    for key, node in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(node, CompressedLinear):
            path = linear_path(path) or path  # names leave the rest out
            weights[path] = _describe_linear(node, path, arrays)
        elif isinstance(node, dict):
            inner_arrays, inner_weights = flatten(node, path)
            arrays |= inner_arrays
            weights |= inner_weights
        else:
            arrays[_dotted(path)] = np.asarray(jax.device_get(node))
    return arrays, weights


def unflatten(arrays: Mapping[str, np.ndarray], weights: Mapping[str, dict]) -> Params:
    """Puts nested dicts together again: the inverse of `flatten`.

    Raises:
      InputError: an operator of a format this version does not know; a missing array.
    """
    tree: Params = {}
    used = set()
    for path, description in weights.items():
        leaf, names = _build_linear(path, description, arrays)
        tree = put(tree, path, leaf)
        used |= names
    for name, array in arrays.items():
        if name not in used:
            tree = set_at(tree, name.replace(".", "/"), array)
    return tree


def name_format(leaf: CompressedLinear) -> str:
    """Writes what a weight is made of: 'affine(bits=2, group_size=32) + low_rank(rank=16)'."""

    def name(operator: Any) -> str:
        said = []
        for field in dataclasses.fields(operator):
            value = getattr(operator, field.name)
            if field.metadata.get("static"):
                if field.name not in ("d_in", "d_out") and value not in ("", field.default):
                    said.append(f"{field.name}={value}")
            elif type(value) in _NAMES:  # an operator around another
                said.append(name(value))
        if hasattr(operator, "rank"):
            said.append(f"rank={operator.rank}")
        inside = ", ".join(said)
        return f"{_NAMES[type(operator)]}({inside})" if inside else _NAMES[type(operator)]

    words = [name(operator) for operator in (leaf.base, *leaf.corrections)]
    sides = (("input", leaf.input_transform), ("output", leaf.output_transform))
    words += [f"{side} {name(t)}" for side, t in sides if t is not None]
    grid = leaf.input_grid
    if grid is not None:
        words.append(f"inputs {grid.kind}(bits={grid.bits}, per={grid.per})")
    return " + ".join(words)


def _describe_linear(leaf: CompressedLinear, path: str, arrays: dict) -> dict:
    def describe(operator: Any, place: str) -> dict | None:
        return None if operator is None else _describe(operator, f"{path}/{place}", arrays)

    description = {
        "base": describe(leaf.base, "base"),
        "corrections": [describe(c, f"corrections/{i}") for i, c in enumerate(leaf.corrections)],
        "input_transform": describe(leaf.input_transform, "input_transform"),
        "output_transform": describe(leaf.output_transform, "output_transform"),
    }
    if leaf.input_grid is None:
        return description
    return {**description, "input_grid": dataclasses.asdict(leaf.input_grid)}


def _describe(operator: Any, path: str, arrays: dict) -> dict:
    """Adds an operator's arrays to `arrays` and returns its static half."""
    description: dict[str, Any] = {"format": _NAMES[type(operator)]}
    for field in dataclasses.fields(operator):
        value = getattr(operator, field.name)
        if field.metadata.get("static"):
            description[field.name] = value
        elif type(value) in _NAMES:
            description[field.name] = _describe(value, f"{path}/{field.name}", arrays)
        elif value is not None:
            arrays[_dotted(f"{path}/{field.name}")] = np.asarray(jax.device_get(value))
    return description


def _build_linear(path: str, description: dict, arrays: Mapping) -> tuple[CompressedLinear, set]:
    names: set[str] = set()

    def build(part: dict | None, place: str) -> Any:
        return None if part is None else _build(part, f"{path}/{place}", arrays, names)

    corrections = enumerate(description["corrections"])
    leaf = CompressedLinear(
        base=build(description["base"], "base"),
        corrections=tuple(build(part, f"corrections/{i}") for i, part in corrections),
        input_transform=build(description["input_transform"], "input_transform"),
        output_transform=build(description["output_transform"], "output_transform"),
        input_grid=InputGrid(**description["input_grid"]) if "input_grid" in description else None,
    )
    return leaf, names


def _build(description: dict, path: str, arrays: Mapping, names: set[str]) -> Any:
    cls = FORMATS.get(description["format"])
    if cls is None:
        raise InputError(
            f"{path}: format {description['format']!r} is not known to this version; "
            f"known: {', '.join(FORMATS)}; upgrade lqec-jax"
        )
    values = {}
    for field in dataclasses.fields(cls):
        name = _dotted(f"{path}/{field.name}")
        if field.metadata.get("static"):
            values[field.name] = _read_static(description, field)
        elif field.name in description:
            place = f"{path}/{field.name}"
            values[field.name] = _build(description[field.name], place, arrays, names)
        elif name in arrays:
            names.add(name)
            values[field.name] = arrays[name]
        elif type(None) in get_args(field.type):
            values[field.name] = None
        else:
            raise InputError(f"{name} is missing from the weights; write the artifact again")
    return cls(**values)


def _read_static(description: dict, field: dataclasses.Field) -> Any:
    """Returns a static field; one with a default may be younger than the file."""
    if field.default is dataclasses.MISSING:
        return description[field.name]
    return description.get(field.name, field.default)


def _dotted(path: str) -> str:
    return path.replace("/", ".")
