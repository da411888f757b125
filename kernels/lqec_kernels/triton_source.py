"""Products with `Planes` on NVIDIA GPUs: the Triton kernels. Imports triton only, never jax.

    multiply_rows    few rows of x: as fast as the words can be read
    sum_parts        the sum of what splits of the inputs gave, and the adapter's second half
    multiply_tiles   more rows: the weight's tile is dequantized once and meets all of them

How few rows are kept at the speed of memory. At 2 bits an H200 reads some 15 weights a nanosecond
and multiprocessor cycle over; only two or three instructions a weight are free (counted in
kernels/bench/instructions). So

  * sums are made by the matrix units, which also take up to 16 rows for the price of one. The
    weight is the left operand, read into registers and never written to shared memory, and the rows
    of x are its 8 or 16 columns;
  * two codes are unpacked by half a shift and one `lop3` (see triton_codes), as floats too large by
    a power of two. What that adds to sums is made from x alone, for 16 columns that serve all:
    y = Σ_g s_g (Σ_i x_i (2^k + c_i) - Σ_i x_i 2^k - o_g Σ_i x_i), inner sums by the matrix units;
  * scales and offsets are applied to sums of a group, not to weights. Rows that are fewer than 8
    columns stand there for several groups at once, each in its own columns and zero elsewhere: so
    one sum serves two or four groups;
  * everything a turn of the loop reads is an operand of a dot, scales too, because that is what
    Triton's pipeline loads ahead of time: a scale is spread over columns by a dot with ones.

The adapter y += (x a) b needs x a whole before b, and a grid has no place to wait. But a sum over
splits of the inputs needs a second launch anyway: so the first launch's foremost programs make x a
by splits, beside those that read the weight, and `sum_parts` multiplies it by b. An adapter then
costs its bytes, and no launch. Nothing is added atomically: the same call gives the same bits.

In float32, x comes as three bfloat16 pieces that sum to it to the last digit, each a row.
"""

import triton
import triton.language as tl

from lqec_kernels.triton_codes import (
    can_unpack,
    find_layer,
    find_rest,
    find_weight,
    load_group,
    load_words,
    load_x,
    unpack,
)


@triton.constexpr_function
def pad_rows(rows, columns, groups, hot):
    """Returns how many columns of x's tile rows take: of 8, so few that other groups have room."""
    pad = columns
    while hot and columns == 8 and pad // 2 >= rows and 8 // pad < groups:
        pad //= 2
    return pad


