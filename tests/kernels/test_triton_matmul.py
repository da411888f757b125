"""How the Triton kernels are called, on a CPU: a stand-in for jax-triton runs their equations.

Like jax-triton's, its call is a primitive without rules for gradients and vmap, and either version
takes its own name for the outputs. The kernels themselves: see test_triton_source.
"""

import sys
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec

import lqec_kernels
from lqec_kernels import LowRank, Planes, api, packed_matmul, triton_matmul
from lqec_kernels.planes import PlanesLayout
from lqec_kernels.reference import tiled_matmul
from lqec_kernels.tuning import Config
from tests.kernels.test_reference import assert_near

D_IN, D_OUT = 600, 40


def dense_of(low, high, scales, offsets, sizes: dict) -> jax.Array:
    layout = PlanesLayout(sizes["BITS"], sizes["GROUP"], sizes["D_IN"], 256)
    planes = (low, high) if sizes["BITS"] == 3 else (low,)
    return layout.dense((*planes, scales, None if sizes["SYMMETRIC"] else offsets), jnp.float32)


def find(arrays: tuple, layer: jax.Array, sizes: dict) -> tuple:
    """Takes a layer of stacks; what is not read is no stack."""
    if not sizes["STACKED"]:
        return arrays
    return tuple(a if a.ndim < 3 else a[layer] for a in arrays)


def multiply_rows(x, low, high, scales, offsets, a, layer, **sizes) -> list:
    """The equation of the kernel of that name; so are the two below."""
    low, high, scales, offsets, a = find((low, high, scales, offsets, a), layer, sizes)
    w, step = dense_of(low, high, scales, offsets, sizes), 256 * sizes["UNITS"]
    x = x.astype(jnp.float32)
    starts = range(0, sizes["D_IN"], step)
    parts = [x[:, s : s + step] @ w[s : s + step] for s in starts]
    a = a.astype(jnp.float32)
    down = [x[:, s : s + step] @ a[s : s + step] for s in starts] if sizes["RANK"] else [x[0, :1]]
    return [jnp.stack(parts), jnp.stack(down) if sizes["RANK"] else down[0]]


def sum_parts(parts, down, b, layer, **sizes) -> list:
    (b,) = find((b,), layer, sizes)
    return [parts.sum(0) + down.sum(0) @ b.astype(jnp.float32)]


def multiply_tiles(x, low, high, scales, offsets, down, b, layer, **sizes) -> list:
    low, high, scales, offsets, b = find((low, high, scales, offsets, b), layer, sizes)
    w = dense_of(low, high, scales, offsets, sizes).astype(x.dtype)
    y = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return [y + down.astype(jnp.float32) @ b.astype(jnp.float32) if sizes["RANK"] else y]


def run_kernel(*arrays, kernel, outputs, sizes):
    made = kernel(*arrays, **dict(sizes))
    assert [array.shape for array in made] == [output.shape for output in outputs]
    return [array.astype(output.dtype) for array, output in zip(made, outputs, strict=True)]


call_p = Primitive("stand_in_for_triton_call")
call_p.multiple_results = True
call_p.def_impl(lambda *arrays, **given: jax.jit(partial(call_p.bind, **given))(*arrays))
call_p.def_abstract_eval(
    lambda *_, outputs, **__: [jax.core.ShapedArray(o.shape, o.dtype) for o in outputs]
)
mlir.register_lowering(call_p, mlir.lower_fun(run_kernel, multiple_results=True))


class Calls(list):
    """What was launched: (kernel's name, grid, num_warps, constants)."""

    def launch(self, arrays, kernel, outputs, grid, num_warps, **sizes) -> list:
        assert all(size == int(size) for size in grid) and min(grid) >= 1
        self.append((kernel.__name__, grid, num_warps, sizes))
        return call_p.bind(
            *arrays, kernel=kernel, outputs=tuple(outputs), sizes=tuple(sorted(sizes.items()))
        )

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self]


def stand_in(calls: Calls, version: str) -> ModuleType:
    def triton_call_03(*args, kernel, out_shape, grid, num_warps=None, num_stages=None, **meta):
        return calls.launch(args, kernel, out_shape, grid, num_warps, **meta)

    def triton_call_04(
        *args, kernel, out_type=None, grid, num_warps=None, num_stages=None, **kwargs
    ):
        assert "out_shape" not in kwargs, "0.4 warns of that name"
        return calls.launch(args, kernel, out_type, grid, num_warps, **kwargs)

    module = ModuleType("jax_triton")
    module.triton_call = {"0.3": triton_call_03, "0.4": triton_call_04}[version]
    return module


