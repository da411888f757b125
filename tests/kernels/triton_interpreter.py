"""Runs the Triton kernels in Triton's interpreter; a process of its own, because `triton.jit` reads
TRITON_INTERPRET when a kernel is defined. Prints one line of JSON: case -> largest error, relative
to the largest product, against numpy in float64.

The interpreter knows neither PTX nor a bfloat16 product; both are given to it here, the PTX by a
reader of just the instructions that the kernels write. Products are summed as by matrix units at
their worst: sixteen and the sum so far at a time, each cut, not rounded, at the 24th digit of the
largest of them.
"""

import json
import os
import re
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from lqec_kernels import triton_source
from lqec_kernels.planes import WIDTHS
from lqec_kernels.triton_matmul import cut_groups
from tests.kernels.test_planes import split_by_numpy

UNIT = 256
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def read_ptx(text: str, words: list[np.ndarray]) -> np.ndarray:
    """Runs a block of PTX over arrays of 32-bit words, $1, $2, ...; returns $0."""
    registers = {f"${i + 1}": w.astype(np.uint32) for i, w in enumerate(words)}
    registers["%lanemask_eq"] = np.uint32(1 << 5)  # of some lane

    def value(name: str):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in re.findall(r"[\w.]+ [^;]*(?=;)", text.strip("{} ")):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        to, *names = (part.strip() for part in rest.split(","))
        registers[to] = run_instruction(name, [value(n) for n in names])
    return registers["$0"]


def run_instruction(name: str, operands: list) -> np.ndarray:
    if name in ("mov.b32", "mov.u32"):
        return operands[0]
    if name == "popc.b32":
        return np.uint32(int(operands[0]).bit_count())
    if name == "lop3.b32":
        return choose_bits(*operands)
    if name == "prmt.b32":
        high, low = int(operands[2]) >> 8, int(operands[2]) & 0xFF
        halves = {0x10: np.uint32(0), 0x32: np.uint32(16), 0x54: np.uint32(0), 0x76: np.uint32(16)}
        first, second = operands[0] >> halves[low], operands[1] >> halves[high]
        return (first & 0xFFFF) | (second & 0xFFFF) << np.uint32(16)
    if name in ("fma.rn.f16x2", "fma.rn.bf16x2"):
        kind = "float16" if name.endswith(".f16x2") else "bfloat16"
        a, b, c = (halves_of(operand, kind) for operand in operands)
        return join([a[i] * b[i] + c[i] for i in range(2)], kind)
    binary = {"shr.b32": np.right_shift, "shl.b32": np.left_shift, "mul.lo.u32": np.multiply}[name]
    return binary(operands[0], operands[1])


def choose_bits(a, b, c, table) -> np.ndarray:
    """Looks each bit up in a table of eight: bits of a, b and c are its place, 4 a + 2 b + c."""
    chosen = np.zeros_like(a)
    for place in range(8):
        if int(table) >> place & 1:
            first, second, third = (
                number if place & bit else ~number for number, bit in ((a, 4), (b, 2), (c, 1))
            )
            chosen |= first & second & third
    return chosen


