"""LoftQ: one turn is the quantizer and an SVD, more are never worse in what they lower."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.calibration.data import load_tokens
from lqec_jax.compensation.loftq import loftq
from lqec_jax.compensation.svd import svd
from lqec_jax.core.types import LinearProblem, LinearStats, run_linear, weight_error
from lqec_jax.errors import InputError
from lqec_jax.quantizers.e8p import e8p
from lqec_jax.quantizers.nf import nf
from lqec_jax.quantizers.rtn import rtn
from lqec_jax.quantizers.squeezellm import squeezellm
from lqec_kernels.formats import CompressedLinear, Dense, Hadamard
from lqec_kernels.outliers import Outliers
from tests.compensation.leaves import assert_same_but_last_places

D_IN, D_OUT, RANK = 64, 32, 4


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


W = draw(D_IN, D_OUT)
X = draw(256, D_IN, seed=1) * np.exp(draw(D_IN, seed=2))
PROBLEM = LinearProblem(
    jnp.asarray(W), LinearStats(gram=jnp.asarray(X.T @ X / len(X))), jax.random.key(0)
)
LEAF = CompressedLinear(Dense(PROBLEM.w))


def solve(*steps) -> tuple:
    def chain(problem, leaf):
        facts = ()
        for step in steps:
            leaf, facts = run_linear(step, problem, leaf)
        return leaf, facts

    return jax.jit(chain)(PROBLEM, LEAF)


@pytest.mark.parametrize("quantizer", [rtn(bits=2, group_size=16), nf(bits=2, group_size=16)])
def test_one_turn_is_the_quantizer_and_then_svd(quantizer):
    one, _ = solve(loftq(quantizer=quantizer, rank=RANK, iters=1))
    other, _ = solve(quantizer, svd(rank=RANK))
    assert_same_but_last_places(one, other)


@pytest.mark.parametrize("quantizer", [rtn(bits=2, group_size=16), nf(bits=2, group_size=16)])
def test_more_turns_leave_less_and_fit_what_is_stored(quantizer):
    leaf, (_, errors, won, _) = solve(loftq(quantizer=quantizer, rank=RANK, iters=5))
    assert errors[won] == errors.min() < 0.9 * errors[0]
    assert float(weight_error(PROBLEM, leaf)) == pytest.approx(float(errors[won]), rel=1e-4)
    (correction,) = leaf.corrections
    assert correction.rank == RANK and correction.a.dtype == jnp.float16
    again, _ = solve(loftq(quantizer=quantizer, rank=RANK, iters=int(won) + 1, keep="last"))
    np.testing.assert_allclose(again.dense(), leaf.dense(), atol=1e-3)


def test_a_quantizer_that_rotates_takes_part():
    step = loftq(quantizer=e8p(bits=2, passes=0), rank=RANK, iters=2)
    assert step.needs == {"gram"}
    leaf, facts = solve(step)
    assert isinstance(leaf.input_transform, Hadamard) and isinstance(
        leaf.output_transform, Hadamard
    )
    assert float(weight_error(PROBLEM, leaf)) == pytest.approx(float(facts[1].min()), rel=1e-4)
    assert facts[1].min() < 0.2
    assert step.notes(jax.device_get(facts))[0].startswith("turns: pair ")


def test_a_quantizer_with_outliers_takes_part():
    quantizer = squeezellm(bits=2, weights="ones", outliers=0.02)
    leaf, facts = solve(loftq(quantizer=quantizer, rank=RANK, iters=2))
    assert [type(c) for c in leaf.corrections[:-1]] == [Outliers]
    assert float(weight_error(PROBLEM, leaf)) == pytest.approx(float(facts[1].min()), rel=1e-4)
    assert facts[1].min() < 0.9 * float(weight_error(PROBLEM, solve(quantizer)[0]))


def test_without_a_quantizer_it_is_svd_and_says_so():
    step = loftq(rank=RANK)
    one, facts = solve(rtn(bits=2, group_size=16), step)
    other, _ = solve(rtn(bits=2, group_size=16), svd(rank=RANK))
    assert_same_but_last_places(one, other)
    (line,) = step.notes(jax.device_get(facts))
    assert "the base stayed" in line


def test_arguments_are_refused():
    for arguments in ({"rank": 0}, {"iters": 0}, {"first": "b"}, {"keep": "b"}, {"dtype": "b"}):
        (name,) = arguments
        with pytest.raises(InputError, match=f"^loftq: {name}="):
            loftq(**arguments)
    with pytest.raises(InputError, match="^loftq: quantizer=svd leaves the weight dense"):
        lqec.quantize(W, f"loftq(quantizer=svd(rank=2), rank={RANK})")
    with pytest.raises(InputError, match="^loftq: quantizer=rilq, a model step; a method that"):
        lqec.quantize(W, f"loftq(quantizer=rilq(), rank={RANK})")


# The reference's perplexities after five turns, on a grid with scales of 32 bits, of the last pair.
GOLDEN = {"babyllama": 6.06567, "xs279k": 26.6289}


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_real_models_reach_the_references_perplexity(name, shared, optimized):
    model = lqec.load(shared / "models" / name)
    quantizer = rtn(bits=2, group_size=32, scale_dtype="float32")
    step = loftq(quantizer=quantizer, rank=16, iters=5, keep="last", dtype="float32")

    @jax.jit
    @jax.vmap
    def compress(w):
        problem = LinearProblem(w, LinearStats(), jax.random.key(0))
        return run_linear(step, problem, CompressedLinear(Dense(w)))[0]

    def replace(path, leaf):
        return compress(leaf) if path[-1].key == "kernel" else leaf

    blocks = jax.tree_util.tree_map_with_path(replace, model.params["blocks"])
    small = dataclasses.replace(model, params={**model.params, "blocks": blocks})
    text = shared / "data" / "tinystories_dev.jsonl"
    tokens = load_tokens(text, model.tokenizer, "documents", limit=128 * 256)
    assert lqec.perplexity(small, tokens, seqlen=256).ppl == pytest.approx(GOLDEN[name], rel=0.02)
