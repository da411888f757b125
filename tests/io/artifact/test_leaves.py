"""Compressed weights as named arrays and back: nothing is lost, nothing is guessed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.artifact.leaves import FORMATS, flatten, name_format, unflatten
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.inputs import InputGrid
from lqec_kernels.outliers import Outliers
from tests.io.verify.test_operators import BASES, TRANSFORMS

D_IN, D_OUT, GROUP = 64, 40, 32


def affine(zeros, bits=3, scale_dtype=np.float16):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (D_IN, D_OUT)).astype(np.uint32)
    shape = (D_IN // GROUP, D_OUT)
    scales = rng.uniform(0.1, 1, shape).astype(scale_dtype)
    kinds = {
        "none": None,
        "int": jnp.asarray(rng.integers(0, 2**bits, shape).astype(np.uint32)),
        "float": jnp.asarray(rng.uniform(0, 2**bits, shape).astype(np.float16)),
    }
    codes, scales = jnp.asarray(codes), jnp.asarray(scales)
    return Affine.from_codes(codes, scales, kinds[zeros], bits=bits, group_size=GROUP)


def dense(dtype=jnp.bfloat16):
    return Dense(jax.random.normal(jax.random.key(1), (D_IN, D_OUT)).astype(dtype))


def low_rank(rank, dtype=jnp.float16):
    a_key, b_key = jax.random.split(jax.random.key(rank))
    a = jax.random.normal(a_key, (D_IN, rank)).astype(dtype)
    return LowRank(a, jax.random.normal(b_key, (rank, D_OUT)).astype(dtype))


def scale(size):
    return ChannelScale(1 + jnp.arange(size, dtype=jnp.float32) / size)


LEAVES = {
    "dense": CompressedLinear(dense()),
    "symmetric": CompressedLinear(affine("none", scale_dtype=np.float32)),
    "integer zeros": CompressedLinear(affine("int"), (low_rank(4),)),
    "floating zeros": CompressedLinear(affine("float", bits=2)),
    "two corrections": CompressedLinear(dense(), (low_rank(4), low_rank(2, jnp.float32))),
    "a pooled correction": CompressedLinear(
        affine("float", bits=2), (LowRank(low_rank(4).a[:2], low_rank(4).b, GROUP),)
    ),
    "rounded factors": CompressedLinear(
        dense(),
        (QuantizedLowRank.round(low_rank(4).a, low_rank(4).b, bits=4, group_size=GROUP),),
    ),
    "rounded inputs": CompressedLinear(affine("none"), input_grid=InputGrid("int", 6, "token")),
    "input transform": CompressedLinear(affine("none"), (), scale(D_IN)),
    "planes of signs": CompressedLinear(
        BitPlanes(jnp.arange(160, dtype=jnp.uint32).reshape(4, 40), jnp.ones((1, 2, 40)), None, 2,
                  GROUP, D_IN),
        (Outliers(jnp.arange(7, dtype=jnp.uint32), jnp.ones(7, jnp.float16), D_IN, D_OUT),),
    ),
    "both transforms": CompressedLinear(affine("int"), (low_rank(1),), scale(D_IN), scale(D_OUT)),
    **{f"base {name}": CompressedLinear(base) for name, base in BASES.items()},
    **{f"input {name}": CompressedLinear(dense(), (), make(D_IN))
       for name, make in TRANSFORMS.items()},
}  # fmt: skip


def check_same(came, tree):
    assert jax.tree.structure(came) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", LEAVES)
def test_a_weight_comes_back_bit_for_bit(name):
    tree = {
        "attn": {"q": {"kernel": LEAVES[name], "bias": jnp.arange(3.0)}},
        "norm": {"scale": jnp.ones(5, jnp.bfloat16)},
    }
    arrays, weights = flatten(tree)
    came = unflatten(arrays, weights)
    check_same(came, tree)


@pytest.mark.parametrize("name", LEAVES)
def test_what_is_stored_is_what_is_counted(name):
    arrays, _ = flatten({"q": {"kernel": LEAVES[name]}})
    assert all(type(array) is np.ndarray for array in arrays.values())
    assert 8 * sum(array.nbytes for array in arrays.values()) == LEAVES[name].stored_bits()


def test_names_are_dotted_paths_and_fields():
    leaf = LEAVES["both transforms"]
    arrays, weights = flatten({"blocks": {"0": {"attn": {"q": {"kernel": leaf}}, "g": np.ones(1)}}})
    assert set(arrays) == {
        "blocks.0.g",
        "blocks.0.attn.q.base.codes",
        "blocks.0.attn.q.base.scales",
        "blocks.0.attn.q.base.zeros",
        "blocks.0.attn.q.corrections.0.a",
        "blocks.0.attn.q.corrections.0.b",
        "blocks.0.attn.q.input_transform.scale",
        "blocks.0.attn.q.output_transform.scale",
    }
    assert weights["blocks/0/attn/q"] == {
        "base": {"format": "affine", "bits": 3, "group_size": GROUP, "d_in": D_IN},
        "corrections": [{"format": "low_rank", "pool": 1}],
        "input_transform": {"format": "channel_scale"},
        "output_transform": {"format": "channel_scale"},
    }


def test_a_file_older_than_a_field_is_read_with_its_default():
    arrays, weights = flatten({"q": {"kernel": LEAVES["integer zeros"]}})
    del weights["q"]["corrections"][0]["pool"]
    check_same(unflatten(arrays, weights)["q"]["kernel"], LEAVES["integer zeros"])
    del weights["q"]["base"]["bits"]
    with pytest.raises(KeyError, match="bits"):
        unflatten(arrays, weights)


def test_every_format_of_the_table_was_tried():
    def formats(said) -> set[str]:
        if isinstance(said, list):
            return set().union(*map(formats, said))
        if not isinstance(said, dict):
            return set()
        return formats(list(said.values())) | ({said["format"]} if "format" in said else set())

    tried = [flatten({"q": {"kernel": leaf}})[1] for leaf in LEAVES.values()]
    assert formats(tried) == set(FORMATS)


def test_an_unknown_format_and_a_missing_array_are_refused_by_name():
    arrays, weights = flatten({"q": {"kernel": LEAVES["integer zeros"]}})
    strange = {"q": {**weights["q"], "base": {**weights["q"]["base"], "format": "trellis"}}}
    with pytest.raises(InputError, match=r"^q/base: format 'trellis' is not known.*affine") as said:
        unflatten(arrays, strange)
    assert "\n" not in str(said.value)
    for name in ("q.base.codes", "q.base.scales", "q.corrections.0.b"):
        left = {n: array for n, array in arrays.items() if n != name}
        with pytest.raises(InputError, match=f"^{name} is missing from the weights"):
            unflatten(left, weights)


@pytest.mark.parametrize(
    "name, said",
    [
        ("dense", "dense"),
        ("integer zeros", f"affine(bits=3, group_size={GROUP}) + low_rank(rank=4)"),
        ("two corrections", "dense + low_rank(rank=4) + low_rank(rank=2)"),
        ("a pooled correction", "affine(bits=2, group_size=32) + low_rank(pool=32, rank=4)"),
        ("input transform", f"affine(bits=3, group_size={GROUP}) + input channel_scale"),
        ("base masked", "masked(affine(bits=3, group_size=16), pattern=2:4)"),
        ("base masked, dense", "masked(dense)"),
    ],
)
def test_a_weight_is_named_in_words(name, said):
    assert name_format(LEAVES[name]) == said
