"""Products with `Planes` on NVIDIA GPUs: the Triton kernels. Imports triton only, never jax.

    multiply_rows    few rows of x: as fast as the words can be read
    sum_parts        the sum of what splits of the inputs gave, and the adapter's second half
    multiply_tiles   more rows: the weight's tile is dequantized once and meets all of them

How few rows are kept at the speed of memory. At 2 bits an H200 reads some 15 weights a nanosecond
and multiprocessor cycle over; only two or three instructions a weight are free. So

  * sums are made by the matrix units, which also take up to 16 rows for the price of one. The
    weight is the left operand, read into registers and never written to shared memory, and the rows
    of x are its 8 or 16 columns;
  * two codes are unpacked at once. Words of inputs r and r + 1 are joined by halves, then a shift
    and a mask give both codes as the lowest bits of 16-bit floats; with the exponent of 2^m or'd in
    that is the float 2^m + code, of which one packed fma leaves the code, exactly. Codes that fit
    side by side into a float's fraction share one shift, and the fma's factor moves them down;
  * scales and offsets are applied to sums of a group, not to weights:
    y = Σ_g s_g (Σ_i x_i c_i - o_g Σ_i x_i), both inner sums by the matrix units in float32.

The adapter y += (x a) b needs x a whole before b, and a grid has no place to wait. But a sum over
splits of the inputs needs a second launch anyway: so the first launch's foremost programs make x a
by splits, beside those that read the weight, and `sum_parts` multiplies it by b. An adapter then
costs its bytes, and no launch. Nothing is added atomically: the same call gives the same bits.

In float32, x comes as three bfloat16 pieces that sum to it to the last digit, each a row.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def write_unpacking(sub, bits, in_half, symmetric):
    """Writes the PTX that turns words of inputs r, r + 1 into two floats: code, or code - middle.

    Operands: $0 two packed floats; $1, $2 the words; for 3 bits, $3, $4 those of the upper plane.

    Args:
      sub: which code of the words, 0 .. 32/p - 1 for a plane of p bits.
      bits: 2, 3 or 4; 8 in float16 only, a bfloat16 has no room.
      in_half: float16, otherwise bfloat16.
      symmetric: 2^(bits-1) is taken off.
    """
    width = 2 if bits == 3 else bits
    fraction, bias = (10, 15) if in_half else (7, 127)
    place, half = sub * width % 16, sub * width // 16
    # As many codes as the fraction holds are reached by one shift; 3 bits are joined at its end.
    room = 1 if bits == 3 else fraction // width
    above = place // width % room * width
    magic = bias + fraction << fraction  # the float 2^fraction
    # code = float · 2^-above - rest
    factor = bias - above << fraction
    rest, log = 2 ** (fraction - above) + (2 ** (bits - 1) if symmetric else 0), 0
    while 2 << log <= rest:
        log += 1
    minus_rest = 0x8000 | bias + log << fraction | (rest << fraction >> log) - (1 << fraction)
    joined = "0x7632" if half else "0x5410"
    lines = [
        ".reg .b32 t, u, f, c;",
        f"prmt.b32 t, $1, $2, {joined};",
        f"shr.b32 t, t, {place - above};",
        f"and.b32 t, t, {(2**width - 1 << above) * 0x10001:#010x};",
        f"or.b32 t, t, {magic * 0x10001:#010x};",
    ]
    if bits == 3:
        moved = f"shr.b32 u, u, {place - 2};" if place >= 2 else "shl.b32 u, u, 2;"
        lines += [f"prmt.b32 u, $3, $4, {joined};", moved, "and.b32 u, u, 0x00040004;"]
        lines += ["or.b32 t, t, u;"]
    lines += [
        f"mov.b32 f, {factor * 0x10001:#010x};",
        f"mov.b32 c, {minus_rest * 0x10001:#010x};",
        f"fma.rn.{'f16x2' if in_half else 'bf16x2'} $0, t, f, c;",
    ]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _unpack(low, high, SUB: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
            FLOAT: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Returns sub-block SUB of the codes of words, less the middle where SYMMETRIC, as FLOAT."""
    HALF: tl.constexpr = FLOAT == tl.float16
    if PTX and (BITS < 8 or HALF):
        TEXT: tl.constexpr = write_unpacking(SUB, BITS, HALF, SYMMETRIC)
        OPERANDS: tl.constexpr = "=r,r,r,r,r" if BITS == 3 else "=r,r,r"
        words = [low, high] if BITS == 3 else [low]
        if HALF:
            codes = tl.inline_asm_elementwise(TEXT, OPERANDS, words, tl.float16, True, 2)
        else:
            codes = tl.inline_asm_elementwise(TEXT, OPERANDS, words, tl.bfloat16, True, 2)
    else:
        WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
        MIDDLE: tl.constexpr = 2 ** (BITS - 1) if SYMMETRIC else 0
        codes = (low >> (SUB * WIDTH)) & (2**WIDTH - 1)
        if BITS == 3:
            codes = codes | ((high >> (SUB * WIDTH)) & 1) << 2
        codes = (codes.to(tl.int32) - MIDDLE).to(tl.float32).to(FLOAT)
    return codes


