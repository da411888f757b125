"""A decoder as one ordinary linen module over a plain tree of arrays, packed weights included.

Every array, codes too, is declared with `self.param` under its own name, so the tree is what any
Flax tool expects, and linen checks its shapes. What a packed weight is made of (bits, group size)
is static and belongs to the module.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from lqec_jax.core.types import ModelFns


class Arrays(nn.Module):
    """A nested dict of parameters: no computation, only their names, shapes and dtypes."""

    shapes: Mapping[str, Any]

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        return declare(self, self.shapes)


def declare(module: nn.Module, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Declares a nested dict of arrays as a module's parameters and returns their values."""
    values = {}
    for name, spec in shapes.items():
        if isinstance(spec, Mapping):
            values[name] = Arrays(spec, name=name, parent=module)()
        else:
            values[name] = module.param(name, nn.initializers.zeros, spec.shape, spec.dtype)
    return values


class Decoder(nn.Module):
    """Tokens int [b, t] -> logits float32 [b, t, vocab].

    `init` gives zeros of the right shapes: the parameters are those that were loaded with it.

    Attributes:
      fns: the model's functions, from `decoder.model_fns`.
      shapes: nested dict of `jax.ShapeDtypeStruct`, one an array.
      weights: what each packed weight is made of, path -> description.
      build: (values, weights) -> the decoder's parameter tree; copies nothing.
    All are hashable where dicts are frozen, as `nnx.jit` wants of a module.
    """

    fns: ModelFns
    shapes: Mapping[str, Any]
    weights: Mapping[str, Any]
    build: Callable

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        params = self.build(declare(self, self.shapes), self.weights)
        return self.fns.head(params, self.fns.hidden(params, tokens)[1])
