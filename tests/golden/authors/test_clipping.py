"""The clipped grid of OmniQuant and ApiQ against their own, on one weight in groups of 32.

OpenGVLab/OmniQuant@95fae1b and BaohaoLiao/ApiQ@782adbd have one quantizer, whose outputs and
gradients were bit-equal. `core.clipping` is what both methods here train.
"""

from functools import partial

import jax
import numpy as np
import pytest

from lqec_jax.core.clipping import read_clipped, store_clipped
from lqec_jax.core.group_grid import GroupGrid, make_grid
from tests.golden.authors.problems import GROUP, codes_of, dequantize

FACTORS = ("init4", "rand", "tight")
# Σ (w - ŵ)² of our symmetric grid where training begins, in units of theirs: its levels are
# 2·absmax/(2^b - 1) apart, theirs absmax/(2^(b-1) - 1), which at 2 bits leaves the lowest unused.
SYMMETRIC = {2: 0.625, 3: 0.805, 4: 0.962}


@pytest.fixture(scope="module")
def stored(golden):
    return golden("lwc_quantizer")


def read(w, upstream, bits: int, clips: dict) -> tuple[np.ndarray, dict, object]:
    """Returns what is read of a weight, the gradients of the clips, and what is stored."""
    grid = make_grid("clipping", bits=bits, group_size=GROUP, symmetric="lower" not in clips,
                     scale_dtype="float32")  # fmt: skip
    clips = {name: logits.astype(np.float32) for name, logits in clips.items()}
    w_hat, gradients, base = compiled(w, upstream.astype(np.float32), clips, grid)
    return np.asarray(w_hat), gradients, base


@partial(jax.jit, static_argnames="grid")
def compiled(w, upstream, clips: dict, grid: GroupGrid) -> tuple:
    w_hat, pull = jax.vjp(lambda c: read_clipped(w, c, grid), clips)
    return w_hat, pull(upstream)[0], store_clipped(w, clips, grid)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_and_gradients_are_theirs(linear, stored, bits, factors):
    """No group of this weight has one sign, where their range leaves zero out and ours does not."""
    key = f"w{bits}_asym.{factors}"
    clips = {"upper": stored[f"factor.{factors}.up"], "lower": stored[f"factor.{factors}.low"]}
    w_hat, gradients, base = read(linear.w, stored["upstream"], bits, clips)
    same = (codes_of(base) == stored[f"{key}.codes"]).all(axis=0)
    assert np.sum(~same) <= 1  # half way between two codes, on another processor
    np.testing.assert_allclose(w_hat[:, same], dequantize(stored, key)[:, same], atol=1e-6)
    np.testing.assert_allclose(base.scales, stored[f"{key}.scale"], rtol=1e-6)
    for name, theirs in (("upper", "grad_up"), ("lower", "grad_low")):
        theirs = stored[f"{key}.{theirs}"]
        np.testing.assert_allclose(
            np.asarray(gradients[name])[:, same], theirs[:, same], atol=1e-5 * np.abs(theirs).max()
        )


@pytest.mark.parametrize("bits", SYMMETRIC)
def test_the_symmetric_grid_begins_nearer_to_the_weight_than_theirs(linear, stored, bits):
    clips = {"upper": stored["factor.init4.up"]}
    w_hat, _, _ = read(linear.w, stored["upstream"], bits, clips)
    theirs = dequantize(stored, f"w{bits}_sym.init4")
    ratio = np.sum(np.square(linear.w - w_hat)) / np.sum(np.square(linear.w - theirs))
    assert ratio == pytest.approx(SYMMETRIC[bits], abs=0.005)
    if bits == 2:
        assert len(np.unique(stored["w2_sym.init4.codes"])) == 3