@triton.jit
def _load_blocks(x, unit, ROWS_X: tl.constexpr, D_IN: tl.constexpr, BLOCK_M: tl.constexpr,
                 PAD: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """Loads a unit of x as 16 blocks of 16 inputs, [inputs, BLOCK_M] each.

    Rows are PAD columns. Each of the BLOCK_M / PAD times that they stand there is for one of as
    many groups of BLOCKS, and is zero in the blocks of others.
    """
    UNIT: tl.constexpr = 256
    SLOTS: tl.constexpr = BLOCK_M // PAD
    blocks = ()
    if BLOCK_M > 16:
        row = tl.minimum(tl.arange(0, BLOCK_M), ROWS_X - 1)
        for t in tl.static_range(16):
            blocks += (load_x(x, row, unit * UNIT + t * 16 + tl.arange(0, 16), D_IN),)
        return blocks
    # All blocks are one load. Eight inputs are 16 bytes; a block's two halves are parted first, and
    # joined last: so one instruction reads both from shared memory.
    j = tl.arange(0, 32 * BLOCK_M)
    eighth, c = j // BLOCK_M, j % BLOCK_M
    k = (unit * UNIT + eighth * 8)[None, :] + tl.arange(0, 8)[:, None]
    at = x + tl.minimum(c % PAD, ROWS_X - 1)[None, :] * D_IN + k
    own = (eighth // (2 * BLOCKS) % SLOTS == c // PAD)[None, :]
    if D_IN % UNIT:
        own = own & (k < D_IN)
    if SLOTS > 1 or D_IN % UNIT:
        x_tile = tl.load(at, mask=own, other=0.0, cache_modifier=".ca")
    else:
        x_tile = tl.load(at, cache_modifier=".ca")
    parts = (
        x_tile.reshape(8, 16, 2, BLOCK_M).permute(0, 3, 1, 2).reshape(8, BLOCK_M, 2, 2, 2, 2, 2),
    )
    for level in tl.static_range(5):
        evens = ()
        odds = ()
        for i in tl.static_range(2**level):
            even, odd = tl.split(parts[i])
            evens += (even,)
            odds += (odd,)
        parts = evens + odds
    for t in tl.static_range(16):
        block = tl.join(parts[2 * t], parts[2 * t + 1]).permute(2, 0, 1)  # [2, 8, BLOCK_M]
        blocks += (block.reshape(16, BLOCK_M),)
    return blocks


@triton.jit
def _load_groups(numbers, unit, n, fits, GROUPS: tl.constexpr, D_IN: tl.constexpr,
                 D_OUT: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Loads the scales or offsets of a unit's GROUPS as a dot's operand, [columns, 16]."""
    UNIT: tl.constexpr = 256
    k = tl.arange(0, 16)
    at = tl.minimum(unit * UNIT + k * (UNIT // GROUPS), D_IN - 1) // GROUP
    needed = (k < GROUPS)[None, :]
    if fits is not None:
        needed = needed & fits
    tile = tl.load(numbers + at[None, :] * D_OUT + n[:, None], mask=needed, other=0)
    if numbers.dtype.element_ty.is_int():
        tile = tile.to(tl.float16)
    return tile


@triton.jit
def _give_groups(tile, first, BLOCK_M: tl.constexpr, PAD: tl.constexpr):
    """Gives each of BLOCK_M columns its group's number from [columns, 16], as float32.

    A dot with ones and zeros does it exactly, and where sums lie. 16 columns are of one group.
    """
    k, c = tl.arange(0, 16), tl.arange(0, 8)
    hot = tl.where(k[:, None] == first + c[None, :] // PAD, 1.0, 0.0)
    given = tl.dot(tile, hot.to(tile.dtype))
    if BLOCK_M == 16:
        given = tl.join(given, given).permute(0, 2, 1).reshape(given.shape[0], 16)
    return given


@triton.jit
def _sum_groups(blocks, words, upper, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr,
                SYMMETRIC: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Returns Σ x c and Σ x over COUNT blocks, float32 [columns, BLOCK_M]; the latter if used."""
    FLOAT: tl.constexpr = blocks[0].dtype
    HALF: tl.constexpr = FLOAT == tl.float16
    PARTS: tl.constexpr = (2 if BITS == 3 else BITS) // 2
    BLOCK_N: tl.constexpr = words[0].shape[0]
    BLOCK_M: tl.constexpr = blocks[0].shape[1]
    ones = tl.full((BLOCK_N, 16), 1.0, FLOAT)
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for t in tl.static_range(FIRST, FIRST + COUNT):
        if find_rest(t // PARTS, BITS, HALF, SYMMETRIC, PTX):
            rest = tl.full((BLOCK_N, 16), -find_rest(t // PARTS, BITS, HALF, SYMMETRIC, PTX), FLOAT)
            products = tl.dot(rest, blocks[t], products)
        if not SYMMETRIC:
            sums = tl.dot(ones, blocks[t], sums)
    for t in tl.static_range(FIRST, FIRST + COUNT):
        codes = unpack(words[t % PARTS], upper[t % PARTS], t // PARTS, BITS, 0, FLOAT, PTX)
        products = tl.dot(codes, blocks[t], products)
    return products, sums


@triton.jit
def _sum_spread(low, high, x_tile, k, scales, offsets, n, fits, SUB: tl.constexpr,
                D_IN: tl.constexpr, D_OUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                SYMMETRIC: tl.constexpr):  # fmt: skip
    """Returns Σ x w over a block whose inputs lie in groups of any size.

    Each weight finds its own scale. It is multiplied by as two floats, since one would round it.
    """
    FLOAT: tl.constexpr = x_tile.dtype
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) if SYMMETRIC else 0
    w = unpack(low, high, SUB, BITS, MIDDLE, tl.float32, False)
    if not SYMMETRIC:
        w -= load_group(offsets, k[None, :], n, fits, D_IN, D_OUT, GROUP)
    w *= load_group(scales, k[None, :], n, fits, D_IN, D_OUT, GROUP)
    first = w.to(FLOAT)
    sums = tl.dot((w - first.to(tl.float32)).to(FLOAT), x_tile)
    return tl.dot(first, x_tile, sums)


@triton.jit
def _multiply_unit(sums, unit, x, low, high, scales, offsets, n, fits, ROWS_X: tl.constexpr,
                   D_IN: tl.constexpr, D_OUT: tl.constexpr, BITS: tl.constexpr,
                   GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, SPREAD: tl.constexpr,
                   GROUPS: tl.constexpr, PAD: tl.constexpr, HOT: tl.constexpr,
                   PTX: tl.constexpr):  # fmt: skip
    """Adds a unit's share of x w to sums [columns, BLOCK_M]."""
    UNIT: tl.constexpr = 256
    PARTS: tl.constexpr = (2 if BITS == 3 else BITS) // 2
    BLOCK_M: tl.constexpr = sums.shape[1]
    SLOTS: tl.constexpr = BLOCK_M // PAD
    BLOCKS: tl.constexpr = 16 // GROUPS
    blocks = _load_blocks(x, unit, ROWS_X, D_IN, BLOCK_M, PAD, BLOCKS)
    words = ()
    upper = ()
    for part in tl.static_range(PARTS):
        both = load_words(low, high, unit, part * 16, n, fits, D_OUT, BITS, 16)
        words += (both[0],)
        upper += (both[1],)
    if SPREAD:
        for t in tl.static_range(16):
            k = unit * UNIT + t * 16 + tl.arange(0, 16)
            sums += _sum_spread(words[t % PARTS], upper[t % PARTS], blocks[t], k, scales, offsets,
                                n, fits, t // PARTS, D_IN, D_OUT, BITS, GROUP,
                                SYMMETRIC)  # fmt: skip
        return sums
    if HOT:
        s_tile = _load_groups(scales, unit, n, fits, GROUPS, D_IN, D_OUT, GROUP)
        if not SYMMETRIC:
            o_tile = _load_groups(offsets, unit, n, fits, GROUPS, D_IN, D_OUT, GROUP)
    for group in tl.static_range(0, GROUPS, SLOTS):
        share, of_x = _sum_groups(blocks, words, upper, group * BLOCKS, SLOTS * BLOCKS, BITS,
                                  SYMMETRIC, PTX)  # fmt: skip
        start = unit * UNIT + group * (UNIT // GROUPS)
        if HOT:
            if not SYMMETRIC:
                share -= of_x * _give_groups(o_tile, group, BLOCK_M, PAD)
            sums += share * _give_groups(s_tile, group, BLOCK_M, PAD)
        else:
            if not SYMMETRIC:
                share -= of_x * load_group(offsets, start, n, fits, D_IN, D_OUT, GROUP)
            sums += share * load_group(scales, start, n, fits, D_IN, D_OUT, GROUP)
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
        sums = tl.dot(a_tile.to(x.dtype.element_ty), load_x(x, row, k, D_IN), sums)
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
    low, high, scales, offsets = find_weight(low, high, scales, offsets, layer, D_IN, D_OUT, BITS,
                                              GROUP, STACKED)  # fmt: skip
    if block < FOREMOST:
        factor = find_layer(a, layer, D_IN * RANK, STACKED)
        _project(x, factor, down, split, block, ROWS_X, D_IN, RANK, UNITS, BLOCK_R, BLOCK_M)
    else:
        n = (block - FOREMOST) * BLOCK_N + tl.arange(0, BLOCK_N)
        fits = (n < D_OUT)[:, None] if D_OUT % BLOCK_N else None
        BY_PTX: tl.constexpr = PTX and can_unpack(BITS, x.dtype.element_ty)
        GROUPS: tl.constexpr = 1 if SPREAD else 256 // (SIZE * SUBS)
        S_BITS: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth
        O_BITS: tl.constexpr = offsets.dtype.element_ty.primitive_bitwidth
        HOT: tl.constexpr = BLOCK_M <= 16 and S_BITS <= 16 and O_BITS <= 16
        PAD: tl.constexpr = pad_rows(ROWS_X, BLOCK_M, GROUPS, HOT)
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        last = tl.minimum((split + 1) * UNITS, (D_IN + UNIT - 1) // UNIT)
        # What groups of any size read does not fit into shared memory ahead of time.
        for unit in tl.range(split * UNITS, last, num_stages=1 if SPREAD else STAGES):
            sums = _multiply_unit(sums, unit, x, low, high, scales, offsets, n, fits, ROWS_X, D_IN,
                                  D_OUT, BITS, GROUP, SYMMETRIC, SPREAD, GROUPS, PAD, HOT,
                                  BY_PTX)  # fmt: skip
        if PAD < BLOCK_M:
            sums = tl.sum(sums.reshape(BLOCK_N, BLOCK_M // PAD, PAD), axis=1)
        m = tl.arange(0, PAD)
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
    b = find_layer(b, layer, RANK * D_OUT, STACKED)
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
    BY_PTX: tl.constexpr = PTX and can_unpack(BITS, FLOAT)
    REST: tl.constexpr = find_rest(SUB, BITS, FLOAT == tl.float16, SYMMETRIC, BY_PTX)
    w = unpack(low, high, SUB, BITS, REST, FLOAT, BY_PTX).to(tl.float32)
    at = (start + r)[None, :] if SPREAD else start
    if not SYMMETRIC:
        w -= load_group(offsets, at, n, fits, D_IN, D_OUT, GROUP)
    return (w * load_group(scales, at, n, fits, D_IN, D_OUT, GROUP)).to(FLOAT)


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
    low, high, scales, offsets = find_weight(low, high, scales, offsets, layer, D_IN, D_OUT, BITS,
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
            words, upper = load_words(low, high, unit, part * SIZE, n, fits, D_OUT, BITS, SIZE)
            for sub in tl.static_range(UNIT // ROWS):
                start = unit * UNIT + sub * ROWS + part * SIZE
                w = _dequantize(words, upper, start, r, scales, offsets, n, fits, sub, D_IN, D_OUT,
                                BITS, GROUP, SYMMETRIC, SPREAD, FLOAT, PTX)  # fmt: skip
                sums = tl.dot(w, load_x(x, row, start + r, D_IN), sums)
    if RANK > 0:
        b = find_layer(b, layer, RANK * D_OUT, STACKED)
        sums = _add_low_rank(sums, down, b, first, n, FLOAT, ROWS_X, D_OUT, RANK, 1, BLOCK_R,
                             BLOCK_M)  # fmt: skip
    at = y + m[None, :].to(tl.int64) * D_OUT + n[:, None]
    written = (m < ROWS_X)[None, :] & (n < D_OUT)[:, None]
    tl.store(at, sums.to(y.dtype.element_ty), mask=written)
