"""NNX modules: a new module whose kernels are packed, under NNX's own transforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.foreign.nnx import PackedLinear, PackedLinearGeneral, PackedParam
from tests.foreign.models import FF, HEADS, LAYERS, RECIPE, WIDTH, Perceptron
from tests.foreign.test_linen import holds_dense, relative_error

X = np.random.RandomState(0).standard_normal((5, WIDTH)).astype(np.float32)
SELECT = ["*/kernel", "mix"]


@pytest.fixture(scope="module")
def model():
    return Perceptron(nnx.Rngs(0))


@pytest.fixture(scope="module")
def small(model):
    return lqec.quantize_tree(model, RECIPE, SELECT)


def make_dense(module):
    """Returns a module with the dense weights that a packed one reads."""
    definition, state = nnx.split(module)
    plain = [(path, nnx.Param(param[...])) for path, param in nnx.to_flat_state(state)]
    return nnx.merge(definition, nnx.from_flat_state(plain))


@nnx.jit
def apply(module, x):
    return module(x)


def test_the_module_is_the_one_with_dense_weights(model, small):
    before = apply(model, X)
    y = apply(small.params, X)
    assert np.allclose(y, apply(make_dense(small.params), X), atol=1e-5)
    assert 0.01 < np.abs(y - before).max() < 2
    assert type(model.up.kernel) is nnx.Param and np.array_equal(apply(model, X), before)
    assert [e["path"] for e in small.report["linears"]] == ["down/kernel", "mix", "up/kernel"]
    assert small.report["skipped"] == []


def test_a_packed_param_is_read_in_every_way_as_its_weight(small):
    param = small.params.mix
    assert isinstance(param, PackedParam) and isinstance(param, nnx.Param)
    w = np.asarray(param[...])
    assert np.array_equal(param.get_raw_value().unbox(), w)
    assert (param.shape, param.dtype, w.dtype) == ((WIDTH, WIDTH), jnp.float32, jnp.float32)
    assert np.array_equal(param.get_value(), w) and np.array_equal(param[3:5], w[3:5])
    assert np.allclose(X @ param, X @ w, atol=1e-5) and np.allclose(param + 1, w + 1)
    assert np.allclose(jnp.asarray(param), w)
    with pytest.warns(DeprecationWarning, match=".value"):
        assert np.array_equal(param.value, w)


def test_gradients_flow_to_inputs_and_adapters(small):
    module = small.params

    def loss(module, x):
        return jnp.mean(jnp.square(module(x)))

    dense = make_dense(module)
    dx = nnx.jit(nnx.grad(loss, argnums=1))
    assert np.allclose(dx(module, X), dx(dense, X), atol=1e-5)
    definition, state = nnx.split(module)
    train, frozen = lqec.partition(state, "adapters")

    @jax.jit
    def grad(train):
        return jax.grad(lambda t: loss(nnx.merge(definition, lqec.combine(t, frozen)), X))(train)

    low = module.mix.get_raw_value().leaf.corrections[0]
    got = grad(train)["mix"].get_raw_value().leaf.corrections[0]
    g = nnx.grad(loss)(dense, X)["mix"][...]  # of W = base + a b
    assert len(jax.tree.leaves(train)) == 6 and np.abs(got.a).max() > 1e-4
    assert np.allclose(got.a, g @ low.b.T, rtol=1e-3, atol=1e-5)
    assert np.allclose(got.b, low.a.T @ g, rtol=1e-3, atol=1e-5)


class Pair(nnx.Module):
    """One layer twice: shared."""

    def __init__(self, layer):
        self.first = self.second = layer

    def __call__(self, x):
        return self.second(self.first(x))


def test_layers_multiply_by_packed_weights_forward_and_backward():
    layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    small = lqec.quantize_tree(Pair(layer), RECIPE, "*/kernel").params
    assert type(small.first) is PackedLinear and small.second is small.first
    assert type(layer) is nnx.Linear and isinstance(small.first, nnx.Linear)
    definition, state = nnx.split(small)
    train, frozen = lqec.partition(state, "adapters")

    def loss(train, definition, frozen):
        return jnp.mean(jnp.square(nnx.merge(definition, lqec.combine(train, frozen))(X)))

    # The same arrays in the layers as they were, which unpack them.
    plain, _ = nnx.split(Pair(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))))
    grad, dense = (
        jax.jit(jax.grad(partial(loss, definition=d, frozen=frozen)))(train)
        for d in (definition, plain)
    )
    errors = jax.tree.map(relative_error, dense, grad)
    assert len(jax.tree.leaves(errors)) == 2 and max(jax.tree.leaves(errors)) < 1e-4
    packed, unpacked = (partial(loss, definition=d, frozen=frozen) for d in (definition, plain))
    assert not holds_dense(packed, train) and not holds_dense(jax.grad(packed), train)
    assert holds_dense(unpacked, train)


@pytest.mark.parametrize(
    "inputs, outputs, axis, x",
    [
        (WIDTH, (HEADS, 8), -1, X),
        ((HEADS, 8), WIDTH, (-2, -1), X.reshape(5, HEADS, 8)),
        ((HEADS, 8), (2, 16), (2, 0), np.moveaxis(X.reshape(5, HEADS, 8), 1, 0)),
    ],
    ids=["query", "out", "axes"],
)
def test_general_layers_do_too(inputs, outputs, axis, x):
    layer = nnx.LinearGeneral(inputs, outputs, axis=axis, rngs=nnx.Rngs(0))
    small = lqec.quantize_tree(layer, RECIPE, "kernel").params
    assert type(small) is PackedLinearGeneral and not holds_dense(small, x)
    assert np.allclose(apply(small, x), apply(make_dense(small), x), atol=1e-5)


class Doubled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    "make",
    [
        partial(nnx.Linear, precision="highest"),
        partial(nnx.Linear, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)),
        partial(nnx.Linear, preferred_element_type=jnp.float32),
        Doubled,
    ],
    ids=["precision", "dot_general", "element_type", "subclass"],
)
def test_layers_that_multiply_otherwise_keep_their_way(make):
    layer = make(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    small = lqec.quantize_tree(layer, RECIPE, "kernel").params
    assert type(small) is (PackedLinear if type(layer) is nnx.Linear else Doubled)
    definition, _ = nnx.split(layer)
    plain = nnx.merge(definition, nnx.state(small))
    assert type(plain) is type(layer) and holds_dense(small, X)
    assert str(jax.make_jaxpr(small)(X)) == str(jax.make_jaxpr(plain)(X))


def test_a_state_can_be_quantized_too(model, small):
    definition, state = nnx.split(model)
    packed, _ = lqec.quantize_tree(state, RECIPE, "up/kernel")
    packed, report = lqec.quantize_tree(packed, RECIPE, SELECT)
    assert isinstance(packed, nnx.State)
    # Its definition is its owner's, so its layers read the dense weights.
    merged = nnx.merge(definition, packed)
    assert type(merged.up) is nnx.Linear and holds_dense(merged, X)
    assert np.allclose(apply(merged, X), apply(small.params, X), atol=1e-5)
    assert report["skipped"] == [{"path": "up/kernel", "reason": "compressed already"}]


class Stack(nnx.Module):
    """Layers made by `nnx.vmap` and walked by `nnx.scan`."""

    def __init__(self):
        @nnx.vmap(in_axes=0)
        def make(key):
            return nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(key))

        self.layers = make(jax.random.split(jax.random.key(0), LAYERS))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def step(layer, x):
            return jnp.tanh(layer(x))

        return step(self.layers, x)


def test_a_stack_is_scanned():
    stack = Stack()
    small, report = lqec.quantize_tree(stack, RECIPE, "*/kernel")
    assert [e["path"] for e in report["linears"]] == [
        f"layers/kernel[{layer}]" for layer in range(LAYERS)
    ]
    y = apply(small, X)
    assert np.allclose(y, apply(make_dense(small), X), atol=1e-5)
    assert 0.01 < np.abs(y - apply(stack, X)).max() < 1


def test_modules_and_parts_of_them_are_printed(small):
    definition, state = nnx.split(small.params)
    train, frozen = lqec.partition(state)
    said = f"PackedKernel(shape=({WIDTH}, {FF}), axes='io', dtype=float32)"
    for tree in (small.params, state, train, frozen):
        assert said in str(tree).replace("PackedParam", "") and "PackedParam" in str(tree)


def test_what_cannot_be_quantized_is_said_in_one_line():
    class Empty(nnx.Module):
        pass

    with pytest.raises(InputError, match="a Empty without arrays") as caught:
        lqec.quantize_tree(Empty(), RECIPE)
    assert "\n" not in str(caught.value)
