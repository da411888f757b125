"""What quantizers lose of independent Gaussian weights, beside the figures of theory and trial.

Mean squared error per weight of N(0, 1), at 2, 3 and 4 bits where a method has them. Figures of one
grid for all weights are integrals over the density; those of groups come from numpy trials in
float64, 40000 groups each (8000 where clips are searched). Inputs are uncorrelated. HIGGS and the
other widths of E8P have theirs beside their grids.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats, run_linear
from lqec_jax.recipe import parse_recipe
from lqec_kernels.formats import CompressedLinear, Dense

# A standard error below half a percent; a clip search costs eighty roundings. Long columns are for
# those with one grid each: 16 levels fitted to few weights fit them better than the density.
MANY, SEARCHED, LONG, LONGEST = (128, 8000), (128, 3000), (8192, 32), (65536, 2)
BITS = "bits={bits}"
DISTORTION = {
    f"rtn({BITS}, group_size=64)": (MANY, (0.20887, 0.03808, 0.00830)),
    f"rtn({BITS}, group_size=128)": (MANY, (0.25276, 0.04637, 0.01010)),
    f"rtn({BITS}, group_size=64, symmetric=True)": (MANY, (0.26100, 0.04848, 0.01057)),
    f"rtn({BITS}, group_size=128, symmetric=True)": (MANY, (0.30173, 0.05625, 0.01226)),
    f"rtn({BITS}, group_size=64, clip_search=True)": (SEARCHED, (0.12677, 0.03108, 0.00757)),
    f"rtn({BITS}, group_size=128, clip_search=True)": (SEARCHED, (0.13712, 0.03512, 0.00907)),
    f"rtn({BITS}, group_size=64, symmetric=True, clip_search=True)": (
        SEARCHED,
        (0.14453, 0.03629, 0.00902),
    ),
    f"rtn({BITS}, group_size=128, symmetric=True, clip_search=True)": (
        SEARCHED,
        (0.14801, 0.03885, 0.01031),
    ),
    f"hqq({BITS}, group_size=64, rounds=0)": (MANY, (0.2025, 0.03695, 0.00804)),
    f"hqq({BITS}, group_size=64)": (MANY, (0.1888, 0.03339, 0.00737)),
    "ternary(group_size=64, shift=False)": (MANY, (0.1869,)),
    "ternary(group_size=64)": (MANY, (0.1840,)),
    "ternary(group_size=128)": (MANY, (0.1877,)),
    "ternary(group_size=None, shift=False)": (LONG, (0.19179,)),
    "bcq(bits=1, group_size=None)": (LONG, (0.363380,)),
    f"nf({BITS}, group_size=64)": (MANY, (0.31644, 0.04060, 0.00846)),
    f"nf({BITS}, group_size=128)": (MANY, (0.35919, 0.04434, 0.00913)),
    "e8p(bits=2)": ((256, 600), (0.0909,)),
    f"slim_quant({BITS})": (LONG, (0.149431, 0.040638, 0.011864)),
    f"squeezellm({BITS}, weights='ones', outliers=0)": (LONGEST, (0.117482, 0.034548, 0.009501)),
}


@pytest.mark.parametrize("row", DISTORTION)
def test_distortion_of_gaussian_weights(row):
    shape, wanted = DISTORTION[row]
    w = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    steps = [parse_recipe(row.format(bits=bits)).steps[0] for bits in range(2, 2 + len(wanted))]

    @jax.jit
    def distort(w):
        stats = LinearStats(gram=jnp.eye(len(w)) if "gram" in steps[0].needs else None)
        problem = LinearProblem(w, stats, jax.random.key(0))
        start = CompressedLinear(Dense(w))
        leaves = [run_linear(step, problem, start)[0] for step in steps]
        return [jnp.mean(jnp.square(leaf.dense() - w)) for leaf in leaves]

    np.testing.assert_allclose(distort(w), wanted, rtol=0.01)
