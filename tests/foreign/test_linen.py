"""Packed products in a linen model: the same answers, and no dense weight in the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from flax.core import meta

import lqec_jax as lqec
from lqec_jax.foreign.kernel import PackedKernel
from lqec_jax.foreign.linen import open_params
from tests.foreign.models import HEADS, KERNELS, RECIPE, TOKENS, WIDTH, Scanned, init

X = np.random.RandomState(0).standard_normal((2, 3, WIDTH)).astype(np.float32)
SQUARE = np.random.RandomState(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def packed(apply):
    def run(*args):
        with lqec.packed():
            return apply(*args)

    return run


def values_of(jaxpr):
    """Yields the type of every value that a program makes, also inside loops and calls."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from values_of(getattr(inner, "jaxpr", inner))


def is_program(value) -> bool:
    return hasattr(value, "eqns")


def holds_dense(fn, *args) -> bool:
    """Says whether a program makes a floating array of a whole kernel, all of 32 x 32."""
    return any(
        jnp.issubdtype(v.dtype, jnp.floating) and v.size == WIDTH**2 and len(v.shape) > 1
        for v in values_of(jax.make_jaxpr(fn)(*args).jaxpr)
    )


def test_a_tree_is_read_by_path_and_put_together_again():
    tree = {"params": {"a": {"w": SQUARE}, "b": [X]}, "cache": {"w": X}}
    weights, put = open_params(tree)
    assert list(weights) == ["a/w", "b/0"] and weights["b/0"] is X
    again = put({"b/0": 1})
    assert again["params"]["b"] == [1] and again["params"]["a"]["w"] is SQUARE
    assert again["cache"]["w"] is X and tree["params"]["b"][0] is X


@pytest.fixture(scope="module")
def scanned():
    model = Scanned(bias=True)
    return model, lqec.quantize_tree(init(model), RECIPE, KERNELS).params


def test_a_scanned_transformer_multiplies_by_packed_weights(scanned):
    model, params = scanned
    apply = lambda params: model.apply({"params": params}, TOKENS)  # noqa: E731
    assert np.allclose(jax.jit(packed(apply))(params), jax.jit(apply)(params), atol=1e-4)
    assert holds_dense(apply, params)
    assert not holds_dense(packed(apply), params)


def test_its_gradient_holds_no_dense_weight_either(scanned):
    model, params = scanned
    train, frozen = lqec.partition(params)

    def loss(train):
        logits = model.apply({"params": lqec.combine(train, frozen)}, TOKENS)
        return jnp.mean(jnp.square(logits))

    assert holds_dense(jax.grad(loss), train)
    assert not holds_dense(jax.grad(packed(loss)), train)


class Layer(nn.Module):
    """One layer of a kind."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


class Doubled(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


def relative_error(a, b) -> float:
    a, b = (np.asarray(array, np.float64) for array in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(a)


def quantize(model, x):
    rng = np.random.RandomState(2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(a.dtype), shapes)
    return lqec.quantize_tree(params, RECIPE, KERNELS).params


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: nn.Dense(WIDTH), X),
        (lambda: nn.Dense(WIDTH, use_bias=False, dtype=jnp.bfloat16), X[0, 0]),
        (lambda: nn.DenseGeneral((HEADS, 8)), X),
        (lambda: nn.DenseGeneral(WIDTH, axis=(-2, -1)), X.reshape(2, 3, HEADS, 8)),
        (lambda: nn.DenseGeneral((2, 16), axis=(3, 1)), X.reshape(2, HEADS, 3, 8)),
    ],
    ids=["dense", "bfloat16_vector", "query", "out", "axes"],
)
def test_layers_and_their_gradients_are_what_they_were(make, x):
    model = Layer(make)
    params = quantize(model, x)
    train, frozen = lqec.partition(params)

    def apply(train):
        return model.apply({"params": lqec.combine(train, frozen)}, x)

    def loss_and_grad(apply):
        def loss(train):
            y = apply(train)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.value_and_grad(loss, has_aux=True)

    ((_, y), grads), ((_, own_y), own_grads) = (
        jax.jit(loss_and_grad(run))(train) for run in (apply, packed(apply))
    )
    exact = y.dtype == jnp.float32
    assert (own_y.shape, own_y.dtype) == (y.shape, y.dtype)
    assert relative_error(y, own_y) < (1e-5 if exact else 0.01)
    errors = jax.tree.map(relative_error, grads, own_grads)
    assert len(jax.tree.leaves(errors)) == 2
    assert max(jax.tree.leaves(errors)) < (1e-4 if exact else 0.1)
    assert holds_dense(apply, train) and not holds_dense(packed(apply), train)


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: nn.Dense(WIDTH, precision="highest"), X),
        (lambda: nn.Dense(WIDTH, dot_general=jax.lax.dot_general), X),
        (lambda: nn.DenseGeneral(WIDTH, batch_dims=(0,)), X[:1]),
        (lambda: nn.Conv(WIDTH, (1,)), X),
        (lambda: Doubled(WIDTH), X),
    ],
    ids=["precision", "dot_general", "batch_dims", "convolution", "subclass"],
)
def test_layers_that_multiply_otherwise_keep_their_way(make, x):
    model = Layer(make)
    params = quantize(model, x)
    apply = lambda params: model.apply({"params": params}, x)  # noqa: E731
    assert holds_dense(packed(apply), params)
    assert str(jax.make_jaxpr(packed(apply))(params)) == str(jax.make_jaxpr(apply)(params))


def test_flax_says_what_does_not_fit():
    params = quantize(Layer(lambda: nn.Dense(WIDTH)), X)
    with pytest.raises(errors.ScopeParamShapeError):
        packed(lambda: Layer(lambda: nn.Dense(8)).apply({"params": params}, X))()
    with pytest.raises(errors.ScopeParamShapeError):
        packed(lambda: Layer(lambda: nn.Dense(WIDTH)).apply({"params": params}, X[..., :8]))()


def test_a_model_that_is_not_quantized_is_left_alone():
    model = Layer(lambda: nn.Dense(WIDTH))
    run = packed(lambda: model.init_with_output(jax.random.key(0), X))
    y, variables = run()
    assert np.array_equal(y, model.apply(variables, X))
    boxes = jax.tree.leaves(variables, is_leaf=meta.is_axis_metadata)
    assert not any(isinstance(box, PackedKernel) for box in boxes)
