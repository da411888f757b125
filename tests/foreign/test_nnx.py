"""NNX modules: a new module whose kernels are packed, under NNX's own transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.foreign.nnx import PackedParam
from tests.foreign.models import FF, LAYERS, RECIPE, WIDTH, Perceptron

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


def test_a_state_can_be_quantized_too(model, small):
    definition, state = nnx.split(model)
    packed, _ = lqec.quantize_tree(state, RECIPE, "up/kernel")
    packed, report = lqec.quantize_tree(packed, RECIPE, SELECT)
    assert isinstance(packed, nnx.State)
    assert np.array_equal(apply(nnx.merge(definition, packed), X), apply(small.params, X))
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
