"""Which axes of somebody's kernel are inputs, outputs, and a stack of layers.

Written as one letter an axis: 'io' is a Dense kernel, 'ioo' the [d_model, heads, head_dim] of a
query, 'iio' the [heads, head_dim, d_model] of an attention's output, 'lio' a stack of Dense kernels
as `nn.scan` keeps it. Nothing in a tree says which is which, so what is not plain from the sizes of
the bias beside it, or from Flax's own names, has to be told.
"""

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

from lqec_jax.errors import InputError

Shape = tuple[int, ...]
PROJECTIONS = ("query", "key", "value")  # one input axis, in flax.linen's and nnx's attention
OUTPUTS = ("out",)  # one output axis


def check_told(told: Mapping[str, str]) -> dict[str, str]:
    """Returns what was told of axes, or says what is wrong with it."""
    if not isinstance(told, Mapping):
        raise InputError(
            f"quantize_tree: axes={told!r}; a dict was wanted, such as {{'*/query/kernel': 'ioo'}}"
        )
    for pattern, axes in told.items():
        if not (isinstance(pattern, str) and isinstance(axes, str) and _is_axes(axes)):
            raise InputError(
                f"quantize_tree: axes={{{pattern!r}: {axes!r}}}; one letter an axis was wanted, "
                "i for inputs, o for outputs, after any l for stacked layers, such as 'lioo'"
            )
    return dict(told)


def read_axes(path: str, shapes: Mapping[str, Shape], told: Mapping[str, str]) -> str | None:
    """Returns a kernel's axes: as told, else as its bias, its name and its neighbours say.

    Args:
      shapes: of the whole tree, by path.
      told: glob of paths -> axes; the first that matches counts.
    Returns:
      One letter an axis, or None where more than one reading is left.
    Raises:
      InputError: another number of axes was told than the kernel has.
    """
    shape = shapes[path]
    for pattern, axes in told.items():
        if fnmatchcase(path, pattern):
            if len(axes) != len(shape):
                raise InputError(
                    f"quantize_tree: axes={{{pattern!r}: {axes!r}}} names {len(axes)} axes, {path} "
                    f"has {len(shape)}: {list(shape)}"
                )
            return axes
    if len(shape) == 2:
        return "io"
    readings = _read_bias(shape, _bias_of(path, shapes))
    if len(readings) == 1:
        return readings[0]
    named = _read_name(path, len(shape), stacked=_is_stacked(path, shapes))
    return named if not readings or named in readings else None


def split_shape(shape: Shape, axes: str) -> tuple[Shape, Shape, Shape]:
    """Returns the sizes of the stacked axes, the inputs and the outputs."""
    return tuple(
        tuple(size for size, axis in zip(shape, axes, strict=True) if axis == letter)
        for letter in "lio"
    )


def order_axes(axes: str) -> tuple[int, ...]:
    """Returns the permutation that puts inputs before outputs, stacked axes left where they are."""
    return tuple(sorted(range(len(axes)), key=lambda axis: "lio".index(axes[axis])))


def count_weights(shape: Shape, axes: str) -> tuple[int, int, int]:
    """Returns (layers, d_in, d_out) of a kernel."""
    return tuple(math.prod(sizes) for sizes in split_shape(shape, axes))


def _is_axes(axes: str) -> bool:
    return bool(re.fullmatch("l*[io]+", axes)) and "i" in axes and "o" in axes


def _bias_of(path: str, shapes: Mapping[str, Shape]) -> Shape | None:
    module, slash, name = path.rpartition("/")
    return shapes.get(f"{module}{slash}bias") if name == "kernel" else None


def _read_bias(shape: Shape, bias: Shape | None) -> list[str]:
    """Returns every reading under which a bias has the stack and the outputs of its kernel."""
    if bias is None:
        return []
    readings = []
    for stacked in range(min(len(bias), len(shape) - 1)):
        outputs = len(bias) - stacked
        inputs = len(shape) - stacked - outputs
        if inputs >= 1 and bias == shape[:stacked] + shape[stacked + inputs :]:
            readings.append("l" * stacked + "i" * inputs + "o" * outputs)
    return readings


def _read_name(path: str, rank: int, *, stacked: bool) -> str | None:
    module = path.rpartition("/")[0].rpartition("/")[2]
    matrix = rank - stacked
    if stacked and matrix == 2:
        return "lio"
    if module in PROJECTIONS:
        return "l" * stacked + "i" + "o" * (matrix - 1)
    if module in OUTPUTS:
        return "l" * stacked + "i" * (matrix - 1) + "o"
    return None


def _is_stacked(path: str, shapes: Mapping[str, Shape]) -> bool:
    """Says whether the kernel lies in a scanned block.

    There every array begins with the number of layers, the norm's scale too, which has one axis
    elsewhere.
    """
    parts = path.split("/")[:-1]
    for depth in range(len(parts) + 1):
        prefix = "".join(f"{part}/" for part in parts[:depth])
        inside = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
        first = {shape[:1] for shape in inside.values()}
        if len(first) == 1 and any(
            name.rpartition("/")[2] == "scale" and len(shape) == 2 for name, shape in inside.items()
        ):
            return True
    return False