@pytest.fixture
def calls(request, monkeypatch, tmp_path) -> Calls:
    """Puts the stand-ins where the wrapper imports the real ones, of the version asked for."""
    calls = Calls()
    version = getattr(request, "param", "0.4")
    monkeypatch.setitem(sys.modules, "jax_triton", stand_in(calls, version))
    source = ModuleType("lqec_kernels.triton_source")
    for kernel in (multiply_rows, sum_parts, multiply_tiles):
        setattr(source, kernel.__name__, kernel)
    monkeypatch.setitem(sys.modules, source.__name__, source)
    monkeypatch.setattr(lqec_kernels, "triton_source", source, raising=False)
    monkeypatch.setattr(api, "why_not", lambda *given, **named: "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def draw(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), dtype)


def draw_base(bits: int = 3, *, d_in: int = D_IN, offsets: bool = True, lead: tuple = ()) -> Planes:
    random = np.random.RandomState(bits)
    codes = random.randint(0, 2**bits, (*lead, d_in, D_OUT)).astype(np.uint8)
    shape = (*lead, d_in // 60 or 1, D_OUT)
    scales = (0.1 + random.rand(*shape)).astype(np.float16)
    zeros = (random.rand(*shape) * 2**bits).astype(np.float32) if offsets else None
    group = d_in // shape[-2]
    return jax.jit(partial(Planes.from_codes, bits=bits, group_size=group))(codes, scales, zeros)


def draw_factors(rank: int = 5, dtype: str = "float32") -> tuple:
    return draw(D_IN, rank, dtype=dtype), draw(rank, D_OUT, seed=1, dtype=dtype)


@pytest.mark.parametrize("calls", ["0.3", "0.4"], indirect=True)
@pytest.mark.parametrize(
    ("m", "dtype", "bits", "kernels"),
    [
        (1, "float32", 2, ["multiply_rows"]),
        (16, "float16", 3, ["multiply_rows", "sum_parts"]),
        (5, "bfloat16", 4, ["multiply_rows", "sum_parts"]),
        (17, "bfloat16", 8, ["multiply_tiles"]),
        (17, "float32", 3, []),
    ],
)
def test_equals_the_reference(m, dtype, bits, kernels, calls):
    x, base, low_rank = draw(m, D_IN, dtype=dtype), draw_base(bits), draw_factors(dtype=dtype)

    @jax.jit
    def both(x, base, low_rank):
        wide = x.astype(jnp.float32)
        wanted = jnp.matmul(wide, base.dense(), precision="highest")
        a, b = (factor.astype(jnp.float32) for factor in low_rank)
        wanted = wanted + jnp.matmul(jnp.matmul(wide, a, precision="highest"), b)
        return triton_matmul.triton_matmul(x, base, low_rank), wanted

    came, wanted = both(x, base, low_rank)
    assert came.dtype == dtype
    assert_near([came.astype(jnp.float32)], [wanted], 1e-4 if dtype == "float32" else 1e-2)
    assert calls.names == kernels


def test_without_an_adapter_one_launch_writes_the_product(calls):
    x, base = draw(4, D_IN, dtype="float16"), draw_base(4, offsets=False)
    run = jax.jit(triton_matmul.triton_matmul, static_argnames="config")
    whole = run(x, base, config=Config(8, 32, splits=1))
    split = run(x, base, config=Config(8, 32, splits=2, num_warps=8))
    assert_near([whole], [split], 2e-3)
    (_, grid, warps, sizes), (_, grid_2, warps_2, sizes_2) = calls
    assert (grid, warps, sizes["UNITS"]) == ((2, 1), 4, 3)
    assert (grid_2, warps_2, sizes_2["UNITS"]) == ((2, 2), 8, 2)
    assert sizes["SYMMETRIC"] and sizes["RANK"] == 0


def test_an_adapters_programs_come_before_the_weights(calls):
    run = jax.jit(triton_matmul.triton_matmul, static_argnames="config")
    run(draw(4, D_IN, dtype="float16"), draw_base(2), draw_factors(65), config=Config(8, 32, 2))
    (_, grid, _, sizes), (_, grid_of_sum, _, sizes_of_sum) = calls
    assert (grid, sizes["RANK"], sizes["BLOCK_R"]) == ((2 + 2, 2), 65, 64)
    assert (grid_of_sum, sizes_of_sum["SPLITS"]) == ((1,), 2)


@pytest.mark.parametrize(
    ("m", "dtype", "kernels"),
    [
        (2, "bfloat16", ["multiply_rows", "sum_parts"]),
        (2, "float32", ["multiply_rows"]),
        (20, "float16", ["multiply_tiles"]),
        (20, "float32", []),
    ],
)
def test_a_layer_is_read_in_its_stack(m, dtype, kernels, calls):
    base = draw_base(3, lead=(3,))
    low_rank = draw(3, D_IN, 5), draw(3, 5, D_OUT, seed=1)
    x = draw(m, D_IN, dtype=dtype)

    def multiply(x, base, low_rank):
        def step(_, layer):
            return None, triton_matmul.triton_matmul(x, base, low_rank, layer=layer)

        return lax.scan(step, None, jnp.arange(3))[1]

    came = jax.jit(multiply)(x, base, low_rank).astype(jnp.float32)
    for layer in range(3):
        one, factors = jax.tree.map(lambda a, i=layer: a[i], (base, low_rank))
        wanted = jax.jit(partial(tiled_matmul, low_rank=factors))(x.astype(jnp.float32), one)
        assert_near([came[layer]], [wanted], {"float32": 1e-5, "float16": 3e-3}.get(dtype, 2e-2))
    assert calls.names == kernels
    # What the kernels are given is the stacks themselves: no words were sliced before.
    assert all(sizes["STACKED"] for *_, sizes in calls)
    sliced = "u32[1," in str(jax.make_jaxpr(multiply)(x, base, low_rank))
    assert sliced == (kernels == [])


def test_panels_are_whole_tiles_of_columns(calls, monkeypatch):
    monkeypatch.setattr(triton_matmul, "PANEL", 64 * 400)
    codes = np.zeros((64, 900), np.uint8)
    base = Planes.from_codes(codes, jnp.ones((1, 900)), None, bits=2, group_size=64)
    program = str(jax.make_jaxpr(triton_matmul.multiply_panels)(draw(20, 64), base))
    assert "f32[20,384]" in program and "f32[20,300]" not in program
    assert_near([triton_matmul.multiply_panels(draw(20, 64), base)], [draw(20, 64) @ base.dense()],
                1e-5)  # fmt: skip


def test_many_rows_take_panels_that_need_not_divide(calls, monkeypatch):
    monkeypatch.setattr(triton_matmul, "PANEL", D_IN * 17)
    monkeypatch.setattr(triton_matmul, "PANEL_COLUMNS", 1)
    x, base, low_rank = draw(20, D_IN), draw_base(2), draw_factors()
    came = jax.jit(triton_matmul.triton_matmul)(x, base, low_rank)
    wanted = jax.jit(partial(tiled_matmul, low_rank=low_rank))(x, base)
    assert_near([came], [wanted], 1e-5)
    assert not calls


def test_gradients_are_the_references(calls):
    x, base = draw(2, 3, D_IN), draw_base(3)
    adapter = LowRank(*draw_factors())

    @partial(jax.jit, static_argnums=0)
    def gradients(implementation, x, adapter, base):
        def loss(x, adapter, base):
            y = packed_matmul(x, base, corrections=(adapter,), implementation=implementation)
            return jnp.sum(jnp.sin(y / 30))

        return jax.value_and_grad(loss, (0, 1, 2), allow_int=True)(x, adapter, base)

    came = gradients("triton", x, adapter, base)
    wanted = gradients("xla", x, adapter, base)
    assert calls.names == ["multiply_rows"]
    floats = [
        [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != jax.dtypes.float0]
        for tree in (came, wanted)
    ]
    assert len(floats[0]) == 1 + 1 + 2 + 2
    assert_near(*floats, 1e-3)  # the scales' gradients are float16
    assert {plane.dtype for plane in came[1][2].planes} == {jax.dtypes.float0}


@pytest.mark.parametrize("shared", ["weight", "rows", "adapter", "nothing"])
def test_vmap(shared, calls):
    stack, one = draw_base(3, lead=(2,)), draw_base(3)
    factors = draw_factors()
    stacked = jax.tree.map(lambda factor: jnp.stack([factor, -factor]), factors)
    x, x_axis = (draw(4, D_IN), None) if shared == "rows" else (draw(2, 4, D_IN), 0)
    base, base_axis = (one, None) if shared == "weight" else (stack, 0)
    low_rank, rank_axis = (stacked, 0) if shared == "nothing" else (factors, None)

    def run(multiply):
        return jax.vmap(multiply, in_axes=(x_axis, base_axis, rank_axis))(x, base, low_rank)

    wanted = jax.jit(run, static_argnums=0)(lambda x, w, ab: tiled_matmul(x, w, low_rank=ab))
    came = jax.jit(run, static_argnums=0)(triton_matmul.triton_matmul)
    assert_near([came], [wanted], 1e-4)
    # Rows of one weight are rows of one launch: 8 in three pieces, otherwise 4.
    assert calls[-1][3]["ROWS_X"] == 3 * (8 if shared == "weight" else 4)


def test_scan_over_a_stack_with_a_gradient(calls):
    stack = draw_base(2, lead=(3,))
    x = draw(4, D_IN)

    @partial(jax.jit, static_argnums=0)
    def answer(implementation, x):
        def layer(x, base):
            y = packed_matmul(x, base, implementation=implementation)
            return x + jnp.tanh(jnp.sum(y, axis=-1, keepdims=True) / 300), None

        return jax.value_and_grad(lambda x: jnp.sum(jax.lax.scan(layer, x, stack)[0]))(x)

    assert_near(answer("triton", x), answer("xla", x), 1e-4)
    assert set(calls.names) == {"multiply_rows"}


@pytest.mark.parametrize("m", [4, 36])
def test_under_shard_map_each_device_multiplies_its_rows(m, calls):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, base = draw(m, D_IN), draw_base(2)
    split = jax.shard_map(
        partial(packed_matmul, implementation="triton"), mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data"),
    )  # fmt: skip
    assert_near([jax.jit(split)(x, base)], [jax.jit(tiled_matmul)(x, base)], 1e-4)
    assert [sizes["ROWS_X"] for *_, sizes in calls] == ([3 * 2] if m == 4 else [])


def test_no_rows_are_no_launch(calls):
    y = jax.jit(triton_matmul.triton_matmul)(draw(2, 0, D_IN), draw_base(2))
    assert y.shape == (2, 0, D_OUT) and not calls


@pytest.mark.parametrize("group", [16, 32, 60, 64, 128, 256, 512, 768])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_shares_a_scale_lies_in_one_group(bits, group):
    size, subs, spread = triton_matmul.cut_groups(bits, group)
    rows = {2: 16, 3: 16, 4: 32, 8: 64}[bits]
    assert rows % size == 0 and (256 // rows) % subs == 0
    assert spread == (group == 60)
    if spread:
        return
    word, sub = np.meshgrid(np.arange(rows), np.arange(256 // rows))
    inputs = sub * rows + word
    chunk = sub // subs * (rows // size) + word // size
    for number in range(chunk.max() + 1):
        assert len(set(inputs[chunk == number] // group)) == 1
    assert group > 64 or size * subs == group


def test_three_pieces_are_a_float32():
    x = np.float32(np.random.RandomState(0).standard_normal(1000)) * np.logspace(-30, 30, 1000)
    x = jnp.asarray(np.concatenate([x, [0.0, 1.0, 2.0**127]]), jnp.float32)
    pieces = jax.jit(triton_matmul.split_pieces)(x)
    assert {piece.dtype for piece in pieces} == {jnp.dtype("bfloat16")}
    whole = sum(np.asarray(piece, np.float64) for piece in pieces)
    np.testing.assert_allclose(whole, np.asarray(x, np.float64), rtol=2.0**-23)


def test_tuning_times_the_product_itself(calls, tmp_path):
    x, base = draw(3, D_IN, dtype="float16"), draw_base(2)
    candidates = [Config(8, 32), Config(8, 32, splits=3)]
    seconds = iter([2.0, 1.0])

    def measure(run) -> float:
        assert run().shape == (3, D_OUT)
        return next(seconds)

    best = triton_matmul.tune(x, base, candidates=candidates, measure=measure)
    assert best == candidates[1]
    calls.clear()
    jax.jit(triton_matmul.triton_matmul)(x, base)
    assert [grid for _, grid, *_ in calls] == [(2, 3)]
    assert triton_matmul.tune(draw(600, D_IN), base) is None


# Refusals


def refusal(x, base) -> str:
    with pytest.raises(NotImplementedError) as refused:
        triton_matmul.triton_matmul(x, base)
    return str(refused.value)


def test_refuses_what_no_kernel_reads():
    assert "call lqec_kernels.repack" in refusal(draw(1, 4), lqec_kernels.Dense(jnp.ones((4, 2))))
    small = draw_base(2, d_in=40)
    assert "40 inputs has one of 64" in refusal(draw(1, 40), small)
    assert "not int32" in refusal(jnp.ones((1, D_IN), jnp.int32), draw_base(2))


def test_names_the_extra_where_jax_triton_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    said = refusal(draw(1, D_IN), draw_base(2))
    assert "jax_triton" in said and said.endswith("pip install 'lqec-jax[triton]'")


def test_says_what_jax_triton_says_where_there_is_no_gpu(monkeypatch):
    class Refuses:
        """A finder of modules, in whose place jax-triton 0.3 raises on a machine without a GPU."""

        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "jax_triton":
                raise ImportError("jax-triton requires JAX to be installed with GPU support. The")

    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses, *sys.meta_path])
    said = refusal(draw(1, D_IN), draw_base(2))
    assert said == "jax-triton requires JAX to be installed with GPU support"
