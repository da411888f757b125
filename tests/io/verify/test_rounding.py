"""What an export must hold: rounded once and nothing else, one product to the bit."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lqec_jax.errors import CheckFailed
from lqec_jax.io.exports.export import export_model
from lqec_jax.io.exports.record import RECORD, hash_file, read_record
from lqec_jax.io.verify.rounding import Rounding, expect, read_rounding, round_to
from lqec_jax.io.verify.verify import verify_export
from lqec_kernels.formats import CompressedLinear, LowRank
from tests.io.packed_models import make_leaf, make_model

BF16 = np.dtype(ml_dtypes.bfloat16)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_rounding_is_to_the_nearest_and_none_leaves_what_is_there():
    w = np.array([1 + 2**-8, 1 + 3 * 2**-9, -1e-9, 3e38], np.float32)
    assert round_to(w, BF16).tolist()[:2] == [1.0, 1 + 2**-7]
    assert round_to(w, np.dtype(np.float16)).tolist()[2:] == [0.0, np.inf]
    np.testing.assert_array_equal(round_to(w, None), w)


@pytest.mark.parametrize("whole", [True, False])
def test_one_product_has_one_value(whole):
    leaf = make_leaf(np.random.default_rng(0), (64, 32), 2)
    found = expect(leaf, Rounding(BF16, whole))
    np.testing.assert_array_equal(found.low, found.high)
    if whole:
        wanted = round_to(np.asarray(leaf.dense()), BF16)
    else:
        scales = round_to(np.asarray(leaf.base.scales), BF16)
        wanted = np.asarray(CompressedLinear(replace(leaf.base, scales=scales)).dense())
    np.testing.assert_array_equal(found.dense, wanted)
    assert not np.array_equal(found.dense, leaf.dense())


def test_a_sum_may_be_summed_in_another_order_and_is_then_rounded():
    rng = np.random.default_rng(0)
    leaf = make_leaf(rng, (64, 32), 2)
    leaf = replace(leaf, corrections=(LowRank(*(rng.standard_normal(s).astype(np.float32)
                                               for s in ((64, 40), (40, 32)))),))  # fmt: skip
    low = leaf.corrections[0]
    exact = np.asarray(leaf.base.dense()).astype(np.float64) + low.a.astype(np.float64) @ low.b
    found = expect(leaf, Rounding(None, whole=True))
    assert ((found.low <= exact) & (exact <= found.high)).all()
    assert (found.high - found.low).max() < 2e-3 * np.abs(exact).max()
    narrow = expect(leaf, Rounding(BF16, whole=True))
    stored = round_to(exact.astype(np.float32), BF16)
    assert ((narrow.low <= stored) & (stored <= narrow.high)).all()
    assert np.mean(narrow.low == narrow.high) > 0.9  # of bfloat16, most have one value


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["hf", "gptq", "compressed-tensors", "flax"])
def test_the_rounding_that_was_asked_for_is_found_to_the_bit(format, dtype, tmp_path):
    bare = make_model(ranks=(0, 0))
    found = verify_export(export_model(bare, tmp_path / "out", format, dtype=dtype).folder, bare)
    assert found.kl == pytest.approx(found.kl_of_rounding, abs=1e-12)
    assert found.logit_median <= found.logit_99 <= found.logit_difference


@pytest.mark.parametrize("base", ["hf", "gptq", "flax", None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_are_rounded_beside_their_base(base, dtype, model, tmp_path):
    options = {}
    if base is not None:
        done = export_model(model, tmp_path / "base", base, base_only=True, dtype="float16")
        options["base"] = done.folder
    folder = export_model(model, tmp_path / "out", "peft", dtype=dtype, **options).folder
    found = read_rounding(folder, read_record(folder))
    assert found.exact == (base is None and dtype == "float32")
    assert found.whole == (base == "hf")
    verify_export(folder, model)


def test_an_unpacked_flax_export_is_rounded_whole(model, tmp_path):
    for dense in (True, False):
        folder = export_model(model, tmp_path / f"{dense}", "flax", dense=dense).folder
        assert read_rounding(folder, read_record(folder)).whole is dense


@pytest.mark.parametrize(
    ("format", "key"),
    [
        ("hf", "model.layers.0.mlp.up_proj.weight"),
        ("gptq", "model.layers.0.mlp.up_proj.scales"),
        ("flax", "blocks/0/mlp/up/base/scales"),
        ("hf", "model.norm.weight"),
    ],
)
def test_the_lowest_bit_of_a_rounded_number_is_missed_by_no_comparison(format, key, tmp_path):
    bare = make_model(ranks=(0, 0))
    folder = export_model(bare, tmp_path / "out", format, dtype="bfloat16").folder
    tensors = load_file(folder / WEIGHTS)
    array = np.ascontiguousarray(tensors[key])
    array.view(np.uint16).reshape(-1)[1] ^= 1
    save_file(tensors | {key: array}, folder / WEIGHTS, {"format": "pt"})
    record = json.loads((folder / RECORD).read_text())
    record["files"][WEIGHTS] = hash_file(folder / WEIGHTS)
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckFailed, match="differs by"):
        verify_export(folder, bare)
