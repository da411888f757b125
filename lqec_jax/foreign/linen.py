"""Linen: parameters as a tree of arrays and boxes, and the products that never make them dense."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import meta
from flax.linen.dtypes import promote_dtype

from lqec_jax.foreign.kernel import PackedKernel, multiply

COLLECTION = "params/"


def open_params(tree: Any) -> tuple[dict[str, Any], Callable[[Mapping[str, Any]], Any]]:
    """Takes apart the parameters of a linen model, or its variables, of which it sees 'params'.

    Returns:
      path -> array or PackedKernel, and a function that puts other values at some paths and returns
      the whole tree. A box of partition names gives way: they are about an array that is gone.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=meta.is_axis_metadata)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named]
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        paths = [path[len(COLLECTION) :] if path.startswith(COLLECTION) else "" for path in paths]
    nodes = [node if isinstance(node, PackedKernel) else meta.unbox(node) for _, node in named]
    weights = {path: node for path, node in zip(paths, nodes, strict=True) if path}

    def put(values: Mapping[str, Any]) -> Any:
        # A box that was not chosen stays.
        return structure.unflatten(
            [values.get(path, node) for path, (_, node) in zip(paths, named, strict=True)]
        )

    return weights, put


def packed() -> Any:
    """Returns a context in which `nn.Dense` and `nn.DenseGeneral` multiply by packed weights.

    Without it a quantized kernel is made dense when its module reads it, and autodiff keeps the
    dense copy. Inside, neither pass does, see `lqec_jax.linear`. What else reads a kernel (own
    parameters, convolutions, layers with batch_dims, or with a dot_general, promote_dtype or
    precision of their own) still reads the dense one. NNX needs no context, see `foreign.nnx`.

    Flax applies it while a model is traced: open it inside the function that you compile.

    Example:
      >>> @jax.jit
      ... def apply(params, x):
      ...     with lqec.packed():
      ...         return model.apply({"params": params}, x)
    """
    return nn.intercept_methods(_multiply_packed)


def _multiply_packed(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    module = context.module
    if context.method_name != "__call__" or not _is_plain(module):
        return call(*args, **kwargs)
    kernel = module.get_variable("params", "kernel")
    bias = meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
    axis, features = _tuple(getattr(module, "axis", -1)), _tuple(module.features)
    x = (*args, *kwargs.values())[0]
    y = multiply(x, kernel, bias, axis, features, module.dtype)
    return call(*args, **kwargs) if y is None else y


def _is_plain(module: nn.Module) -> bool:
    """Says whether a module is a Dense or DenseGeneral that multiplies as Flax's own do."""
    kinds = [kind for kind in (nn.Dense, nn.DenseGeneral) if isinstance(module, kind)]
    return (
        bool(kinds)
        and type(module).__call__ is kinds[0].__call__
        and module.dot_general is None
        and module.dot_general_cls is None
        and module.promote_dtype is promote_dtype
        and module.precision is None
        and not getattr(module, "batch_dims", ())
    )


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)
