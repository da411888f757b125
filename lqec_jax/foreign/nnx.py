"""NNX: a parameter that is stored packed and reads as the dense array."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx
from flax.nnx import reprlib

from lqec_jax.foreign.kernel import PackedKernel


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


def is_nnx(tree: Any) -> bool:
    return isinstance(tree, nnx.State | nnx.Module)


def open_module(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """Takes apart a module or a state of one.

    Returns:
      path -> array or PackedKernel of every `nnx.Param`, and a function that makes a new module, or
      state, with packed kernels at some paths; sharding names of the arrays they replace are gone.
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
        return new if definition is None else nnx.merge(definition, new)

    return weights, put


def _join(path: tuple) -> str:
    return "/".join(map(str, path))
