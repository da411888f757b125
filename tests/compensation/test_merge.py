"""Merging: adapters become zero points, and nothing that can be measured changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lqec_jax.train.adapters import map_linears

import lqec_jax as lqec
from lqec_jax.compensation.merge import fold, merge, shift_zeros
from lqec_jax.core.bases import mask_base
from lqec_jax.core.tree import get_at, unstack_blocks
from lqec_jax.core.types import (
    Evaluation,
    LinearProblem,
    LinearStats,
    ModelSolution,
    Step,
    run_linear,
)
from lqec_jax.errors import InputError
from lqec_jax.recipe import Recipe, parse_recipe
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.outliers import Outliers
from tests.golden.tiny_checkpoint import SEQLEN, make_tokens, write_checkpoint

D_IN, D_OUT, GROUP, BITS, RANK = 96, 10, 16, 3, 2
GROUPS = D_IN // GROUP
EPSILON = 2.0**-24  # half a last place of float32, which is what one operation loses
# How scales are distributed: as of a weight, down to the smallest subnormal of float16, and beyond.
SCALES = {
    "usual": lambda shape: np.random.RandomState(1).uniform(0.01, 0.1, shape).astype(np.float16),
    "subnormal": lambda shape: (2.0**-24 * (1 + np.arange(np.prod(shape)).reshape(shape) % 40)
                                ).astype(np.float16),
    "of all sizes": lambda shape: 10 ** np.random.RandomState(2).uniform(-25, 0, shape),
    "negative": lambda shape: -np.random.RandomState(3).uniform(0.01, 0.1, shape),
}  # fmt: skip
ZEROS = ("symmetric", "packed", "floating")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def make_adapter(pool: int = GROUP, rank: int = RANK, d_in: int = D_IN) -> LowRank:
    return LowRank(draw(d_in // pool, rank, seed=4), draw(rank, D_OUT, seed=5), pool)


def make_leaf(zeros="packed", scales="usual", group=GROUP, adapters=None) -> CompressedLinear:
    random, shape = np.random.RandomState(0), (D_IN // group, D_OUT)
    codes = random.randint(0, 2**BITS, (D_IN, D_OUT)).astype(np.uint8)
    kinds = {
        "symmetric": None,
        "packed": jnp.asarray(random.randint(0, 2**BITS, shape).astype(np.uint8)),
        "floating": jnp.asarray(random.uniform(-3, 9, shape).astype(np.float16)),
    }
    made = SCALES[scales](shape)
    made = jnp.asarray(made if made.dtype == np.float16 else made.astype(np.float32))
    base = Affine.from_codes(jnp.asarray(codes), made, kinds[zeros], bits=BITS, group_size=group)
    return CompressedLinear(base, (make_adapter(),) if adapters is None else tuple(adapters))


_fold = jax.jit(fold, static_argnums=1)


def folded(leaf: CompressedLinear, dtype: str = "float32"):
    return _fold(jax.tree.map(jnp.asarray, leaf), jnp.dtype(dtype))


def spell(base: Affine) -> tuple[np.ndarray, ...]:
    """Returns the weight of a base, and |s z| at every weight, in float64 from its columns."""
    words, scales, zeros = (None if c is None else np.asarray(c) for c in base.columns())
    codes = np.asarray(Affine.dense(dataclasses.replace(
        base, scales=jnp.ones_like(base.scales), zeros=jnp.zeros(scales.shape)
    ))).astype(np.float64)  # fmt: skip
    zeros = np.full(scales.shape, 2.0 ** (base.bits - 1)) if zeros is None else zeros
    s, z = (np.repeat(a.astype(np.float64), base.group_size, 0) for a in (scales, zeros))
    return s * (codes - z), np.abs(s * z)


def expand(adapter: LowRank) -> np.ndarray:
    return np.repeat(np.asarray(adapter.rows(), np.float64), adapter.pool, axis=0)


# The identity


@pytest.mark.parametrize("form", ["means", "sums"])
def test_a_shift_of_zeros_is_the_adapter_in_float64(form):
    random = np.random.RandomState(0)
    a, b, x = (random.standard_normal(s) for s in ((GROUPS, RANK), (RANK, D_OUT), (7, D_IN)))
    codes = random.randint(0, 8, (GROUPS, GROUP, D_OUT))
    scales = 10 ** random.uniform(-8, 0, (GROUPS, D_OUT))
    zeros = random.uniform(0, 8, (GROUPS, D_OUT))
    read = x.reshape(7, GROUPS, GROUP)
    read = read.mean(axis=-1) if form == "means" else read.sum(axis=-1)
    rows = a @ b / (GROUP if form == "means" else 1)
    with jax.enable_x64(True):
        merged = np.asarray(shift_zeros(*map(jnp.asarray, (zeros, scales, rows))))
    assert merged.dtype == np.float64

    def answer(zeros):
        return x @ (scales[:, None] * (codes - zeros[:, None])).reshape(D_IN, D_OUT)

    np.testing.assert_allclose(answer(merged), answer(zeros) + read @ a @ b, atol=1e-12)
    assert np.abs(answer(merged) - answer(zeros)).max() > 1


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("scales", SCALES)
def test_float32_loses_no_more_than_its_last_places(zeros, scales):
    leaf = make_leaf(zeros, scales)
    merged, facts = folded(leaf)
    assert merged.corrections == () and merged.base.zeros.dtype == jnp.float32
    np.testing.assert_array_equal(merged.base.codes, leaf.base.codes)
    np.testing.assert_array_equal(merged.base.scales, leaf.base.scales)
    w, zero = spell(leaf.base)
    delta = expand(leaf.corrections[0])
    lost = np.abs(np.asarray(merged.dense(), np.float64) - (w + delta))
    assert (lost <= EPSILON * (4 * np.abs(delta) + zero + 2 * np.abs(w)) * (1 + 1e-6)).all()
    assert facts["replaced"] == 0 and facts["change"] < 1e-6
    assert np.abs(delta).max() > 0.1


def test_groups_in_another_order_are_merged_in_that_order():
    leaf, order = make_leaf(), np.random.RandomState(6).permutation(GROUPS)

    def reorder(array):
        return array.reshape(GROUPS, -1, array.shape[-1])[order].reshape(array.shape)

    codes, scales, zeros = leaf.base.columns()
    codes = np.asarray(_unpack(leaf.base))
    (adapter,) = leaf.corrections
    moved = CompressedLinear(
        Affine.from_codes(*map(jnp.asarray, map(reorder, (codes, np.asarray(scales),
                                                          np.asarray(zeros)))),
                          bits=BITS, group_size=GROUP),
        (dataclasses.replace(adapter, a=adapter.a[order]),),
    )  # fmt: skip
    first, second = folded(leaf)[0], folded(moved)[0]
    np.testing.assert_array_equal(second.base.zeros, first.base.zeros[order])
    np.testing.assert_array_equal(second.dense(), reorder(np.asarray(first.dense())))


def _unpack(base: Affine) -> jax.Array:
    ones = jnp.ones_like(base.columns()[1])
    plain = dataclasses.replace(base, scales=ones, zeros=jnp.zeros_like(ones))
    return plain.dense().astype(jnp.uint8)


def test_pools_of_several_groups_and_several_adapters():
    adapters = (make_adapter(GROUP), make_adapter(2 * GROUP, rank=1), make_adapter(D_IN))
    leaf = make_leaf(adapters=adapters)
    merged = folded(leaf)[0]
    assert merged.corrections == ()
    np.testing.assert_allclose(merged.dense(), leaf.dense(), atol=1e-6)


def test_groups_of_one_input_take_any_adapter():
    leaf = make_leaf(group=1, adapters=(make_adapter(pool=1),))
    merged = folded(leaf)[0]
    assert merged.base.zeros.shape == (D_IN, D_OUT)
    np.testing.assert_allclose(merged.dense(), leaf.dense(), atol=1e-6)


def test_one_scale_of_a_whole_weight_is_written_out():
    leaf = make_leaf(group=D_IN, adapters=(make_adapter(pool=D_IN),))
    scale = jnp.full((1, 1), 0.05, jnp.float16)
    leaf = dataclasses.replace(leaf, base=dataclasses.replace(leaf.base, scales=scale, zeros=None))
    merged = folded(leaf)[0]
    assert merged.base.scales.shape == merged.base.zeros.shape == (1, D_OUT)
    np.testing.assert_allclose(merged.dense(), leaf.dense(), atol=1e-6)


def test_a_stack_is_merged_as_its_layers_are_and_other_corrections_stay():
    spikes = Outliers(jnp.asarray([3, 50], jnp.uint32), jnp.ones(2, jnp.float16), D_IN, D_OUT)
    leaf = make_leaf(adapters=(make_adapter(), spikes))
    merged = folded(leaf)[0]
    assert [type(c) for c in merged.corrections] == [Outliers]
    stack = jax.tree.map(lambda array: jnp.stack([array, array]), leaf)
    both = folded(stack)[0]
    for one, two in zip(jax.tree.leaves(merged), jax.tree.leaves(both), strict=True):
        np.testing.assert_array_equal(two[1], one)


# Scales that cannot be divided by


@pytest.mark.parametrize(("scale", "dtype"), [(0.0, "float32"), (1e-38, "float32"),
                                              (2.0**-24, "float16")])  # fmt: skip
def test_a_group_whose_scale_is_too_small_holds_its_correction_alone(scale, dtype):
    leaf = make_leaf(zeros="packed")
    scales = leaf.base.scales.astype(jnp.float32).at[2].set(scale)
    leaf = dataclasses.replace(leaf, base=dataclasses.replace(leaf.base, scales=scales))
    merged, facts = folded(leaf, dtype)
    rows = slice(2 * GROUP, 3 * GROUP)
    small = np.abs(expand(leaf.corrections[0])[rows]) < 65504 * scale
    assert facts["replaced"] == np.sum(~small[0]) >= D_OUT - 1
    tolerance = 2.0**-10 if dtype == "float16" else 2.0**-20
    was, came = np.asarray(leaf.dense())[rows], np.asarray(merged.dense())[rows]
    np.testing.assert_allclose(came, was, rtol=tolerance, atol=1e-30)
    assert f"{facts['replaced']} groups had scales too small" in merge().notes(
        jax.device_get(facts)
    )[-1]  # fmt: skip


def test_half_precision_says_what_it_costs():
    leaf = make_leaf()
    merged, facts = folded(leaf, "float16")
    assert merged.base.zeros.dtype == jnp.float16
    change = np.linalg.norm(merged.dense() - leaf.dense()) / np.linalg.norm(leaf.dense())
    assert float(facts["change"]) == pytest.approx(change, rel=1e-3)
    assert 1e-5 < change < 2.0**-10
    (line,) = merge(dtype="float16").notes(jax.device_get(facts))
    assert line == f"rounding the zero points changed the weight by {change:.2g} of it"
    assert merge().notes(jax.device_get(folded(leaf)[1])) == ()


# What a pooled adapter can be


def test_means_over_groups_are_the_best_that_zeros_can_do():
    """||E||² = ||E - P E||² + ||P E||², P the mean over each group."""
    leaf = make_leaf(adapters=())
    w = draw(D_IN, D_OUT, seed=7)
    error = w - np.asarray(leaf.dense(), np.float64)
    means = error.reshape(GROUPS, GROUP, D_OUT).mean(axis=1)
    adapter = LowRank(GROUP * jnp.eye(GROUPS), jnp.asarray(means, jnp.float32), GROUP)
    merged = folded(dataclasses.replace(leaf, corrections=(adapter,)))[0]

    def energy(base: Affine) -> float:
        return float(np.sum(np.square(w - spell(base)[0])))

    whole, part = np.sum(np.square(error)), GROUP * np.sum(np.square(means))
    assert energy(merged.base) == pytest.approx(whole - part, rel=1e-6)
    spread = error - np.repeat(means, GROUP, axis=0)
    np.testing.assert_allclose(np.sum(np.square(spread)) + part, whole, rtol=1e-12)
    for seed in range(20):
        other = merged.base.zeros + 1e-2 * draw(GROUPS, D_OUT, seed=seed)
        assert energy(dataclasses.replace(merged.base, zeros=other)) > energy(merged.base)


@pytest.mark.parametrize(("pool", "rank", "wanted"), [(GROUP, 2, 2), (GROUP, 9, GROUPS),
                                                      (48, 9, 2)])  # fmt: skip
def test_its_rank_is_at_most_that_of_its_groups(pool, rank, wanted):
    dense = np.asarray(make_adapter(pool, rank).dense())
    assert np.linalg.matrix_rank(dense, tol=1e-4) == wanted


# Refusals

AFFINE = make_leaf().base
KEEP = jnp.asarray(np.arange(D_IN) % 4 < 2)[:, None] & jnp.ones((D_IN, D_OUT), bool)


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (make_leaf(adapters=()), "there is no adapter to fold; put a step that trains pooled"),
        (make_leaf(adapters=(make_adapter(1),)), "reads every input by itself, and a zero point"),
        (make_leaf(adapters=(make_adapter(), make_adapter(1))), "train it with rilq(pool=True)"),
        (make_leaf(adapters=(make_adapter(8),)), "pools 8 inputs, and the base has groups of 16"),
        (make_leaf(adapters=(make_adapter(24),)), "pools 24 inputs, and the base has groups of 16"),
        (mask_base(make_leaf(), KEEP), "in a Masked base would fill weights that were set to zero"),
        (mask_base(make_leaf(), KEEP, "2:4"), "in a Sparse24 base would fill weights"),
        (CompressedLinear(Dense(jnp.ones((D_IN, D_OUT))), (make_adapter(),)),
         "a Dense base has no zero points for pooled adapters; put a uniform grid first"),
        (CompressedLinear(AFFINE, (make_adapter(),), ChannelScale(jnp.ones(D_IN))),
         "a ChannelScale transform stands between the inputs and the base"),
        (CompressedLinear(AFFINE, (make_adapter(),), None, ChannelScale(jnp.ones(D_OUT))),
         "a ChannelScale transform stands between the outputs and the base"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_in_one_line(leaf, said):
    problem = LinearProblem(jnp.ones((D_IN, D_OUT)), LinearStats(), jax.random.key(0))
    with pytest.raises(InputError, match="^merge: ") as caught:
        jax.eval_shape(lambda leaf: run_linear(merge(), problem, leaf)[0], leaf)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_without_pooled_adapters_is_refused_before_any_work():
    with pytest.raises(InputError, match="merge: there is no adapter to fold"):
        lqec.quantize(draw(D_IN, D_OUT), "rtn(bits=2, group_size=16) | merge()")
    with pytest.raises(InputError, match="merge: an adapter of rank 2 reads every input"):
        lqec.quantize(draw(D_IN, D_OUT), "rtn(bits=2, group_size=16) | svd(rank=2) | merge()")
    with pytest.raises(InputError, match="merge: dtype='int8'"):
        merge(dtype="int8")


# In a model

RTN = "rtn(bits=3, group_size=16)"
TOKENS = make_tokens(6)


def add_pooled() -> Step:
    """Makes a model step that gives every weight a pooled adapter, as a training would."""

    def add(leaf: CompressedLinear, number: int = 0) -> CompressedLinear:
        key_a, key_b = jax.random.split(jax.random.key(number))
        a = jax.random.normal(key_a, (*leaf.stack_shape, leaf.d_in // 16, 2), jnp.float16)
        b = jax.random.normal(key_b, (*leaf.stack_shape, 2, leaf.d_out)).astype(jnp.float16) / 4
        return dataclasses.replace(leaf, corrections=(LowRank(a, b, 16),))

    def run(problem):
        params = map_linears(problem.fns, problem.params, add)
        return ModelSolution(params, (Evaluation(0, None, 1.0),), 0)

    return Step("add", "model", run, {}, preview=add)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The pooled model and the merged one, this one as it is read from its artifact."""
    folder = tmp_path_factory.mktemp("merge")
    teacher = write_checkpoint(folder / "model", num_hidden_layers=2)
    pooled = Recipe((*parse_recipe(RTN).steps, add_pooled()))
    merged = Recipe((*pooled.steps, merge()))
    options = {"calib": TOKENS, "seqlen": SEQLEN}
    return (
        lqec.compress(teacher, pooled, **options),
        lqec.compress(teacher, merged, **options, out=folder / "merged"),
    )