@triton.jit
def _find_layer(array, layer, SIZE: tl.constexpr, STACKED: tl.constexpr):
    """Returns where a layer's SIZE numbers begin: a stack is read where it lies, not copied."""
    if STACKED:
        array += tl.load(layer).to(tl.int64) * SIZE
    return array


@triton.jit
def _find_weight(low, high, scales, offsets, layer, D_IN: tl.constexpr, D_OUT: tl.constexpr,
                 BITS: tl.constexpr, GROUP: tl.constexpr, STACKED: tl.constexpr):  # fmt: skip
    """Returns the four arrays of a layer."""
    UNIT: tl.constexpr = 256
    # Words of a plane are UNIT · p / 32 a unit; groups, the last of which is whole, D_IN / GROUP.
    PLANE: tl.constexpr = (D_IN + UNIT - 1) // UNIT * (UNIT // 32) * D_OUT
    GROUPS: tl.constexpr = D_IN // GROUP * D_OUT
    low = _find_layer(low, layer, PLANE * (2 if BITS == 3 else BITS), STACKED)
    high = _find_layer(high, layer, PLANE * (1 if BITS == 3 else BITS), STACKED)
    scales = _find_layer(scales, layer, GROUPS, STACKED)
    offsets = _find_layer(offsets, layer, GROUPS, STACKED)
    return low, high, scales, offsets


