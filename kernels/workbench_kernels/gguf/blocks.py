"""x @ W^T for W in GGUF blocks: the kernels that all block types share, and what a type must say of itself.

A row of W [out, in] is a run of blocks; a block is a few scales and the codes of 32 or 256 weights, and a weight is
`scale x code + shift` with scale and shift from its block. A type's file gives four small Triton functions in these
words (`Unpacking`), and here they are compiled into the kernels:

- a **segment** is a run of J 32-bit words of codes whose scales are found together. `LOAD` reads the words [n, S, J] of
  some rows and segments, and their packed scales [n, S].
- a segment holds GROUPS x QUADS x 4 J weights: `CODES` cuts four codes, a byte each, out of every word in the
  registers, so every byte is loaded once. Word j's four stand side by side in W, at column `COLUMNS` + 4 j.
- weights of one **group** g share `SCALES` = (scale, shift), each [n, S]; a weight is scale x (code - LESS) + shift.

Four neighbours of x are eight bytes in fp16: x is read, and what is de-quantized is written, in 64-bit words that lie
as the words of codes do (two words of two where numbers have 32 bits), and split in the registers.

`decode` (one row of x) is bound by reading W. Its sum over a segment's codes is multiplied by the scale once, since
sum (scale c + shift) x = scale sum c x + shift sum x: three instructions a weight, not four. `prefill` makes fp16
tiles of W in registers, one of the four codes at a time, and multiplies them on the matrix units. Both accumulate in
float32, and cut K into parts where there are too few rows of W to fill the GPU (`store_joined`). `dense` de-quantizes
a piece of W at a time for the vendor's matmul.

Rejected: repacking at load into one layout for all types. Its loads would be wider for the 2-byte-aligned types,
but memory would hold something that is in no file, and every type would need a packer besides an unpacker.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from workbench_kernels.backend import (
    DENSE_BYTES,
    Config,
    Kernel,
    bits_of,
    code_as_float,
    jit,
    packing_of,
    share,
    store_joined,
    tl,
    triton,
    value_of,
)
from workbench_kernels.checks import check_packed
from workbench_kernels.products import Launch, dequantized_by_kernel, multiply, plan

REFERENCE_WEIGHTS = 2**23
"""Weights that the reference de-quantizes at a time (32 MiB in float32)."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a block and of the parts that it is cut into; weights = segments x words x groups x quads x 4."""

    weights: int
    size_bytes: int
    word: torch.dtype
    """int16 or int32: what a block's size allows to be aligned; two of 16 bits are put together to one of 32."""
    segments: int
    segment_words: int
    groups: int
    quads: int
    less: int = 0
    """What is taken from a code."""


@dataclass(frozen=True)
class Unpacking:
    """The four Triton functions of a block type; the docstring of this file says what each gives."""

    load: Kernel
    scales: Kernel
    codes: Kernel
    columns: Kernel


@dataclass(frozen=True)
class BlockType:
    """One of llama.cpp's block types; the docstring of its file says which byte is what."""

    name: str
    layout: Layout
    unpacking: Unpacking
    shifted: bool
    """Whether a weight is more than a scale times its code."""
    reference: Callable[[torch.Tensor], torch.Tensor]
    """uint8 [blocks, bytes] -> float32 [blocks, weights], in plain torch."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights; `ValueError` if they do not fill whole blocks."""
        if columns % self.layout.weights:
            raise ValueError(f"{columns} columns; supported by {self.name}: multiples of {self.layout.weights}")
        return columns // self.layout.weights * self.layout.size_bytes


# --- what the types' references share -----------------------------------------------------------


def halves(data: torch.Tensor) -> torch.Tensor:
    """The float16 numbers that bytes [n, 2 m] are: float32 [n, m]."""
    return data.contiguous().view(torch.float16).float()


