"""What can run where: each refusal has its reason."""

import jax
import jax.numpy as jnp
import pytest

from lqec_kernels import Dense, repack_for_kernels
from lqec_kernels.capability import IMPLEMENTATIONS, ORDER, can_repack, why_not
from tests.kernels.products import draw_affine


@pytest.fixture(scope="module")
def affine():
    return draw_affine(3, 64, 8, group=16)


def on(monkeypatch, platform: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)


def test_xla_takes_everything_and_every_platform_ends_with_it(affine):
    assert why_not("xla", Dense(jnp.ones((2, 2))), jnp.float64, shards=4) == ""
    assert {order[-1] for order in ORDER.values()} == {"xla"}
    assert {name for order in ORDER.values() for name in order} <= set(IMPLEMENTATIONS)
    # The interpreter is not fast: a CPU does not choose it by itself.
    assert ORDER["cpu"] == ("xla",)


@pytest.mark.parametrize("name", ["pallas", "triton", "pallas_triton", "mosaic"])
def test_kernels_read_some_formats_some_floats_and_one_device(affine, name):
    five = draw_affine(5, 64, 8, group=16)
    assert why_not(name, five, jnp.float32) == "it reads no Affine of 5 bits"
    assert why_not(name, Dense(jnp.ones((2, 2))), jnp.float32) == "it reads no Dense"
    assert "x is float64; it takes float32" in why_not(name, affine, jnp.float64)
    assert "split over 2 devices" in why_not(name, affine, jnp.float32, shards=2)
    assert (
        can_repack(affine) and not can_repack(five) and not can_repack(repack_for_kernels(affine))
    )


def test_a_program_that_the_compiler_splits_takes_no_kernel(affine, monkeypatch):
    on(monkeypatch, "tpu")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    reasons = []

    def look(x: jax.Array) -> jax.Array:
        reasons.append(why_not("pallas", affine, jnp.bfloat16))
        return x

    split = jax.sharding.PartitionSpec("data")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        look(jnp.ones(4))
        assert "over 4 devices" in reasons.pop()
        jax.eval_shape(jax.shard_map(look, mesh=mesh, in_specs=split, out_specs=split), jnp.ones(4))
    look(jnp.ones(4))
    assert set(reasons) == {""}


def test_pallas_is_of_cpus_and_tpus(affine, monkeypatch):
    for platform in ("cpu", "tpu"):
        on(monkeypatch, platform)
        assert why_not("pallas", repack_for_kernels(affine), jnp.bfloat16) == ""
        assert why_not("pallas", affine, jnp.bfloat16) == ""
    assert "no float16" in why_not("pallas", affine, jnp.float16)
    on(monkeypatch, "gpu")
    assert "deprecated since jax 0.11" in why_not("pallas", affine, jnp.bfloat16)
    assert why_not("pallas_triton", affine, jnp.bfloat16) == ""


def test_triton_needs_a_gpu_and_its_package(affine, monkeypatch):
    for name in ("triton", "pallas_triton"):
        reason = why_not(name, affine, jnp.float32)
        assert reason == "it needs an NVIDIA GPU; the default backend is 'cpu'"
    on(monkeypatch, "gpu")
    monkeypatch.setattr("lqec_kernels.capability.find_spec", lambda name: None)
    assert "pip install 'lqec-jax[triton]'" in why_not("triton", affine, jnp.float32)
    monkeypatch.setattr("lqec_kernels.capability.find_spec", lambda name: object())
    assert why_not("triton", affine, jnp.float32) == ""


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_mosaic_needs_hopper(affine, monkeypatch, capability):
    reason = why_not("mosaic", affine, jnp.bfloat16)
    assert reason == "it needs an NVIDIA GPU; the default backend is 'cpu'"

    class Device:
        compute_capability = capability

    on(monkeypatch, "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device])
    reason = why_not("mosaic", affine, jnp.bfloat16)
    hopper = f"it needs a Hopper GPU, of compute capability 9.0; this one's is {capability}"
    assert reason == ("" if capability == "9.0" else hopper)
    assert not any("mosaic" in order for order in ORDER.values())