@triton.jit
def _load_words(low, high, unit, first, n, fits, D_OUT: tl.constexpr, BITS: tl.constexpr,
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
        upper = tl.load(start + (r % HALF)[None, :] * D_OUT + n[:, None], mask=fits)
        upper = upper >> (r // HALF)[None, :].to(tl.uint32)
    return words, upper


@triton.jit
def _load_x(x, m, k, D_IN: tl.constexpr):
    """Loads [inputs, rows] of x [rows, D_IN], zeros past D_IN; rows m are within x."""
    UNIT: tl.constexpr = 256
    at = x + m[None, :] * D_IN + k[:, None]
    if D_IN % UNIT == 0:
        return tl.load(at)
    return tl.load(at, mask=(k < D_IN)[:, None], other=0.0)


@triton.jit
def _load_group(numbers, k, n, fits, D_IN: tl.constexpr, D_OUT: tl.constexpr, GROUP: tl.constexpr):
    """Loads scales or offsets of inputs k (one, or [inputs]) as float32 [columns, inputs]."""
    at = tl.minimum(k, D_IN - 1) // GROUP
    return tl.load(numbers + at * D_OUT + n[:, None], mask=fits).to(tl.float32)


@triton.jit
def _sum_group(low, high, x, m, k, FIRST: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr,
               D_IN: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
               PTX: tl.constexpr):  # fmt: skip
    """Returns Σ x c and Σ x over SUBS sub-blocks, float32 [columns, rows]; the latter only if used.

    k are the inputs of the first of them.
    """
    FLOAT: tl.constexpr = x.dtype.element_ty
    ones = tl.full(low.shape, 1.0, FLOAT)
    products = tl.zeros((low.shape[0], m.shape[0]), tl.float32)
    sums = tl.zeros((low.shape[0], m.shape[0]), tl.float32)
    for i in tl.static_range(SUBS):
        x_tile = _load_x(x, m, k + i * ROWS, D_IN)
        codes = _unpack(low, high, FIRST + i, BITS, SYMMETRIC, FLOAT, PTX)
        products = tl.dot(codes, x_tile, products)
        if not SYMMETRIC:
            sums = tl.dot(ones, x_tile, sums)
    return products, sums


@triton.jit
def _sum_spread(low, high, x, m, k, scales, offsets, n, fits, SUB: tl.constexpr,
                D_IN: tl.constexpr, D_OUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                SYMMETRIC: tl.constexpr):  # fmt: skip
    """Returns Σ x w over one sub-block whose inputs lie in groups of any size.

    Each weight finds its own scale. It is multiplied by as two floats, since one would round it.
    """
    FLOAT: tl.constexpr = x.dtype.element_ty
    w = _unpack(low, high, SUB, BITS, SYMMETRIC, tl.float32, False)
    if not SYMMETRIC:
        w -= _load_group(offsets, k[None, :], n, fits, D_IN, D_OUT, GROUP)
    w *= _load_group(scales, k[None, :], n, fits, D_IN, D_OUT, GROUP)
    x_tile = _load_x(x, m, k, D_IN)
    first = w.to(FLOAT)
    sums = tl.dot((w - first.to(tl.float32)).to(FLOAT), x_tile)
    return tl.dot(first, x_tile, sums)


@triton.jit
def _multiply_unit(sums, unit, x, low, high, scales, offsets, m, n, fits, D_IN: tl.constexpr,
                   D_OUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                   SYMMETRIC: tl.constexpr, SIZE: tl.constexpr, SUBS: tl.constexpr,
                   SPREAD: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Adds a unit's share of x w to sums [columns, rows]."""
    UNIT: tl.constexpr = 256
    ROWS: tl.constexpr = UNIT * (2 if BITS == 3 else BITS) // 32
    r = tl.arange(0, SIZE)
    for part in tl.static_range(ROWS // SIZE):
        words, upper = _load_words(low, high, unit, part * SIZE, n, fits, D_OUT, BITS, SIZE)
        for chunk in tl.static_range(UNIT // (ROWS * SUBS)):
            start = unit * UNIT + chunk * SUBS * ROWS + part * SIZE
            if SPREAD:
                sums += _sum_spread(words, upper, x, m, start + r, scales, offsets, n, fits, chunk,
                                    D_IN, D_OUT, BITS, GROUP, SYMMETRIC)  # fmt: skip
            else:
                share, of_x = _sum_group(words, upper, x, m, start + r, chunk * SUBS, SUBS, ROWS,
                                         D_IN, BITS, SYMMETRIC, PTX)  # fmt: skip
                if not SYMMETRIC:
                    share -= of_x * _load_group(offsets, start, n, fits, D_IN, D_OUT, GROUP)
                sums += share * _load_group(scales, start, n, fits, D_IN, D_OUT, GROUP)
    return sums


@triton.jit
def _project(x, a, down, split, block, ROWS_X: tl.constexpr, D_IN: tl.constexpr,
             RANK: tl.constexpr, UNITS: tl.constexpr, BLOCK_R: tl.constexpr,
             BLOCK_M: tl.constexpr):  # fmt: skip
    """Makes x a over a split's inputs, for BLOCK_R columns of a: down float32 [splits, rows, r]."""
    UNIT: tl.constexpr = 256
    STEP: tl.constexpr = 64
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(m, ROWS_X - 1)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    last = tl.minimum((split + 1) * (UNITS * UNIT), D_IN)
    for start in tl.range(split * (UNITS * UNIT), last, STEP):
        k = start + tl.arange(0, STEP)
        fits = (k < D_IN)[None, :] & (r < RANK)[:, None]
        a_tile = tl.load(a + k[None, :].to(tl.int64) * RANK + r[:, None], mask=fits, other=0.0)
        sums = tl.dot(a_tile.to(x.dtype.element_ty), _load_x(x, row, k, D_IN), sums)
    at = down + (split * ROWS_X + m[None, :]) * RANK + r[:, None]
    tl.store(at, sums, mask=(m < ROWS_X)[None, :] & (r < RANK)[:, None])


@triton.jit
def multiply_rows(x, low, high, scales, offsets, a, layer, y, down, ROWS_X: tl.constexpr,
                  D_IN: tl.constexpr, D_OUT: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr,
                  GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STACKED: tl.constexpr,
                  SIZE: tl.constexpr, SUBS: tl.constexpr, SPREAD: tl.constexpr, UNITS: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
                  STAGES: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Makes x w by splits of the inputs, and x a beside it.

    Grid: (⌈RANK / BLOCK_R⌉ + ⌈D_OUT / BLOCK_N⌉, splits of UNITS units).

    Args:
      x: float16 or bfloat16 [ROWS_X, D_IN]; BLOCK_M >= ROWS_X, a power of two >= 8.
      low, high: words of the planes; without a second plane `high` is not read.
      scales, offsets: [groups, D_OUT]; SYMMETRIC reads no offsets.
      a: [D_IN, RANK], any float, taken in x's dtype; not read where RANK is 0.
      layer: where STACKED, an int32: which layer of the weight and of a, which are stacks then.
      y: [splits, ROWS_X, D_OUT], any float.
      down: float32 [splits, ROWS_X, RANK], not written where RANK is 0.
      SIZE, SUBS, SPREAD: how groups lie in a unit: SIZE words at once, SUBS of their sub-blocks
        share a scale; SPREAD, groups of any size.
      PTX: unpack by PTX; otherwise in Triton's own words, which its interpreter understands.
    """
    UNIT: tl.constexpr = 256
    FOREMOST: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    block, split = tl.program_id(0), tl.program_id(1)
    low, high, scales, offsets = _find_weight(low, high, scales, offsets, layer, D_IN, D_OUT, BITS,
                                              GROUP, STACKED)  # fmt: skip
    if block < FOREMOST:
        factor = _find_layer(a, layer, D_IN * RANK, STACKED)
        _project(x, factor, down, split, block, ROWS_X, D_IN, RANK, UNITS, BLOCK_R, BLOCK_M)
    else:
        m = tl.arange(0, BLOCK_M)
        row = tl.minimum(m, ROWS_X - 1)
        n = (block - FOREMOST) * BLOCK_N + tl.arange(0, BLOCK_N)
        fits = (n < D_OUT)[:, None] if D_OUT % BLOCK_N else None
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        last = tl.minimum((split + 1) * UNITS, (D_IN + UNIT - 1) // UNIT)
        for unit in tl.range(split * UNITS, last, num_stages=STAGES):
            sums = _multiply_unit(sums, unit, x, low, high, scales, offsets, row, n, fits, D_IN,
                                  D_OUT, BITS, GROUP, SYMMETRIC, SIZE, SUBS, SPREAD,
                                  PTX)  # fmt: skip
        at = y + (split * ROWS_X + m[None, :]).to(tl.int64) * D_OUT + n[:, None]
        written = (m < ROWS_X)[None, :] & (n < D_OUT)[:, None]
        tl.store(at, sums.to(y.dtype.element_ty), mask=written)


@triton.jit
def _add_low_rank(sums, down, b, first, n, FLOAT: tl.constexpr, ROWS_X: tl.constexpr,
                  D_OUT: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr,
                  BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Adds (Σ down) b, both as FLOAT, to sums [columns, rows], for BLOCK_M rows from first."""
    m = first + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, ROWS_X - 1)
    for start in tl.range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        of_rank = (r < RANK)[:, None]
        whole = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for split in tl.range(0, SPLITS):
            at = down + (split * ROWS_X + row[None, :]) * RANK + r[:, None]
            whole += tl.load(at, mask=of_rank, other=0.0).to(tl.float32)
        fits = (r < RANK)[None, :] & (n < D_OUT)[:, None]
        b_tile = tl.load(b + r[None, :] * D_OUT + n[:, None], mask=fits, other=0.0)
        sums = tl.dot(b_tile.to(FLOAT), whole.to(FLOAT), sums)
    return sums


@triton.jit
def sum_parts(parts, down, b, layer, y, ROWS_X: tl.constexpr, D_OUT: tl.constexpr,
              RANK: tl.constexpr, SPLITS: tl.constexpr, STACKED: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Makes y = Σ parts + (Σ down) b. Grid: (⌈D_OUT / BLOCK_N⌉,).

    Args:
      parts: float32 [SPLITS, ROWS_X, D_OUT].
      down: float32 [SPLITS, ROWS_X, RANK].
      b: [RANK, D_OUT], any float, taken in y's dtype.
      layer: where STACKED, an int32: which layer of b, a stack then.
      y: float16 or bfloat16 [ROWS_X, D_OUT].
    """
    b = _find_layer(b, layer, RANK * D_OUT, STACKED)
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(m, ROWS_X - 1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    fits = (n < D_OUT)[:, None]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for split in tl.range(0, SPLITS):
        at = parts + (split * ROWS_X + row[None, :]).to(tl.int64) * D_OUT + n[:, None]
        sums += tl.load(at, mask=fits, other=0.0)
    sums = _add_low_rank(sums, down, b, 0, n, y.dtype.element_ty, ROWS_X, D_OUT, RANK, SPLITS,
                         BLOCK_R, BLOCK_M)  # fmt: skip
    at = y + m[None, :] * D_OUT + n[:, None]
    tl.store(at, sums.to(y.dtype.element_ty), mask=(m < ROWS_X)[None, :] & fits)


@triton.jit
def _dequantize(low, high, start, r, scales, offsets, n, fits, SUB: tl.constexpr,
                D_IN: tl.constexpr, D_OUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                SYMMETRIC: tl.constexpr, SPREAD: tl.constexpr, FLOAT: tl.constexpr,
                PTX: tl.constexpr):  # fmt: skip
    """Returns the weights of inputs start + r, rounded once: FLOAT [columns, inputs]."""
    w = _unpack(low, high, SUB, BITS, SYMMETRIC, FLOAT, PTX).to(tl.float32)
    at = (start + r)[None, :] if SPREAD else start
    if not SYMMETRIC:
        w -= _load_group(offsets, at, n, fits, D_IN, D_OUT, GROUP)
    return (w * _load_group(scales, at, n, fits, D_IN, D_OUT, GROUP)).to(FLOAT)


@triton.jit
def multiply_tiles(x, low, high, scales, offsets, down, b, layer, y, ROWS_X: tl.constexpr,
                   D_IN: tl.constexpr, D_OUT: tl.constexpr, RANK: tl.constexpr, BITS: tl.constexpr,
                   GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, STACKED: tl.constexpr,
                   SIZE: tl.constexpr, SPREAD: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
                   PTX: tl.constexpr):  # fmt: skip
    """Makes y = x w + down b, a tile of rows and columns a program.

    Grid: (⌈D_OUT / BLOCK_N⌉, ⌈ROWS_X / BLOCK_M⌉). Arguments as in `multiply_rows`, but

    Args:
      down: x a, float32 [ROWS_X, RANK], not read where RANK is 0.
      y: [ROWS_X, D_OUT] of x's dtype.
    """
    UNIT: tl.constexpr = 256
    FLOAT: tl.constexpr = x.dtype.element_ty
    ROWS: tl.constexpr = UNIT * (2 if BITS == 3 else BITS) // 32
    low, high, scales, offsets = _find_weight(low, high, scales, offsets, layer, D_IN, D_OUT, BITS,
                                              GROUP, STACKED)  # fmt: skip
    first = tl.program_id(1) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    row = tl.minimum(m, ROWS_X - 1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    fits = (n < D_OUT)[:, None] if D_OUT % BLOCK_N else None
    r = tl.arange(0, SIZE)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for unit in tl.range(0, (D_IN + UNIT - 1) // UNIT, num_stages=STAGES):
        for part in tl.static_range(ROWS // SIZE):
            words, upper = _load_words(low, high, unit, part * SIZE, n, fits, D_OUT, BITS, SIZE)
            for sub in tl.static_range(UNIT // ROWS):
                start = unit * UNIT + sub * ROWS + part * SIZE
                w = _dequantize(words, upper, start, r, scales, offsets, n, fits, sub, D_IN, D_OUT,
                                BITS, GROUP, SYMMETRIC, SPREAD, FLOAT, PTX)  # fmt: skip
                sums = tl.dot(w, _load_x(x, row, start + r, D_IN), sums)
    if RANK > 0:
        b = _find_layer(b, layer, RANK * D_OUT, STACKED)
        sums = _add_low_rank(sums, down, b, first, n, FLOAT, ROWS_X, D_OUT, RANK, 1, BLOCK_R,
                             BLOCK_M)  # fmt: skip
    at = y + m[None, :].to(tl.int64) * D_OUT + n[:, None]
    written = (m < ROWS_X)[None, :] & (n < D_OUT)[:, None]
    tl.store(at, sums.to(y.dtype.element_ty), mask=written)