def halves_of(words, kind: str) -> list[np.ndarray]:
    parts = [np.asarray(words >> np.uint32(s) & 0xFFFF).astype(np.uint16) for s in (0, 16)]
    if kind == "float16":
        return [p.view(np.float16).astype(np.float64) for p in parts]
    return [(p.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for p in parts]


def join(parts: list[np.ndarray], kind: str) -> np.ndarray:
    bits = [torch.from_numpy(p).to(DTYPES[kind]) for p in parts]
    for exact, part in zip(bits, parts, strict=True):
        assert np.array_equal(exact.to(torch.float64).numpy(), part), "an fma that rounds"
    low, high = (b.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for b in bits)
    return low | high << np.uint32(16)


class Result(NamedTuple):
    """What the interpreter's builder would return from an instruction of several results."""

    results: list

    def get_result(self, number: int):
        return self.results[number]


def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
    assert pack == 2 and constraints == ",".join(["=r"] + ["r"] * 2 * len(values))
    words = [half for v in values for half in v.data.reshape(-1, 2).T]
    packed = read_ptx(text, words)
    both = np.stack([packed & 0xFFFF, packed >> np.uint32(16)], axis=-1).astype(np.uint16)
    kind = types[0].scalar
    data = both.reshape(values[0].data.shape)
    return Result([TensorHandle(data.view(np.float16) if kind == tl.float16 else data, kind)])


def create_dot(self, a, b, d, *options):
    left, right, sums = widen(a), widen(b), d.data.astype(np.float64)  # [n, k], [k, m], [n, m]
    for k in range(0, left.shape[1], 16):
        products = left[:, k : k + 16, None] * right[None, k : k + 16]  # [n, 16, m]
        terms = np.concatenate([products, sums[:, None]], axis=1)
        digit = 2.0 ** (np.frexp(np.abs(terms).max(axis=1, keepdims=True))[1] - 24)
        sums = (np.trunc(terms / digit) * digit).sum(axis=1).astype(np.float32).astype(np.float64)
    return TensorHandle(sums.astype(np.float32), d.dtype.scalar)


def widen(handle: TensorHandle) -> np.ndarray:
    """Returns numbers as float64; the interpreter holds a bfloat16 as its bits."""
    if handle.dtype.scalar == tl.bfloat16:
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    return handle.data.astype(np.float64)


interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm
interpreter.InterpreterBuilder.create_dot = create_dot


class Case(NamedTuple):
    """One product; see `Config` for the blocks."""

    bits: int
    d_in: int
    d_out: int
    group: int
    kind: str = "float16"
    offsets: bool = True
    m: int = 3
    rank: int = 0
    splits: int = 1
    ptx: bool = True
    tiles: bool = False
    layer: int | None = None  # of a stack of three
    scale_kind: str = "float16"
    offset_kind: str = "float16"
    pieces: bool = False  # x is float32, as three bfloat16 pieces


CASES = [
    # Every width, by PTX and by Triton's own words, both dtypes; two units, columns cut.
    *(
        Case(bits, 512, 40, 64, kind, offsets=not ptx, ptx=ptx, tiles=tiles)
        for bits in WIDTHS
        for kind in DTYPES
        for ptx, tiles in ((True, False), (False, False), (True, True))
    ),
    # Groups: smaller than a plane's sub-block, of more than a unit, of the whole, of any size.
    Case(8, 256, 32, 32), Case(4, 256, 32, 16), Case(2, 256, 32, 16), Case(2, 1024, 32, 512),
    Case(3, 512, 32, 512), Case(3, 300, 32, 60), Case(2, 300, 32, 300, tiles=True),
    Case(4, 400, 32, 80, "bfloat16", tiles=True), Case(8, 320, 32, 40),
    # Inputs that end within a unit, splits that are not equal, an adapter of an odd rank.
    Case(2, 704, 40, 64, splits=2), Case(3, 704, 72, 32, m=16, splits=3, rank=5),
    Case(2, 512, 40, 128, "bfloat16", m=1, splits=2, rank=70),
    Case(4, 704, 40, 32, m=20, rank=6, tiles=True), Case(4, 256, 72, 128, rank=16),
    # A layer of a stack, with and without what each width and kernel reads beside the words.
    Case(3, 300, 40, 60, m=2, rank=5, splits=2, layer=2), Case(2, 512, 40, 64, layer=1),
    Case(3, 512, 40, 64, "bfloat16", m=20, rank=6, tiles=True, layer=1),
    Case(4, 512, 40, 64, offsets=False, rank=16, layer=2),
    # Rows: for one group or several in eight columns, sixteen columns, and more.
    *(Case(2, 512, 40, 64, "bfloat16", m=m) for m in (1, 2, 4, 8, 16, 20)),
    Case(4, 256, 32, 32, m=1),
    # Scales and offsets of other dtypes.
    Case(2, 512, 40, 64, offset_kind="uint8"), Case(3, 300, 40, 60, offset_kind="uint8"),
    Case(4, 512, 40, 64, "bfloat16", scale_kind="bfloat16", offset_kind="uint8", m=16),
    Case(2, 512, 40, 64, offset_kind="float32"), Case(4, 512, 40, 128, scale_kind="float32", m=1),
    # Pieces of float32, sums long enough for what cutting adds up to.
    Case(2, 4096, 32, 64, m=1, pieces=True), Case(4, 2048, 32, 64, offsets=False, m=4, pieces=True),
    Case(2, 4096, 32, 64, m=1), Case(2, 4096, 32, 64, "bfloat16", m=1, offsets=False),
]  # fmt: skip


def draw(case: Case) -> dict[str, np.ndarray]:
    random = np.random.RandomState(case.bits)
    groups = -(-case.d_in // case.group)
    to = DTYPES[case.kind]

    def tensor(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    zeros = torch.from_numpy(random.rand(groups, case.d_out))
    codes = random.randint(0, 2**case.bits, (case.d_in, case.d_out)).astype(np.uint8)
    return {
        "codes": codes,
        "x": tensor(case.m, case.d_in).to(torch.float32 if case.pieces else to),
        "scales": (0.1 + tensor(groups, case.d_out).abs()).to(getattr(torch, case.scale_kind)),
        "offsets": (zeros * 2**case.bits).to(getattr(torch, case.offset_kind)),
        "a": tensor(case.d_in, max(case.rank, 1)).to(to),
        "b": tensor(max(case.rank, 1), case.d_out).to(to),
        "planes": [torch.from_numpy(p.view(np.int32)).view(torch.uint32)
                   for p in split_by_numpy(codes, case.bits, UNIT)],
    }  # fmt: skip


def multiply_by_numpy(case: Case, given: dict) -> np.ndarray:
    scales, offsets = (
        np.repeat(given[name].to(torch.float64).numpy(), case.group, axis=0)[: case.d_in]
        for name in ("scales", "offsets")
    )
    w = (given["codes"] - (offsets if case.offsets else 2.0 ** (case.bits - 1))) * scales
    if case.tiles:  # whose weights are rounded to x's dtype
        w = torch.from_numpy(w.astype(np.float32)).to(DTYPES[case.kind]).to(torch.float64).numpy()
    x, a, b = (given[name].to(torch.float64).numpy() for name in ("x", "a", "b"))
    return x @ w + (x @ a @ b if case.rank else 0)


def stack(case: Case, given: dict) -> list[torch.Tensor]:
    """Returns a, b and the weight's arrays; of a stack, the other layers' numbers are wrong."""
    planes = given["planes"]
    offsets = given["offsets" if case.offsets else "scales"]
    arrays = [given["a"], given["b"], planes[0], planes[-1], given["scales"], offsets]
    if case.layer is None:
        return arrays
    stacks = []
    for array in arrays:
        kind, bits = array.dtype, array.view(torch.int32) if array.dtype == torch.uint32 else array
        layers = [bits + 1 for _ in range(3)]
        layers[case.layer] = bits
        stacks.append(torch.stack(layers).view(kind))
    return stacks


def multiply_by_kernels(case: Case, given: dict) -> np.ndarray:
    size, subs, spread = cut_groups(case.bits, case.group)
    columns, rows, block_r = 32, max(8, 1 << (case.m - 1).bit_length()), 16
    constants = {
        "ROWS_X": case.m, "D_IN": case.d_in, "D_OUT": case.d_out, "RANK": case.rank,
        "BITS": case.bits, "GROUP": case.group, "SYMMETRIC": not case.offsets, "SIZE": size,
        "SPREAD": spread, "BLOCK_N": columns, "BLOCK_M": rows, "BLOCK_R": block_r, "STAGES": 1,
        "PTX": case.ptx,
    }  # fmt: skip
    a, b, *weight = stack(case, given)
    layer = torch.tensor(case.layer or 0, dtype=torch.int32)
    constants["STACKED"] = case.layer is not None
    blocks = -(-case.d_out // columns)
    y = torch.full((case.m, case.d_out), torch.nan)
    if case.tiles:
        down = given["x"].float() @ given["a"].float()
        grid = (blocks, -(-case.m // rows))
        triton_source.multiply_tiles[grid](given["x"], *weight, down, b, layer, y, **constants)
        return y.numpy()
    units = -(-case.d_in // UNIT)
    constants |= {"SUBS": subs, "UNITS": -(-units // case.splits)}
    parts = torch.full((case.splits, case.m, case.d_out), torch.nan)
    down = torch.full((case.splits, case.m, max(case.rank, 1)), torch.nan)
    grid = (-(-case.rank // block_r) + blocks, case.splits)
    triton_source.multiply_rows[grid](given["x"], *weight, a, layer, parts, down, **constants)
    if not case.rank:
        return parts.sum(0).numpy()
    triton_source.sum_parts[(blocks,)](
        parts, down, b, layer, y, ROWS_X=case.m, D_OUT=case.d_out, RANK=case.rank,
        SPLITS=case.splits, STACKED=constants["STACKED"], BLOCK_N=columns, BLOCK_M=rows,
        BLOCK_R=block_r,
    )  # fmt: skip
    return y.numpy()


def multiply_pieces(case: Case, given: dict) -> np.ndarray:
    """Multiplies by a float32 x as `triton_matmul` does: its bfloat16 pieces are rows."""
    pieces, rest = [], given["x"]
    for _ in range(3):
        pieces.append(rest.to(torch.bfloat16))
        rest = rest - pieces[-1]
    y = multiply_by_kernels(case._replace(m=3 * case.m), given | {"x": torch.cat(pieces)})
    return y.reshape(3, case.m, case.d_out).sum(0)  # [m, d_out]


def main() -> None:
    errors = {}
    for case in CASES:
        given = draw(case)
        wanted = multiply_by_numpy(case, given)
        made = (multiply_pieces if case.pieces else multiply_by_kernels)(case, given)
        error = np.abs(made - wanted).max() / np.abs(wanted).max()
        errors[str(case)] = float(error) if np.isfinite(error) else None
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
