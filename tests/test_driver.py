"""The streams equal a forward pass, statistics reach their step, phases follow one another."""

import jax
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.tree import get_at, unstack_blocks
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint

WINDOWS = 10
RILQ = "rilq(rank=2, updates=4, eval_every=2, batch=4)"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return lqec.load(write_checkpoint(tmp_path_factory.mktemp("driver") / "dense"))


def compress(dense, recipe: str, **options):
    tokens = make_tokens(WINDOWS)
    return lqec.compress(dense, recipe, calib=tokens, seqlen=SEQLEN, windows=WINDOWS, **options)


def stages(model) -> dict[str, float]:
    return {stage["name"]: stage["nll"] for stage in model.report["stages"]}


@pytest.fixture(scope="module")
def rounded(dense):
    return compress(dense, "rtn(bits=3, group_size=16)")


def test_streams_equal_whole_forward_passes(dense, rounded):
    val = make_tokens(WINDOWS)[8 * SEQLEN :]
    scored = stages(rounded)
    assert scored["teacher"] == pytest.approx(lqec.perplexity(dense, val, SEQLEN).nll, abs=1e-6)
    assert scored["rtn"] == pytest.approx(lqec.perplexity(rounded, val, SEQLEN).nll, abs=1e-6)
    assert scored["rtn"] > scored["teacher"]


def test_another_text_is_scored_in_its_place(dense):
    other = make_tokens(3, seed=9)
    small = compress(dense, "rtn(bits=3, group_size=16)", eval=other)
    stage = small.report["stages"][-1]
    assert stage["nll"] == pytest.approx(lqec.perplexity(small, other, SEQLEN).nll, abs=1e-6)
    assert (stage["protocol"], stage["windows"]) == (f"tokens/{SEQLEN}", 3)


def test_statistics_are_those_of_the_compressed_stream(dense):
    recipe = "rtn(bits=2, group_size=16, clip_search='output')"
    small = compress(dense, recipe)
    train = make_tokens(WINDOWS)[: 8 * SEQLEN].reshape(8, SEQLEN)
    # The input of the second block's attention, through the first block as it was compressed.
    first, second = unstack_blocks(small.params["blocks"])[:2]
    h = small.fns.block(first, small.fns.embed(small.params, train))[0]
    x = small.fns.block(second, h)[1]["attn/q"]
    w = get_at(unstack_blocks(dense.params["blocks"])[1], "attn/q/kernel")
    wanted = lqec.quantize(w, recipe, x=np.asarray(x).reshape(-1, x.shape[-1]))
    found = get_at(second, "attn/q/kernel")
    np.testing.assert_allclose(found.dense(), wanted.dense(), rtol=1e-6, atol=1e-7)


def test_a_linear_step_after_a_model_step_corrects_what_is_left(dense, rounded):
    small = compress(dense, f"rtn(bits=3, group_size=16) | {RILQ} | svd(rank=2)")
    assert list(stages(small)) == ["teacher", "rtn", "rilq", "svd"]
    leaf = get_at(small.params["blocks"][0], "mlp/down/kernel")
    assert [c.rank for c in leaf.corrections] == [2, 2]
    base = get_at(rounded.params["blocks"][0], "mlp/down/kernel").base
    assert np.array_equal(leaf.base.codes, base.codes)
    for linear in small.report["linears"]:
        rounding, correction = linear["steps"]
        assert correction["after"] < correction["before"]
        assert linear["relative_error"] == pytest.approx(correction["after"], rel=1e-4)


def test_the_report_says_what_the_interface_promises(dense):
    report = compress(dense, f"rtn(bits=2, group_size=16) | {RILQ}").report
    promised = {"recipe", "seed", "bits_per_weight", "stages", "linears", "fits", "skipped",
                "peak_rss_mb", "seconds", "environment"}  # fmt: skip
    assert promised <= set(report)
    assert [point["update"] for point in report["fits"][0]["history"]] == [0, 2, 4]
    assert len(report["linears"]) == 5 * 7
    assert all(entry["reason"] for entry in report["skipped"])
    assert report["seconds"] >= report["stages"][-1]["seconds"] > 0


def test_model_steps_alone_begin_from_the_dense_model(dense):
    small = compress(dense, "svd(rank=2)")
    assert stages(small)["svd"] == pytest.approx(stages(small)["teacher"], abs=1e-5)


def test_seeds_decide_the_adapters(dense):
    recipe = f"rtn(bits=2, group_size=16) | {RILQ}"
    one, same, other = (compress(dense, recipe, seed=seed).params for seed in (0, 0, 1))
    pick = lambda params: get_at(params["blocks"][0], "attn/q/kernel").corrections[0].a  # noqa: E731
    assert np.array_equal(pick(one), pick(same))
    assert not np.array_equal(pick(one), pick(other))
    assert jax.tree.structure(one) == jax.tree.structure(other)
