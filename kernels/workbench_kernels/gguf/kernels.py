"""The Triton kernels that all block types share.

Four neighbours of x are eight bytes in fp16: x is read, and what is de-quantized is written, in 64-bit words that lie
as the words of codes do (two words of two where numbers have 32 bits), and split in the registers.

`decode` (one row of x) is bound by reading W. Its sum over a segment's codes is multiplied by the scale once, since
sum (scale c + shift) x = scale sum c x + shift sum x: three instructions a weight, not four. `prefill` makes fp16
tiles of W in registers, one of the four codes at a time, and multiplies them on the matrix units. Both accumulate in
float32, and cut K into parts where there are too few rows of W to fill the GPU (`store_joined`). `dequantize` writes
N rows of W, from row FIRST of ALL on.
"""

from workbench_kernels.backend import Config, bits_of, code_as_float, jit, share, store_joined, tl, value_of


@jit
def decode(
    x,
    w,
    out,
    sums,
    arrived,
    N: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    J: tl.constexpr,
    GROUPS: tl.constexpr,
    QUADS: tl.constexpr,
    LESS: tl.constexpr,
    SHIFTED: tl.constexpr,
    LOAD: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    j = tl.arange(0, J)
    acc = tl.zeros((BN, S, J), tl.float32)
    first, end = share(part, (SEGMENTS + S - 1) // S, SPLIT)
    for step in range(first, end):
        s = step * S + tl.arange(0, S)
        rows, inside = n[:, None], (n[:, None] < N) & (s[None, :] < SEGMENTS)
        parts = LOAD(w, N * BLOCKS, rows.to(tl.int64) * BLOCKS, s[None, :], j[None, None, :], inside)
        for g in tl.static_range(GROUPS):
            products = tl.zeros((BN, S, J), tl.float32)
            total = tl.zeros((S, J), tl.float32)
            for q in tl.static_range(QUADS):
                codes = CODES(parts, s[None, :, None], g, q)
                k = COLUMNS(s[:, None], g, q) // TOGETHER + j[None, :] * (4 // TOGETHER)
                for i in tl.static_range(4):
                    if i % TOGETHER == 0:
                        words = tl.load(x + k + i // TOGETHER, mask=s[:, None] < SEGMENTS, other=0)
                    values = value_of(words, i % TOGETHER, TYPE).to(tl.float32)
                    products += code_as_float(codes, 8 * i, 8, LESS) * values[None, :, :]
                    total += values
            scale, shift = SCALES(parts, s[None, :], g)
            acc += scale[:, :, None] * products
            if SHIFTED:
                acc += shift[:, :, None] * total[None, :, :]
    y = tl.sum(tl.sum(acc, 2), 1)
    store_joined(y, out, sums, arrived + tl.program_id(0), n, n < N, N, part, SPLIT)


@jit
def prefill(
    x,
    w,
    out,
    sums,
    arrived,
    M,
    BUCKET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    J: tl.constexpr,
    GROUPS: tl.constexpr,
    QUADS: tl.constexpr,
    LESS: tl.constexpr,
    SHIFTED: tl.constexpr,
    LOAD: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
    SPLIT: tl.constexpr,
):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    j = tl.arange(0, J)
    flat = tl.arange(0, S * J)
    acc = tl.zeros((BM, BN), tl.float32)
    first, end = share(part, (SEGMENTS + S - 1) // S, SPLIT)
    for step in range(first, end):
        s = step * S + tl.arange(0, S)
        rows, inside = n[:, None], (n[:, None] < N) & (s[None, :] < SEGMENTS)
        parts = LOAD(w, N * BLOCKS, rows.to(tl.int64) * BLOCKS, s[None, :], j[None, None, :], inside)
        for g in tl.static_range(GROUPS):
            scale, shift = SCALES(parts, s[None, :], g)
            for q in tl.static_range(QUADS):
                codes = CODES(parts, s[None, :, None], g, q)
                k = COLUMNS(step * S + flat // J, g, q) // TOGETHER + flat % J * (4 // TOGETHER)
                known = (m[:, None] < M) & (k[None, :] < K // TOGETHER)
                place = x + m[:, None].to(tl.int64) * (K // TOGETHER) + k[None, :]
                for i in tl.static_range(4):
                    if i % TOGETHER == 0:
                        words = tl.load(place + i // TOGETHER, mask=known, other=0)
                    values = value_of(words, i % TOGETHER, TYPE)
                    tile = scale[:, :, None] * code_as_float(codes, 8 * i, 8, LESS) + shift[:, :, None]
                    weights = tl.trans(tl.reshape(tile, (BN, S * J)).to(TYPE))
                    acc = tl.dot(values, weights, acc, input_precision="ieee")
    place = m[:, None].to(tl.int64) * N + n[None, :]
    counter = arrived + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    store_joined(acc, out, sums, counter, place, (m[:, None] < M) & (n[None, :] < N), M * N, part, SPLIT)


@jit
def dequantize(
    w,
    out,
    ALL,
    FIRST,
    N,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    J: tl.constexpr,
    GROUPS: tl.constexpr,
    QUADS: tl.constexpr,
    LESS: tl.constexpr,
    SHIFTED: tl.constexpr,
    LOAD: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    s = tl.program_id(1) * S + tl.arange(0, S)
    j = tl.arange(0, J)
    rows, inside = n[:, None], (n[:, None] < N) & (s[None, :] < SEGMENTS)
    count, block = ALL * tl.full((), BLOCKS, tl.int64), (FIRST + rows).to(tl.int64) * BLOCKS
    parts = LOAD(w, count, block, s[None, :], j[None, None, :], inside)
    for g in tl.static_range(GROUPS):
        scale, shift = SCALES(parts, s[None, :], g)
        for q in tl.static_range(QUADS):
            codes = CODES(parts, s[None, :, None], g, q)
            k = COLUMNS(s[None, :, None], g, q) // TOGETHER + j[None, None, :] * (4 // TOGETHER)
            place = out + n[:, None, None].to(tl.int64) * (K // TOGETHER) + k
            for first in tl.static_range(0, 4, TOGETHER):
                words = tl.zeros((BN, S, J), tl.int64)
                for i in tl.static_range(TOGETHER):
                    weights = scale[:, :, None] * code_as_float(codes, 8 * (first + i), 8, LESS) + shift[:, :, None]
                    words |= bits_of(weights, i, TYPE)
                tl.store(place + first // TOGETHER, words, mask=inside[:, :, None])


DECODE: list[Config] = [
    {"BN": rows, "S": words, "num_warps": warps, "num_stages": 2}
    for rows, words, warps in ((8, 64, 4), (16, 64, 4), (32, 64, 4), (16, 32, 4), (16, 64, 8), (8, 128, 4))
] + [{"BN": 4, "S": 256, "num_warps": 4, "num_stages": 3}]
"""S is of words of codes here, J times what the kernel takes. The first is what is taken untuned: there, a thread has
four words at a time, one load of 16 bytes, and x needs no detour through shared memory."""

PREFILL: list[Config] = [
    {"BM": 16, "BN": 64, "S": 32, "num_warps": 8, "num_stages": 3},
    {"BM": 16, "BN": 32, "S": 32, "num_warps": 4, "num_stages": 3},
    {"BM": 32, "BN": 64, "S": 16, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BN": 64, "S": 16, "num_warps": 4, "num_stages": 3},
    {"BM": 64, "BN": 128, "S": 16, "num_warps": 8, "num_stages": 3},
]
"""S as above. Twice as many words, and types with many numbers in a block would spill on sm_80."""
TILE: Config = {"BN": 8, "S": 16}
"""Tile of de-quantizing, which is bound by writing; not tuned."""
