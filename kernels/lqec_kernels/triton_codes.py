"""What the Triton kernels read, and how codes become floats in two instructions a pair.

Two codes are unpacked at once. Words of inputs r and r + 1 are joined by halves, then one shift and
one `lop3` put both codes into the fractions of two 16-bit floats whose exponents it sets such that
the code's lowest bit counts 1: the floats are 2^k + code, exactly. The same shift serves all codes
that fit side by side into the fraction; k goes with the place. What is to be taken off is known per
place (`find_rest`), and can be taken off sums instead of codes.

3 bits are two planes. Their words are first put together, so that codes lie 4 bits apart: half of
the sub-blocks in one word, half in another.

A `lop3` takes one constant as it is; a second one costs an instruction each time it is put into a
register. So the exponents are multiplied by a 1 that the assembler does not know to be one.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def can_unpack(bits, kind):
    """Says whether a float's fraction holds a code: a bfloat16's holds no 8 bits."""
    return bits < 8 or kind == tl.float16


@triton.constexpr_function
def find_place(sub, bits, in_half):
    """Returns the half of a word where code `sub` lies, how far right it moves, what lies below."""
    fraction, width = (10 if in_half else 7), (2 if bits == 3 else bits)
    pitch = 4 if bits == 3 else bits
    half, place = divmod(sub, 16 // width)
    index = place // 2 if bits == 3 else place
    room = (fraction - bits) // pitch + 1  # codes side by side in the fraction
    below = index % room * pitch
    return half, index * pitch - below, below


@triton.constexpr_function
def find_rest(sub, bits, in_half, symmetric, ptx):
    """Returns by how much an unpacked code is too large: 2^k, and the middle of a symmetric grid.

    Without PTX codes are unpacked as they are.
    """
    middle = 2 ** (bits - 1) if symmetric else 0
    if not ptx:
        return middle
    _, _, below = find_place(sub, bits, in_half)
    return 2 ** ((10 if in_half else 7) - below) + middle


@triton.constexpr_function
def write_float(number, in_half):
    """Returns the bits of a positive integer as a 16-bit float, which holds it exactly."""
    fraction, bias = (10, 15) if in_half else (7, 127)
    log = number.bit_length() - 1
    return (bias + log - 1 << fraction) + (number << fraction >> log)


@triton.constexpr_function
def write_unpacking(sub, bits, in_half, taken):
    """Writes the PTX that turns words of inputs r, r + 1 into two floats.

    Operands: $0 two packed floats; $1, $2 the words; for 3 bits, $3, $4 those of the upper plane.

    Args:
      sub: which code of the words, 0 .. 32/p - 1 for a plane of p bits.
      bits: 2, 3 or 4; 8 in float16 only, a bfloat16 has no room.
      in_half: float16, otherwise bfloat16.
      taken: what is taken off the floats 2^k + code, `find_rest` or 0.
    """
    half, shift, below = find_place(sub, bits, in_half)
    joined = "0x7632" if half else "0x5410"
    power = write_float(find_rest(sub, bits, in_half, False, True), in_half) * 0x10001
    lines = [".reg .b32 t, u, f;", f"prmt.b32 t, $1, $2, {joined};"]
    if bits == 3:
        together = "shr.b32 t, t, 2;" if sub % 2 else "shl.b32 u, u, 2;"
        lines += [f"prmt.b32 u, $3, $4, {joined};", together]
        lines += ["lop3.b32 t, t, 0x33333333, u, 0xe2;"]  # t where the mask is, else u
    mask = (2**bits - 1 << below) * 0x10001
    lines += [
        f"shr.b32 t, t, {shift};",
        "mov.u32 f, %lanemask_eq;",
        "popc.b32 f, f;",  # 1
        f"mul.lo.u32 f, f, {power:#010x};",
        f"lop3.b32 {'t' if taken else '$0'}, t, {mask:#010x}, f, 0xea;",  # t and mask, or f
    ]
    if taken:
        one, rest = (write_float(number, in_half) * 0x10001 for number in (1, taken))
        lines += [f"mov.b32 f, {one:#010x};", f"mov.b32 u, {rest | 0x80008000:#010x};"]
        lines += [f"fma.rn.{'f16x2' if in_half else 'bf16x2'} $0, t, f, u;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def unpack(words, upper, SUB: tl.constexpr, BITS: tl.constexpr, TAKEN: tl.constexpr,
           FLOAT: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Returns sub-block SUB of the codes of words as FLOAT; by PTX 2^k too large, less TAKEN."""
    HALF: tl.constexpr = FLOAT == tl.float16
    if PTX:
        TEXT: tl.constexpr = write_unpacking(SUB, BITS, HALF, TAKEN)
        OPERANDS: tl.constexpr = "=r,r,r,r,r" if BITS == 3 else "=r,r,r"
        given = [words, upper] if BITS == 3 else [words]
        if HALF:
            codes = tl.inline_asm_elementwise(TEXT, OPERANDS, given, tl.float16, True, 2)
        else:
            codes = tl.inline_asm_elementwise(TEXT, OPERANDS, given, tl.bfloat16, True, 2)
    else:
        WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
        codes = (words >> (SUB * WIDTH)) & (2**WIDTH - 1)
        if BITS == 3:
            codes = codes | ((upper >> (SUB * WIDTH)) & 1) << 2
        codes = (codes.to(tl.int32) - TAKEN).to(tl.float32).to(FLOAT)
    return codes