def cut(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes [..., m] cut into codes of so many bits: uint8 [..., 8 / bits, m], the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    codes: torch.Tensor = (data[..., None, :] >> shifts[:, None]) & (2**bits - 1)
    return codes


# --- Triton -------------------------------------------------------------------------------------


@jit
def _decode(
    x,
    w,
    out,
    planes,
    arrived,
    N: tl.constexpr,
    KIND: tl.constexpr,
    ROW_WORDS: tl.constexpr,
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
        parts = LOAD(w + rows.to(tl.int64) * ROW_WORDS, s[None, :], j[None, None, :], inside)
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
    store_joined(y, out, planes, arrived + tl.program_id(0), n, n < N, N, part, SPLIT)


@jit
def _prefill(
    x,
    w,
    out,
    planes,
    arrived,
    M,
    BUCKET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    ROW_WORDS: tl.constexpr,
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
        parts = LOAD(w + rows.to(tl.int64) * ROW_WORDS, s[None, :], j[None, None, :], inside)
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
    store_joined(acc, out, planes, counter, place, (m[:, None] < M) & (n[None, :] < N), M * N, part, SPLIT)


@jit
def _dequantize(
    w,
    out,
    N,
    K: tl.constexpr,
    KIND: tl.constexpr,
    ROW_WORDS: tl.constexpr,
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
    parts = LOAD(w + rows.to(tl.int64) * ROW_WORDS, s[None, :], j[None, None, :], inside)
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


@jit
def words_at(place, j, inside):
    """Words `j` from each of the places [n, S] on, int32 [n, S, J]."""
    return tl.load(place[:, :, None] + j, mask=inside[:, :, None], other=0).to(tl.int32)


@jit
def pairs_at(place, j, inside):
    """32-bit words `j` from each of the places of 16-bit words [n, S] on, int32 [n, S, J]."""
    return (words_at(place, 2 * j, inside) & 0xFFFF) | (words_at(place, 2 * j + 1, inside) << 16)


@jit
def word_at(place, inside):
    """The word at each of the places [n, S], int32."""
    return tl.load(place, mask=inside, other=0).to(tl.int32)


@jit
def half_of(bits):
    """The low 16 bits of an integer as a float16's value."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def byte_of(word, index):
    """Byte `index` (0: lowest) of an int32."""
    return (word >> (8 * index)) & 255


DECODE: list[Config] = [
    {"BN": rows, "S": segments, "num_warps": warps, "num_stages": 2}
    for rows, segments, warps in ((8, 8, 4), (16, 8, 4), (32, 8, 4), (16, 4, 4), (16, 8, 8), (8, 16, 8), (8, 16, 4))
] + [{"BN": 4, "S": 32, "num_warps": 4, "num_stages": 3}]
"""The first is what is taken untuned: there, a thread has one word of codes at a time, and x needs no detour through
shared memory."""

PREFILL: list[Config] = [
    {"BM": 16, "BN": 64, "S": 8, "num_warps": 4, "num_stages": 3},
    {"BM": 16, "BN": 32, "S": 8, "num_warps": 4, "num_stages": 3},
    {"BM": 32, "BN": 64, "S": 4, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BN": 64, "S": 4, "num_warps": 4, "num_stages": 3},
    {"BM": 64, "BN": 128, "S": 4, "num_warps": 8, "num_stages": 3},
]
TILE: Config = {"BN": 8, "S": 16}
"""Tile of de-quantizing, which is bound by writing; not tuned."""


def constants_of(kind: BlockType, columns: int) -> dict[str, object]:
    """What the kernels have to know of a type and of the length of a row. (`KIND` is for the tuner, which has to tell
    types apart.)"""
    layout, unpacking = kind.layout, kind.unpacking
    return {
        "KIND": kind.name,
        "ROW_WORDS": kind.row_bytes(columns) // layout.word.itemsize,
        "SEGMENTS": _segments(kind, columns),
        "J": layout.segment_words,
        "GROUPS": layout.groups,
        "QUADS": layout.quads,
        "LESS": layout.less,
        "SHIFTED": kind.shifted,
        "LOAD": unpacking.load,
        "SCALES": unpacking.scales,
        "CODES": unpacking.codes,
        "COLUMNS": unpacking.columns,
    }


def _segments(kind: BlockType, columns: int) -> int:
    return columns // kind.layout.weights * kind.layout.segments


# --- public -------------------------------------------------------------------------------------


def check_blocks(kind: BlockType, blocks: torch.Tensor, name: str | None = None) -> int:
    """Columns of a weight [out, row bytes]; `ValueError` that names it unless it is whole blocks of this type."""
    name = name or f"{kind.name} blocks"
    size_bytes, weights = kind.layout.size_bytes, kind.layout.weights
    check_packed(blocks, torch.uint8, (None, None), name)
    if blocks.shape[1] == 0 or blocks.shape[1] % size_bytes:
        raise ValueError(
            f"{name} has rows of {blocks.shape[1]} bytes; supported for {kind.name}: multiples of {size_bytes} "
            f"({weights} weights each)"
        )
    return blocks.shape[1] // size_bytes * weights


def dequantize(
    kind: BlockType, blocks: torch.Tensor, dtype: torch.dtype = torch.float32, *, path: str = "auto"
) -> torch.Tensor:
    """uint8 [out, row bytes] -> `dtype` [out, in]. `path`: `auto`, `reference` or `kernel`."""
    columns = check_blocks(kind, blocks)
    rows = blocks.shape[0]
    if not dequantized_by_kernel({f"{kind.name} blocks": blocks}, dtype, path):
        return kind.reference(blocks.reshape(-1, kind.layout.size_bytes)).view(rows, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=blocks.device)
    if rows:
        dequantize_launch(kind, blocks, out).run()
    return out


def matmul(kind: BlockType, x: torch.Tensor, blocks: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] times the transpose of blocks [out, in as bytes] -> [..., out], of x's type; see `multiply`."""
    return multiply(
        x,
        check_blocks(kind, blocks),
        blocks.shape[0],
        {f"{kind.name} blocks": blocks},
        path,
        reference=lambda flat: _reference(kind, flat, blocks),
        dense=lambda flat: _dense(kind, flat, blocks),
        kernel=lambda way, flat: launch(kind, way, flat, blocks),
    )


def launch(kind: BlockType, way: str, x: torch.Tensor, blocks: torch.Tensor) -> Launch:
    """The launch of x [rows, in] times the weight, by `decode` (one row) or `prefill`."""
    columns, outputs = x.shape[1], blocks.shape[0]
    segments, weight = _segments(kind, columns), {"w": blocks.view(kind.layout.word)}
    constants = constants_of(kind, columns) | {"N": outputs, **packing_of(x)}
    if way == "prefill":
        constants["K"] = columns
    function, configs = (_decode, DECODE) if way == "decode" else (_prefill, PREFILL)
    made = plan(
        function,
        x,
        weight,
        outputs,
        configs,
        ("BN", outputs),
        lambda config: triton.cdiv(segments, config["S"]),
        constants,
    )
    return replace(made, arguments={**made.arguments, "x": x.view(torch.int64)})


def dequantize_launch(kind: BlockType, blocks: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes the weight into `out` [out, in]."""
    rows, columns = out.shape
    arguments = {"w": blocks.view(kind.layout.word), "out": out.view(torch.int64), "N": rows, "K": columns}
    arguments |= constants_of(kind, columns) | packing_of(out)
    segments = _segments(kind, columns)
    return Launch(
        _dequantize,
        arguments,
        [TILE],
        (),
        lambda meta: (triton.cdiv(rows, meta["BN"]), triton.cdiv(segments, meta["S"])),
    )


def _reference(kind: BlockType, x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """By definition: de-quantized rows times x in float32, some rows at a time."""
    y = x.new_empty(x.shape[0], blocks.shape[0])
    wide, step = x.float(), max(1, REFERENCE_WEIGHTS // x.shape[1])
    for start in range(0, blocks.shape[0], step):
        weights = dequantize(kind, blocks[start : start + step], path="reference")
        y[:, start : start + step] = wide @ weights.t()
    return y


def _dense(kind: BlockType, x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], blocks.shape[0])
    # Multiples of 16 rows, so that every piece begins where wide loads may.
    step = max(16, DENSE_BYTES // (x.shape[1] * x.element_size()) // 16 * 16)
    for start in range(0, blocks.shape[0], step):
        weights = dequantize(kind, blocks[start : start + step], x.dtype, path="kernel")
        torch.mm(x, weights.t(), out=y[:, start : start + step])
    return y
