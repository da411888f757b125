"""NNX: a packed parameter that reads as the dense array, and layers that multiply by it.

A module's own `nnx.Linear` and `nnx.LinearGeneral` become layers of the same content that make no
dense copy. Whatever else reads a packed parameter, a state merged into the old definition of its
module too, reads the dense array.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from flax.nnx import reprlib
from flax.nnx.nn.dtypes import promote_dtype

from lqec_jax.foreign.kernel import PackedKernel, multiply


class PackedParam(nnx.Param):
    """An `nnx.Param` that holds a PackedKernel; `param[...]` is the dense weight.

    NNX layers read `kernel[...]`, operators and `jnp` functions `get_value`; both are the same
    here. To write into it, replace the parameter.
    """

    def get_value(self, **how: Any) -> Any:
        w, index = self.get_raw_value().unbox(), how.get("index", ...)
        return w if index is ... else w[index]

    def __nnx_repr__(self) -> Iterator[Any]:
        yield reprlib.Object(type=type(self).__name__)
        yield reprlib.Attr("packed", self.get_raw_value())


class PackedLinear(nnx.Linear):
    """An `nnx.Linear` that multiplies by its packed kernel, see `lqec_jax.linear`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = _multiply(self, inputs, (-1,), (self.out_features,), out_sharding)
        return super().__call__(inputs, out_sharding) if y is None else y


class PackedLinearGeneral(nnx.LinearGeneral):
    """An `nnx.LinearGeneral` that multiplies by its packed kernel, see `lqec_jax.linear`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = _multiply(self, inputs, self.axis, self.out_features, out_sharding)
        return super().__call__(inputs, out_sharding) if y is None else y


# Of these exactly: a class made from one may multiply in its own way.
LAYERS = {nnx.Linear: PackedLinear, nnx.LinearGeneral: PackedLinearGeneral}


def is_nnx(tree: Any) -> bool:
    return isinstance(tree, nnx.State | nnx.Module)


def open_module(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """Takes apart a module or a state of one.

    Returns:
      path -> array or PackedKernel of every `nnx.Param`, and a function that makes a new module, or
      state, with packed kernels at some paths; sharding names of the arrays they replace are gone.
      The new module's layers with such kernels multiply by them.
    """
    definition, state = (None, tree) if isinstance(tree, nnx.State) else nnx.split(tree)
    variables = list(nnx.to_flat_state(state))
    weights = {
        _join(path): variable.get_raw_value()
        for path, variable in variables
        if isinstance(variable, nnx.Param)
    }

    def put(values: Mapping[str, PackedKernel]) -> Any:
        new = nnx.from_flat_state(
            (path, PackedParam(values[_join(path)]) if _join(path) in values else variable)
            for path, variable in variables
        )
        return new if definition is None else _exchange_layers(nnx.merge(definition, new))

    return weights, put


def _exchange_layers(module: nnx.Module) -> nnx.Module:
    """Gives the layers of a new module whose kernels are packed the class that multiplies so."""
    for _, node in nnx.iter_graph(module):
        if type(node) in LAYERS and isinstance(node.kernel, PackedParam):
            # The object stays, so that whoever shares it in the module still does.
            object.__setattr__(node, "__class__", LAYERS[type(node)])
    return module


def _multiply(layer: Any, x: Any, axis: tuple, features: tuple, out_sharding: Any) -> Any:
    """Returns the product, None where it is not to be made from the packed kernel."""
    own_way = (layer.precision, layer.preferred_element_type, out_sharding,
               getattr(layer, "dot_general_cls", None))  # fmt: skip
    plain = (
        all(option is None for option in own_way)
        and layer.dot_general in (None, jax.lax.dot_general)
        and layer.promote_dtype is promote_dtype
        and not getattr(layer, "batch_axis", ())
    )
    if not plain or not isinstance(layer.kernel, PackedParam):
        return None
    bias = None if layer.bias is None else layer.bias[...]
    return multiply(x, layer.kernel.get_raw_value(), bias, axis, features, layer.dtype)


def _join(path: tuple) -> str:
    return "/".join(map(str, path))
