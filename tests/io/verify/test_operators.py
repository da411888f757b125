"""What the plain readers make of every format, beside what the formats make of themselves."""

import jax
import numpy as np
import pytest

from lqec_jax.io.artifact.leaves import FORMATS, flatten
from lqec_jax.io.verify import operators
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.codebook import Codebook, DoubleScales
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.outliers import Outliers
from lqec_kernels.sparse import Masked, Sparse24
from lqec_kernels.sums import Sum
from lqec_kernels.transforms import Hadamard

D_IN, D_OUT = 64, 32
RNG = np.random.default_rng(0)


def draw(*shape, dtype=np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def draw_words(*shape) -> np.ndarray:
    return RNG.integers(0, 2**32, shape, np.uint32)


AFFINE = Affine(draw_words(6, D_OUT), draw(4, D_OUT, dtype=np.float16), None, 3, 16, D_IN)
E8P = Codebook(draw_words(4, D_OUT), np.full((1, 1), 0.5, np.float32), None, "e8p", 16, D_IN, D_IN)
E8 = Codebook(draw_words(2, D_OUT), np.full((1, 1), 0.1, np.float32), None, "e8", 8, D_IN, D_IN)
TWICE = DoubleScales(draw_words(4, D_OUT).astype(np.uint8), draw(1), draw(1))
BASES = {
    "bit_planes": BitPlanes(draw_words(6, D_OUT), draw(3, 4, D_OUT), draw(4, D_OUT), 3, 16, D_IN),
    "bit_planes, one alpha": BitPlanes(draw_words(4, D_OUT), draw(1, 4, D_OUT), None, 2, 16, D_IN),
    "dense": Dense(draw(D_IN, D_OUT)),
    "affine": AFFINE,
    "affine, integer zeros": Affine(AFFINE.codes, AFFINE.scales, draw_words(4, 3), 3, 16, D_IN),
    "affine, float zeros": Affine(AFFINE.codes, AFFINE.scales, draw(4, D_OUT), 3, 16, D_IN),
    "affine, one scale": Affine(AFFINE.codes, draw(1, 1), None, 3, D_IN, D_IN),
    "affine, one scale, zeros": Affine(AFFINE.codes, draw(1, 1), draw_words(1, 3), 3, D_IN, D_IN),
    "codebook, scalars": Codebook(AFFINE.codes, AFFINE.scales, None, "nf3", 3, 16, D_IN),
    "codebook, scales of scales": Codebook(draw_words(8, D_OUT), TWICE, None, "nf4", 4, 16, D_IN),
    "codebook, pairs": Codebook(
        draw_words(6, D_OUT), AFFINE.scales, None, "gauss3_p2", 6, 16, D_IN
    ),
    "codebook, lattice": E8P,
    "codebook, levels": Codebook(AFFINE.codes, None, draw(8, D_OUT), "", 3, D_IN, D_IN),
    "codebook, an odd width": Codebook(draw_words(4, D_OUT), None, None, "e8p", 16, 60, 60),
    "sum": Sum(E8P, E8),
}
KEEP = np.tile(np.array([[1, 0, 1, 0], [0, 1, 0, 1]]).repeat(D_OUT // 2, 0).T, (D_IN // 4, 1)) == 1
BASES |= {
    "masked": Masked.from_mask(BASES["affine, float zeros"], KEEP, "2:4"),
    "masked, dense": Masked.from_mask(BASES["dense"], RNG.random((D_IN, D_OUT)) < 0.3),
    "sparse24": Sparse24.from_mask(BASES["affine, float zeros"], KEEP),
    "sparse24, dense": Sparse24.from_mask(BASES["dense"], KEEP),
}
CORRECTIONS = {
    "low_rank": LowRank(draw(D_IN, 3, dtype=np.float16), draw(3, D_OUT)),
    "low_rank, pooled": LowRank(draw(D_IN // 8, 3, dtype=np.float16), draw(3, D_OUT), 8),
    "quantized_low_rank": QuantizedLowRank(
        Affine(draw_words(8, 3), draw(4, 3, dtype=np.float16), None, 4, 16, D_IN),
        Affine(draw_words(4, 3), draw(1, 3), None, 4, D_OUT, D_OUT),
    ),
    "outliers": Outliers(RNG.permutation(D_IN * D_OUT)[:9].astype(np.uint32), draw(9), D_IN, D_OUT),
}
TRANSFORMS = {
    "channel_scale": lambda size: ChannelScale(draw(size)),
    "hadamard": lambda size: Hadamard(draw_words(-(-size // 32)), size, 16),
    "hadamard, inverse": lambda size: Hadamard(draw_words(-(-size // 32)), size, size, True),
}


def read(leaf: CompressedLinear) -> np.ndarray:
    arrays, weights = flatten({"q": {"kernel": leaf}})
    return operators.read_weight(
        weights["q"], lambda name: arrays.get(f"q.{name.replace('/', '.')}")
    )


def assert_read(leaf: CompressedLinear) -> None:
    wanted = np.asarray(jax.jit(CompressedLinear.dense)(leaf))
    np.testing.assert_allclose(read(leaf), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_every_format_is_read():
    known = operators.BASES.keys() | operators.CORRECTIONS.keys() | operators.TRANSFORMS.keys()
    tested = {name.partition(",")[0] for name in (*BASES, *CORRECTIONS, *TRANSFORMS)}
    assert known == tested
    assert set(FORMATS) - known == {"double_scales"}  # which a codebook holds, read above


@pytest.mark.parametrize("name", BASES)
def test_a_base(name):
    assert_read(CompressedLinear(BASES[name]))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction(name):
    assert_read(CompressedLinear(AFFINE, (CORRECTIONS[name], CORRECTIONS[name])))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_on_either_side(name):
    make = TRANSFORMS[name]
    assert_read(CompressedLinear(AFFINE, (), make(D_IN), None))
    assert_read(CompressedLinear(AFFINE, (CORRECTIONS["low_rank"],), make(D_IN), make(D_OUT)))


def test_a_low_rank_correction_of_a_file_without_pools_is_not_pooled():
    leaf = CompressedLinear(AFFINE, (CORRECTIONS["low_rank"],))
    arrays, weights = flatten({"q": {"kernel": leaf}})
    del weights["q"]["corrections"][0]["pool"]
    came = operators.read_weight(
        weights["q"], lambda name: arrays.get(f"q.{name.replace('/', '.')}")
    )
    np.testing.assert_array_equal(came, read(leaf))


def test_what_is_not_known_is_refused():
    said = {"base": {"format": "lattice"}, "corrections": [], "input_transform": None}
    with pytest.raises(operators.UnknownFormatError, match="base 'lattice' is not read here"):
        operators.read_weight(said, lambda name: None)
