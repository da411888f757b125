"""Statistics of a linear's inputs against float64 numpy, over batches of unequal size."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.calibration import collect as module
from lqec_jax.calibration.collect import STATISTICS, collect
from lqec_jax.core.types import LinearStats
from lqec_jax.errors import InputError

FIELDS = {field.name for field in dataclasses.fields(LinearStats)}


def make_batches(dtype, d_in=12, seed=0):
    rng = np.random.default_rng(seed)
    channels = np.exp(rng.uniform(-6, 6, d_in))
    shapes = [(4, 7, d_in), (1, 3, d_in), (5, d_in)]
    return [jnp.asarray(rng.standard_normal(shape) * channels, dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_is_over_the_tokens_of_all_batches(dtype):
    batches = make_batches(dtype)
    x = np.concatenate([np.asarray(b, np.float64).reshape(-1, b.shape[-1]) for b in batches])
    rms = collect(iter(batches), frozenset({"rms"})).rms
    assert rms.dtype == jnp.float32 and rms.shape == (12,)
    np.testing.assert_allclose(rms, np.sqrt(np.square(x).mean(axis=0)), rtol=1e-6)


def test_the_gram_and_the_mean_size_are_over_the_tokens_of_all_batches():
    batches = make_batches(jnp.float32)
    x = np.concatenate([np.asarray(b, np.float64).reshape(-1, b.shape[-1]) for b in batches])
    stats = collect(iter(batches), frozenset({"gram", "absmean"}))
    sizes = np.sqrt(np.diag(x.T @ x / len(x)))
    error = np.abs(stats.gram - x.T @ x / len(x)) / np.outer(sizes, sizes)
    assert stats.gram.dtype == jnp.float32 and error.max() < 1e-6
    np.testing.assert_allclose(stats.absmean, np.abs(x).mean(axis=0), rtol=1e-6)


def test_products_are_asked_for_in_full_precision():
    x = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    program = str(jax.make_jaxpr(STATISTICS["gram"].add)(x))
    # In our order, and in that of an accelerator.
    assert program.count("dot_general[") == 2
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


@pytest.mark.parametrize("tokens", [1, 7, 128, 129, 300])
def test_sums_in_our_order_are_the_sums(tokens):
    x = np.random.default_rng(tokens).integers(-9, 9, (tokens, 5)).astype(np.float32)
    y = x[:, ::-1]  # integers: every order gives the same
    np.testing.assert_array_equal(module.sum_rows(jnp.asarray(x)), x.sum(0))
    np.testing.assert_array_equal(module.sum_products(x, y), x.T @ y)


# Sizes at which XLA's own sums have other bits on one thread than on two or on four.
ON_THREADS = """
import numpy as np, hashlib, jax.numpy as jnp
from lqec_jax.calibration.collect import collect
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.quantizers.gptq import quantize
rng, digest = np.random.default_rng(0), hashlib.sha256()
for tokens, d in ((1024, 192), (512, 64), (384, 128)):
    x = rng.standard_normal((tokens, d)).astype(np.float32)
    stats = collect([jnp.asarray(x)], frozenset({"gram", "rms", "absmean"}))
    for array in (stats.gram, stats.rms, stats.absmean):
        digest.update(np.asarray(array).tobytes())
w = jnp.asarray(rng.standard_normal((128, 64)), jnp.float32)
base, _ = quantize(w, stats.gram, GroupGrid(2, 32, clip_search="weight"))
digest.update(np.asarray(base.codes).tobytes())
print(digest.hexdigest())
"""


def test_statistics_and_codes_do_not_depend_on_the_number_of_threads():
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "kernels")))

    def run(threads: str) -> str:
        # XLA's threads; LAPACK's are one, as the README asks for.
        env = os.environ | {"NPROC": threads, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, "-c", ON_THREADS], env=env, check=True, text=True,
                              stdout=subprocess.PIPE).stdout  # fmt: skip

    one, two, four = map(run, "124")
    assert len(one.strip()) == 64 and one == two == four


def test_a_gram_that_is_too_large_grows_in_a_file(monkeypatch, tmp_path):
    batches = make_batches(jnp.float32)
    needs = frozenset({"gram", "rms"})
    held = collect(iter(batches), needs, tmp_path / "gram.bin")
    assert isinstance(held.gram, jax.Array) and not (tmp_path / "gram.bin").exists()
    monkeypatch.setattr(module, "SPILL_BYTES", 100)
    monkeypatch.setattr(module, "SPILL_ROWS", 5)
    spilled = collect(iter(batches), needs, tmp_path / "gram.bin")
    assert isinstance(spilled.gram, np.memmap) and (tmp_path / "gram.bin").stat().st_size == 4 * 144
    np.testing.assert_allclose(spilled.gram, held.gram, rtol=1e-6)
    np.testing.assert_array_equal(spilled.rms, held.rms)


def test_what_inputs_do_not_tell_is_refused():
    with pytest.raises(InputError, match="fisher is told by a whole model's gradients"):
        collect(make_batches(jnp.float32), frozenset({"fisher"}))


def test_half_precision_inputs_are_summed_in_float32():
    # In float16 the square of 300 is Inf, and 2048 + 1 is 2048.
    large = collect([jnp.full((3, 2), 300, jnp.float16)], frozenset({"rms"})).rms
    np.testing.assert_array_equal(large, [300, 300])
    ones = [jnp.ones((tokens, 2), jnp.float16) for tokens in (2048, 1)]
    np.testing.assert_array_equal(collect(ones, frozenset({"rms"})).rms, [1, 1])


@pytest.mark.parametrize("needs", [frozenset(), *(frozenset({name}) for name in STATISTICS)])
def test_only_what_is_asked_for_is_set(needs):
    stats = collect(make_batches(jnp.float32), needs)
    assert {name for name in FIELDS if getattr(stats, name) is not None} == needs


def test_every_field_is_a_statistic_of_inputs_or_a_gradient():
    assert set(STATISTICS) | {"fisher"} == FIELDS


def test_statistics_of_few_tokens_are_said():
    (line,) = module.describe_tokens(16, 192)
    assert line.startswith("statistics: of 16 tokens for 192 inputs, fewer than 2 an input")
    assert module.describe_tokens(383, 192) and module.describe_tokens(384, 192) == []
