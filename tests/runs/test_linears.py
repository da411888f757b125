"""Steps on one weight: what is reported, what is refused, and that shapes alone tell the sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.models.decoder import model_fns
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import WORSE, apply_steps, preview
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from tests.train.tiny import make_config

RECIPE = "rtn(bits=2, group_size=32) | svd(rank=4)"


@pytest.fixture
def problem() -> LinearProblem:
    w = jax.random.normal(jax.random.key(0), (64, 48))
    return LinearProblem(w, LinearStats(), jax.random.key(1))


def run(recipe: str, problem: LinearProblem):
    leaf = CompressedLinear(Dense(problem.w))
    return apply_steps("blocks/0/attn/q", parse_recipe(recipe).steps, problem, leaf)


def test_the_report_follows_the_objective(problem):
    leaf, report = run(RECIPE, problem)
    rounding, correction = report["steps"]
    error = jnp.sum((problem.w - leaf.dense()) ** 2) / jnp.sum(problem.w**2)
    assert rounding["before"] == 0 < correction["after"] < rounding["after"] == correction["before"]
    assert report["relative_error"] == pytest.approx(float(error), rel=1e-5)
    assert report["bits_per_weight"] == leaf.bits_per_weight
    assert (report["d_in"], report["d_out"]) == (64, 48)


def test_an_adapter_that_is_worse_than_none_is_said_to_be(problem):
    def spoil(problem, leaf):
        away = leaf.base.dense()[:, :1] - problem.w[:, :1]
        return dataclasses.replace(leaf, corrections=(LowRank(away, jnp.ones((1, 48))),))

    *steps, svd = parse_recipe(RECIPE).steps
    leaf = CompressedLinear(Dense(problem.w))
    for run, said in ((svd.run, []), (spoil, [WORSE])):
        last = dataclasses.replace(svd, run=run)
        _, report = apply_steps("blocks/0/attn/q", [*steps, last], problem, leaf)
        assert [step["notes"] for step in report["steps"]] == [[], said]


def test_a_refusal_names_the_weight(problem):
    with pytest.raises(InputError, match=r"group_size=48.*\(at blocks/0/attn/q\)"):
        run("rtn(bits=2, group_size=48)", problem)


def test_a_step_that_breaks_a_weight_is_named_with_it(problem):
    broken = dataclasses.replace(problem, w=problem.w.at[0, 0].set(jnp.nan))
    with pytest.raises(FloatingPointError, match="rtn made blocks/0/attn/q non-finite"):
        run("rtn(bits=2, group_size=32)", broken)


def test_shapes_alone_give_the_sizes():
    fns = model_fns(make_config())
    shapes = {path: (64, 64) for path in fns.linears} | {"mlp/up": (64, 128)}
    leaves = preview(fns, shapes, parse_recipe(f"{RECIPE} | rilq()"))
    for path, (d_in, d_out) in shapes.items():
        w = jax.random.normal(jax.random.key(2), (d_in, d_out))
        real = run(RECIPE, LinearProblem(w, LinearStats(), jax.random.key(1)))[0]
        assert leaves[path].stored_bits() == real.stored_bits()


def test_shapes_alone_refuse():
    fns = model_fns(make_config())
    shapes = dict.fromkeys(fns.linears, (64, 64))
    with pytest.raises(InputError, match=r"rank=80.*every block's attn/q"):
        preview(fns, shapes, parse_recipe("rtn(bits=2) | rilq(rank=80)"))
