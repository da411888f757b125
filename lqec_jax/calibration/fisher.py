"""The diagonal Fisher of every linear of a dense model, one block's weights at a time.

    F = 1/n Σ_windows (∂ L / ∂ w)²,   L = Σ_t -log p(x[t+1] | x[..t]) of one window

the empirical Fisher of Kim et al. 2023, arXiv:2306.07629, §3.1 (Optimal Brain Damage's curvature).
Gradients are squared window by window, so windows pass the backward sweep one after the other.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.disk import make_array
from lqec_jax.core.sites import get_all, put_all
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.core.walking import compile_block, compile_embed, cut_rows
from lqec_jax.train.vocabulary import next_token_nll


def diagonal_fisher(
    fns: ModelFns,
    outer: Params,
    load_block: Callable[[int], Params],
    layers: int,
    windows: np.ndarray,
    folder: Path,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (layer, path -> mean squared gradient), the last block first.

    Args:
      outer: embedding, norm and head.
      load_block: layer -> a block's dense tree.
      windows: int [n, t].
      folder: for what enters every block, layers + 1 mapped arrays of n · t · d; they are removed
        at the end.
    Yields:
      float32 [d_in, d_out] for every linear; a window's loss is a sum over its tokens.
    Cost: three forward passes of the model in time; one dense block, its gradient and the sum of
      squares in memory.
    """
    first = jax.eval_shape(fns.embed, outer, windows[:1])
    shape, files = (len(windows), *first.shape[1:]), []

    def hold(name: str) -> np.memmap:
        files.append(folder / f"{name}.bin")
        return make_array(files[-1], first.dtype, shape)

    h = [hold(f"input-{layer}") for layer in range(layers)]
    slope = hold("slope")
    rows = cut_rows(*windows.shape)
    for some in rows:
        h[0][some] = compile_embed(fns)(outer, windows[some])
    for layer in range(layers):
        block, out = load_block(layer), h[layer + 1] if layer + 1 < layers else slope
        for some in rows:
            out[some] = compile_block(fns)(block, np.asarray(h[layer][some]))
    for some in rows:
        slope[some] = _head_slope(fns)(outer, np.asarray(slope[some]), windows[some])
    for layer in reversed(range(layers)):
        block = load_block(layer)
        sums = {p: np.zeros(w.shape, np.float32) for p, w in get_all(block, fns.sites).items()}
        for some in rows:
            at = (np.asarray(h[layer][some]), np.asarray(slope[some]))
            sums, slope[some] = _backward(fns)(block, sums, *at)
        yield layer, {path: np.asarray(total) / len(windows) for path, total in sums.items()}
    for path in files:
        path.unlink()


@lru_cache(maxsize=8)
def _head_slope(fns: ModelFns) -> Callable:
    """Returns (outer, last h [b, t, d], tokens) -> ∂ loss / ∂ h, of each window its own loss."""

    def loss(h, outer, tokens):
        return jnp.sum(next_token_nll(fns, outer, fns.norm(outer, h), tokens))

    return jax.jit(lambda outer, h, tokens: jax.grad(loss)(h, outer, tokens))


@lru_cache(maxsize=8)
def _backward(fns: ModelFns) -> Callable:
    """Returns (block, sums, h, slope after it) -> (sums of squares, slope before it)."""

    @partial(jax.jit, donate_argnums=1)
    def sweep(block: Params, sums: dict, h: jax.Array, slope: jax.Array):
        kernels = {path: w.astype(jnp.float32) for path, w in get_all(block, sums).items()}

        def answer(kernels: dict, h: jax.Array) -> jax.Array:
            return fns.block(put_all(block, kernels), h[None])[0][0]

        def add(sums: dict, window):
            _, pull = jax.vjp(answer, kernels, window[0])
            d_kernels, d_h = pull(window[1])
            return jax.tree.map(lambda total, d: total + jnp.square(d), sums, d_kernels), d_h

        return jax.lax.scan(add, sums, (h, slope))

    return sweep
