"""Somebody else's Flax model in three lines: unchanged code, compiled once, adapters that train."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import freeze, meta

import lqec_jax as lqec
from lqec_jax.core.tree import get_at
from lqec_jax.errors import InputError
from lqec_jax.foreign.kernel import PackedKernel
from lqec_jax.recipe import parse_recipe
from tests.foreign.models import (
    KERNELS,
    LAYERS,
    RECIPE,
    TOKENS,
    WIDTH,
    Scanned,
    Transformer,
    init,
)

MODELS = {"transformer": (Transformer(), KERNELS), "scanned": (Scanned(), [KERNELS, "unembed"])}
RTN = parse_recipe("rtn(bits=4)")


class User:
    """Somebody with a model and a training loop."""

    def __init__(self, model, select):
        self.params = init(model)
        self.small, self.report = lqec.quantize_tree(self.params, RECIPE, select)
        self.train, self.frozen = lqec.partition(self.small, "adapters")
        self.dense = jax.jit(meta.unbox)(self.small)
        self.apply = jax.jit(lambda params: model.apply({"params": params}, TOKENS))
        self.teacher = self.apply(self.params)

        def loss(train, frozen):
            logits = model.apply({"params": lqec.combine(train, frozen)}, TOKENS)
            return jnp.mean(jnp.square(logits - self.teacher))

        self.loss_and_grad = jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module", params=MODELS)
def user(request):
    return User(*MODELS[request.param])


def matrices(tree) -> list[str]:
    named = jax.tree_util.tree_leaves_with_path(tree)
    paths = {jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in named}
    return [p for p, a in paths.items() if a.ndim > 1 and p.split("/")[-1] not in ("bias", "scale")]


def test_the_model_is_the_one_with_dense_weights(user):
    assert jax.tree.map(jnp.shape, user.dense) == jax.tree.map(jnp.shape, user.params)
    y = user.apply(user.small)
    assert np.allclose(y, user.apply(user.dense), atol=1e-5)
    error = np.linalg.norm(y - user.teacher) / np.linalg.norm(user.teacher)
    assert 0.01 < error < 0.5  # 4 bits are not 32, and not noise


def test_other_numbers_run_the_same_program(user):
    user.apply(user.small)
    compiled = user.apply._cache_size()
    moved = lqec.combine(jax.tree.map(lambda a: a + 1, user.train), user.frozen)
    assert not np.allclose(user.apply(moved), user.teacher, atol=0.1)
    assert user.apply._cache_size() == compiled


def test_the_report_is_what_was_done(user):
    report = user.report
    assert report["recipe"] == str(RECIPE) and report["seed"] == 0
    linears = {e["path"].partition("[")[0] for e in report["linears"]}
    assert linears | {e["path"] for e in report["skipped"]} == set(matrices(user.params))
    assert not any("kernel" in e["path"] for e in report["skipped"])
    entry = next(e for e in report["linears"] if "attn/out" in e["path"])
    name, _, layer = entry["path"].rstrip("]").partition("[")
    w, w_hat = (np.asarray(get_at(tree, name)) for tree in (user.params, user.dense))
    if layer:
        w, w_hat = w[int(layer)], w_hat[int(layer)]
    assert (entry["d_in"], entry["d_out"]) == (WIDTH, WIDTH)
    error = np.sum(np.square(w - w_hat)) / np.sum(np.square(w))
    assert entry["relative_error"] == pytest.approx(error, rel=1e-4)
    # 4-bit codes; of 16 a float16 scale and a 4-bit zero; two float32 factors of rank 2.
    assert entry["bits_per_weight"] == 4 + (16 + 4) / 16 + 32 * 2 * 2 * WIDTH / WIDTH**2


def test_the_reports_bits_are_those_of_the_tree(user):
    boxes = [node for node in jax.tree.leaves(user.small, is_leaf=meta.is_axis_metadata)
             if isinstance(node, PackedKernel)]  # fmt: skip
    stored = 8 * sum(array.nbytes for box in boxes for array in jax.tree.leaves(box))
    weights = [e["d_in"] * e["d_out"] for e in user.report["linears"]]
    bits = [e["bits_per_weight"] for e in user.report["linears"]]
    assert np.dot(weights, bits) == stored
    assert user.report["bits_per_weight"] == pytest.approx(stored / sum(weights))


def test_gradients_reach_every_adapter_and_are_the_losss_slope(user):
    _, grads = user.loss_and_grad(user.train, user.frozen)
    linears = {e["path"].partition("[")[0] for e in user.report["linears"]}
    assert len(jax.tree.leaves(grads)) == 2 * len(linears)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    step = 0.01 / norm  # along the gradient the slope is its norm
    up, down = (
        user.loss_and_grad(jax.tree.map(lambda t, g, s=s: t + s * g, user.train, grads),
                           user.frozen)[0] for s in (step, -step)
    )  # fmt: skip
    assert (up - down) / 0.02 == pytest.approx(norm, rel=0.01)


def test_adapters_train_in_a_loop_of_the_users_own(user):
    optimizer = optax.adam(3e-3)
    train, values = user.train, []

    @jax.jit
    def update(train, state, grads):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(train, updates), state

    state = jax.jit(optimizer.init)(train)
    for _ in range(30):
        value, grads = user.loss_and_grad(train, user.frozen)
        train, state = update(train, state, grads)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]


def test_a_layer_of_a_stack_is_compressed_as_if_it_were_alone():
    w = np.random.RandomState(0).standard_normal((LAYERS, WIDTH, 4, 8)).astype(np.float32)
    tree = {"attn": {"query": {"kernel": w, "bias": w[:, 0]}}}
    small, report = lqec.quantize_tree(tree, RECIPE, KERNELS)
    kernel = small["attn"]["query"]["kernel"]
    assert kernel.axes == "ioo" and kernel.leaf.stack_shape == (LAYERS,)
    alone = lqec.quantize(w[1].reshape(WIDTH, WIDTH), RECIPE)
    one = jax.tree.map(lambda a: a[1], kernel.leaf)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, alone))
    names = [entry["path"] for entry in report["linears"]]
    assert names == [f"attn/query/kernel[{layer}]" for layer in range(LAYERS)]


# ---- trees of other kinds


def test_variables_are_quantized_in_their_params_only():
    w = np.ones((64, 64), np.float32)
    tree = {"params": {"kernel": w}, "batch_stats": {"kernel": w}}
    small, report = lqec.quantize_tree(tree, RTN)
    assert [e["path"] for e in report["linears"]] == ["kernel"] and report["skipped"] == []
    assert isinstance(small["params"]["kernel"], PackedKernel)
    assert small["batch_stats"]["kernel"] is w and tree["params"]["kernel"] is w


def test_frozen_dicts_sequences_and_partition_names_are_read():
    w = jnp.ones((64, 64), jnp.bfloat16)
    named = nn.Partitioned(w, names=("data", "model"))
    tree = freeze({"list": [{"kernel": named}, {"kernel": w}], "bias": named})
    small, _ = lqec.quantize_tree(tree, RTN)
    assert type(small) is type(tree) and small["bias"] is named
    for entry in small["list"]:
        assert np.array_equal(entry["kernel"].unbox(), w)
        assert entry["kernel"].unbox().dtype == jnp.bfloat16


def test_a_tree_can_be_quantized_in_turns():
    tree = {"attn": {"kernel": np.ones((64, 64))}, "mlp": {"kernel": np.ones((64, 64))}}
    first, _ = lqec.quantize_tree(tree, RTN, "attn/*")
    second, report = lqec.quantize_tree(first, RTN)
    assert chosen(report) == {"mlp/kernel"}
    assert report["skipped"] == [{"path": "attn/kernel", "reason": "compressed already"}]
    assert second["attn"]["kernel"] is first["attn"]["kernel"]


# ---- what is chosen, and what it reads


def chosen(report) -> set[str]:
    return {e["path"] for e in report["linears"]}


def test_kernels_of_some_size_are_chosen_by_default():
    tree = {"a": {"kernel": np.ones((64, 64)), "bias": np.ones((9, 9))},
            "b": {"kernel": np.ones((64, 63))}, "embedding": np.ones((99, 64)),
            "c": {"kernel": np.ones((64, 64), np.int32)}}  # fmt: skip
    _, report = lqec.quantize_tree(tree, RTN)
    assert chosen(report) == {"a/kernel"}
    assert {e["path"]: e["reason"] for e in report["skipped"]} == {
        "b/kernel": "4032 weights, fewer than 4096",
        "c/kernel": "int32 numbers are no weights",
        "embedding": "not named 'kernel'; select= can name it",
    }


@pytest.mark.parametrize(
    "select, expected",
    [
        ("a/*", {"a/kernel", "a/w"}),
        (["*/kernel", "*/v"], {"a/kernel", "b/kernel"}),
        (lambda path, array: path == "b/kernel" and array.ndim == 2, {"b/kernel"}),
    ],
    ids=["glob", "globs", "function"],
)
def test_a_selection_is_taken_at_its_word(select, expected):
    w = np.ones((64, 64))
    tree = {"a": {"kernel": w, "w": w, "bias": np.ones(4)}, "b": {"kernel": w}}
    _, report = lqec.quantize_tree(tree, RTN, select)
    assert chosen(report) == expected
    reasons = {e["path"]: e["reason"] for e in report["skipped"]}
    assert set(reasons) >= {"a/kernel", "a/w", "b/kernel"} - expected
    if select == "a/*":
        assert reasons == {"b/kernel": "matches no glob of select='a/*'",
                           "a/bias": "[4] is no matrix"}  # fmt: skip


def test_axes_that_nothing_tells_are_listed_and_can_be_told():
    tree = {"experts": {"kernel": np.ones((3, 64, 64))}, "kernel": np.ones((64, 64))}
    _, report = lqec.quantize_tree(tree, RTN)
    (skipped,) = report["skipped"]
    assert skipped["path"] == "experts/kernel" and chosen(report) == {"kernel"}
    assert "axes={'experts/kernel': 'lio'}" in skipped["reason"]
    small, report = lqec.quantize_tree(tree, RTN, axes={"experts/kernel": "lio"})
    assert report["skipped"] == []
    assert small["experts"]["kernel"].leaf.stack_shape == (3,)


def test_inputs_are_what_each_matrix_reads():
    recipe = parse_recipe("rtn(bits=2, group_size=16, clip_search='output')")
    rng = np.random.RandomState(0)
    w = {"out": rng.standard_normal((2, 8, 16)), "stack": rng.standard_normal((3, 16, 16))}
    loud = np.geomspace(0.01, 9, 16)  # channels that count differently
    x = {"out": rng.standard_normal((20, 2, 8)) * loud.reshape(2, 8),
         "stack": rng.standard_normal((3, 4, 5, 16)) * loud}  # fmt: skip
    small, report = lqec.quantize_tree(
        w, recipe, "*", axes={"out": "iio", "stack": "lio"}, inputs=x
    )
    alone = lqec.quantize(w["out"].reshape(16, 16), recipe, x=x["out"].reshape(20, 16))
    assert jax.tree.all(jax.tree.map(np.array_equal, small["out"].leaf, alone))
    alone = lqec.quantize(w["stack"][2], recipe, x=x["stack"][2].reshape(20, 16))
    last = jax.tree.map(lambda a: a[2], small["stack"].leaf)
    assert jax.tree.all(jax.tree.map(np.array_equal, last, alone))
    other = lqec.quantize(w["stack"][2], recipe, x=x["stack"][2].reshape(20, 16)[:, ::-1])
    assert not np.array_equal(other.base.codes, alone.base.codes)
    assert {e["steps"][0]["objective"] for e in report["linears"]} == {"relative channel error"}


# ---- refusals

W = np.ones((4, 16))
NEEDY = "rtn(bits=2, group_size=4, clip_search='output')"


@pytest.mark.parametrize(
    "tree, recipe, options, message",
    [
        ({"w": W}, "rtn(bits=2) | rilq()", {}, "rilq needs a whole model"),
        ({"w": W}, "rtn(bits=2, group_size=3)", {}, r"by group_size=3 where .*\(w\).*; select="),
        ({"w": W, "v": W}, "svd(rank=5)", {"select": "v"}, r"rank=5 is larger.*\(v\)"),
        ({"w": W * np.nan}, "svd(rank=1)", {}, "w holds NaN or Inf"),
        ({}, "svd(rank=1)", {}, "a dict without arrays"),
        ("model", "svd(rank=1)", {}, "a str without arrays"),
        ({"w": jax.ShapeDtypeStruct((4, 4), "float32")}, "svd(rank=1)", {}, "without arrays"),
        ({"w": W}, "svd(rank=1)", {"select": "nothing"}, "w is left: matches no glob of"),
        ({"w": W}, "svd(rank=1)", {"select": 3}, "select=3; a glob"),
        ({"w": W}, "svd(rank=1)", {"select": []}, r"select=\[\]; a glob"),
        ({"b": W[0]}, "svd(rank=1)", {"select": None}, "there is no matrix among b"),
        ({"w": W[None]}, "svd(rank=1)", {}, r"w is left: which axes of \[1, 4, 16\]"),
        ({"w": W}, "svd(rank=1)", {"axes": {"v": "io"}}, "'v': ...}} matches no chosen"),
        ({"w": W}, "svd(rank=1)", {"axes": {"w": "xy"}}, "one letter an axis"),
        ({"w": W}, NEEDY, {}, "reads the inputs' rms; give inputs={'w': x"),
        ({"w": W}, NEEDY, {"inputs": {"v": W}}, "inputs of 'v'.*did you mean|known: w"),
        ({"w": W}, NEEDY, {"inputs": {"w": W}}, r"are \[4, 16\]; \[tokens, 4\] was wanted"),
        ({"w": W}, NEEDY, {"inputs": {"w": W.T * np.inf}}, "'w' hold NaN or Inf"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(tree, recipe, options, message):
    with pytest.raises(InputError) as caught:
        lqec.quantize_tree(tree, recipe, **{"select": "*", **options})
    assert "\n" not in str(caught.value)
    assert re.search(message.replace("}}", "}"), str(caught.value)), caught.value


def test_it_is_no_function_to_trace():
    with pytest.raises(InputError, match="outside of jit"):
        jax.jit(lambda w: lqec.quantize_tree({"kernel": w}, RTN).params)(W)