def test_a_merged_model_has_no_adapters_and_the_same_logits(models):
    pooled, merged = models
    for before, after in zip(*(unstack_blocks(m.params["blocks"]) for m in models), strict=True):
        for path in merged.fns.linears:
            was, leaf = (get_at(block, f"{path}/kernel") for block in (before, after))
            assert leaf.corrections == () and leaf.base.zeros.dtype == jnp.float32
            np.testing.assert_array_equal(leaf.base.codes, was.base.codes)
    tokens = TOKENS.reshape(-1, SEQLEN)[:2]
    logits = [np.asarray(lqec.logits(model, tokens)) for model in models]
    assert np.abs(logits[0]).max() > 1
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    stages = {stage["name"]: stage["ppl"] for stage in merged.report["stages"]}
    assert list(stages) == ["teacher", "rtn", "add", "merge"]
    assert stages["merge"] == pytest.approx(stages["add"], rel=1e-6)
    assert abs(stages["add"] - stages["rtn"]) > 1e-2


def test_a_merged_model_is_counted_and_reported(models):
    merged = models[1]
    # Codes 3, float16 scales and float32 zeros in groups of 16.
    assert merged.report["bits_per_weight"] == 3 + (16 + 32) / 16
    for linear in merged.report["linears"]:
        step = linear["steps"][-1]
        assert step["method"] == "merge" and step["notes"] == []
        assert step["after"] == pytest.approx(step["before"], rel=1e-4)


def test_exports_hold_a_merged_model_or_say_that_they_cannot(models, tmp_path):
    _, merged = models
    lqec.export(merged, tmp_path / "hf", "hf")
    assert lqec.verify(tmp_path / "hf", merged).logit_difference < 1e-4
    lqec.export(merged, tmp_path / "flax", "flax")
    assert lqec.verify(tmp_path / "flax", merged).logit_difference < 1e-4
    for format, said in (("gptq", "float32 zeros, no integers, which gptq cannot hold"),
                         ("compressed-tensors", "float32 zeros, no integers, which compressed"),
                         ("peft", "no low-rank corrections for peft")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            lqec.export(merged, tmp_path / format, format)


def test_exports_of_a_pooled_model_are_expanded(models, tmp_path):
    pooled, _ = models
    lqec.export(pooled, tmp_path / "peft", "peft")
    assert lqec.verify(tmp_path / "peft", pooled).logit_difference < 1e-4
    lqec.export(pooled, tmp_path / "flax", "flax")
    assert lqec.verify(tmp_path / "flax", pooled).weight_difference < 1e-6
