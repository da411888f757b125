"""What a weight reads, rounded: quantized inputs as emulation, in the dtype they came in."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

# Formats of 8 bits by their name here. SLiM's code takes e5m2 where a tensor's largest magnitude
# is 488 or more, which a scale makes needless.
FLOATS = {"fp8": jnp.float8_e4m3fn, "fp8_e5m2": jnp.float8_e5m2}
FORMATS = (*FLOATS, "int")
SPANS = ("tensor", "token")


@dataclass(frozen=True)
class InputGrid:
    """Rounds inputs to few levels, with scales of the inputs themselves.

        x̂ = s · round(x / s),  s = max |x| / M over what shares a scale

    with the nearest number of an 8-bit float whose largest is M, or with integers up to
    M = 2^(bits-1) - 1. The products still run in x's own dtype: this says what such inputs lose, it
    is no faster. Gradients pass unchanged (straight through).

    Attributes:
      kind: 'fp8' (e4m3), 'fp8_e5m2' or 'int'.
      bits: 8 for floats, 2-8 for integers.
      per: 'tensor', one scale for a window, its tokens and channels together, so that a token's
        rounding depends on those after it; or 'token'.
    """

    kind: str = "fp8"
    bits: int = 8
    per: str = "tensor"

    def apply(self, x: jax.Array) -> jax.Array:
        """Rounds x [..., tokens, d_in], or [d_in], which is one token."""
        wide = x.astype(jnp.float32)
        axes = (-1,) if self.per == "token" or x.ndim == 1 else (-2, -1)
        absmax = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
        scale = jnp.where(absmax > 0, absmax, 1.0) / self.largest
        levels = wide / scale
        if self.kind == "int":
            levels = jnp.round(levels)
        else:
            # A quotient may round to above the largest, which is no number of this format.
            levels = jnp.clip(levels, -self.largest, self.largest)
            levels = levels.astype(FLOATS[self.kind]).astype(jnp.float32)
        rounded = (levels * scale).astype(x.dtype)
        # x less itself is exactly zero, so the rounded numbers stay what they are.
        return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))

    @property
    def largest(self) -> float:
        """Returns M, the level that the largest magnitude becomes."""
        if self.kind == "int":
            return 2.0 ** (self.bits - 1) - 1
        return float(jnp.finfo(FLOATS[self.kind]).max)