@triton.jit
def load_words(low, high, unit, first, n, fits, D_OUT: tl.constexpr, BITS: tl.constexpr,
               SIZE: tl.constexpr):  # fmt: skip
    """Loads words first .. first + SIZE of a unit, [columns, SIZE], of both planes at 3 bits.

    A plane of 1 bit has half as many words: each serves rows r and r + 8 of the other, by its even
    and its odd bits, and is shifted so that both planes' codes lie at the same place.
    """
    UNIT: tl.constexpr = 256
    ROWS: tl.constexpr = UNIT * (2 if BITS == 3 else BITS) // 32
    r = first + tl.arange(0, SIZE)
    start = low + tl.cast(unit, tl.int64) * (ROWS * D_OUT)
    words = tl.load(start + r[None, :] * D_OUT + n[:, None], mask=fits)
    upper = words
    if BITS == 3:
        HALF: tl.constexpr = ROWS // 2
        start = high + tl.cast(unit, tl.int64) * (HALF * D_OUT)
        r = tl.arange(0, HALF)
        even = tl.load(start + r[None, :] * D_OUT + n[:, None], mask=fits)
        # Joined, not loaded twice: shifts by amounts that go with r would part the load from its
        # use, and pass all words through shared memory once more.
        upper = tl.join(even, even >> 1).permute(0, 2, 1).reshape(words.shape)
    return words, upper


@triton.jit
def load_x(x, m, k, D_IN: tl.constexpr):
    """Loads [inputs, rows] of x [rows, D_IN], zeros past D_IN; rows m are within x."""
    UNIT: tl.constexpr = 256
    at = x + m[None, :] * D_IN + k[:, None]
    if D_IN % UNIT == 0:
        return tl.load(at)
    return tl.load(at, mask=(k < D_IN)[:, None], other=0.0)


@triton.jit
def load_group(numbers, k, n, fits, D_IN: tl.constexpr, D_OUT: tl.constexpr, GROUP: tl.constexpr):
    """Loads scales or offsets of inputs k (one, or [inputs]) as float32 [columns, inputs]."""
    at = tl.minimum(k, D_IN - 1) // GROUP
    return tl.load(numbers + at * D_OUT + n[:, None], mask=fits).to(tl.float32)


@triton.jit
def find_layer(array, layer, SIZE: tl.constexpr, STACKED: tl.constexpr):
    """Returns where a layer's SIZE numbers begin: a stack is read where it lies, not copied."""
    if STACKED:
        array += tl.load(layer).to(tl.int64) * SIZE
    return array


@triton.jit
def find_weight(low, high, scales, offsets, layer, D_IN: tl.constexpr, D_OUT: tl.constexpr,
                BITS: tl.constexpr, GROUP: tl.constexpr, STACKED: tl.constexpr):  # fmt: skip
    """Returns the four arrays of a layer."""
    UNIT: tl.constexpr = 256
    # Words of a plane are UNIT · p / 32 a unit; groups, the last of which is whole, D_IN / GROUP.
    PLANE: tl.constexpr = (D_IN + UNIT - 1) // UNIT * (UNIT // 32) * D_OUT
    GROUPS: tl.constexpr = D_IN // GROUP * D_OUT
    low = find_layer(low, layer, PLANE * (2 if BITS == 3 else BITS), STACKED)
    high = find_layer(high, layer, PLANE * (1 if BITS == 3 else BITS), STACKED)
    scales = find_layer(scales, layer, GROUPS, STACKED)
    offsets = find_layer(offsets, layer, GROUPS, STACKED)
    return low, high, scales, offsets
