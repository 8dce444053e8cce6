"""x @ W^T for W in GGUF blocks: the kernels that all block types share, and what a type must say of itself.

A row of W [out, in] is a run of blocks; a block is a few scales and the codes of 32 or 256 weights, and a weight is
`scale x code + shift` with scale and shift from its block. A type's file gives four small Triton functions in these
words (`Unpacking`), and here they are compiled into the kernels:

- a **segment** is a run of J words (16 or 32 bits, as the block's size allows them to be aligned) whose scales are
  found together. `LOAD` reads the words [n, S, J] of some rows and segments, and their packed scales [n, S].
- word j of a segment holds one code each of GROUPS x PLANES weights: `CODES` cuts them out of the registers, so every
  byte is loaded once; `COLUMNS` says which columns of W they are.
- weights of one **group** g share `SCALES` = (scale, shift), each [n, S].

`decode` (one row of x) is bound by reading W. Its sum over a segment's codes is multiplied by the scale once, since
sum (scale c + shift) x = scale sum c x + shift sum x: three instructions a weight, not four. `prefill` makes fp16
tiles of W in registers, a plane at a time, and multiplies them on the matrix units; the columns of x are gathered in
the order of the codes, which costs less than putting codes in the order of x. Both accumulate in float32, and cut K
into parts where there are too few rows of W to fill the GPU; the parts are summed in a fixed order, not by atomics, so
a result does not change from run to run. `dense` de-quantizes a piece of W at a time for the vendor's matmul.

Rejected: repacking at load into one layout for all types. Its loads would be wider for the 2-byte-aligned types,
but memory would hold something that is in no file, and every type would need a packer besides an unpacker.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from workbench_kernels.backend import DENSE_BYTES, Config, Kernel, jit, share, splits, tl, triton
from workbench_kernels.checks import check_packed
from workbench_kernels.products import Launch, dequantized_by_kernel, multiply, plan

REFERENCE_WEIGHTS = 2**23
"""Weights that the reference de-quantizes at a time (32 MiB in float32)."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a block and of the parts that the kernels cut it into; weights = segments x words x groups x planes."""

    weights: int
    size_bytes: int
    word: torch.dtype
    """int16 or int32: what a block is read in."""
    segments: int
    segment_words: int
    groups: int
    planes: int


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
    N: tl.constexpr,
    KIND: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    J: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    LOAD: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
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
            for r in tl.static_range(PLANES):
                k = COLUMNS(s[:, None], j[None, :], g, r)
                values = tl.load(x + k, mask=s[:, None] < SEGMENTS, other=0.0).to(tl.float32)
                products += CODES(parts, s[None, :, None], g, r) * values[None, :, :]
                total += values
            scale, shift = SCALES(parts, s[None, :], g)
            acc += scale[:, :, None] * products + shift[:, :, None] * total[None, :, :]
    y = tl.sum(tl.sum(acc, 2), 1)
    tl.store(out + part * N + n, y, mask=n < N)


@jit
def _prefill(
    x,
    w,
    out,
    M,
    BUCKET: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    J: tl.constexpr,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    LOAD: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
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
            for r in tl.static_range(PLANES):
                codes = CODES(parts, s[None, :, None], g, r)
                weights = tl.reshape(scale[:, :, None] * codes + shift[:, :, None], (BN, S * J))
                k = COLUMNS(step * S + flat // J, flat % J, g, r)
                known = (m[:, None] < M) & (k[None, :] < K)
                values = tl.load(x + m[:, None].to(tl.int64) * K + k[None, :], mask=known, other=0.0)
                acc = tl.dot(values, tl.trans(weights.to(values.dtype)), acc, input_precision="ieee")
    place = part * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out + place, acc, mask=(m[:, None] < M) & (n[None, :] < N))


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
    PLANES: tl.constexpr,
    LOAD: tl.constexpr,
    SCALES: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
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
        for r in tl.static_range(PLANES):
            codes = CODES(parts, s[None, :, None], g, r)
            k = COLUMNS(s[None, :, None], j[None, None, :], g, r)
            place = out + n[:, None, None].to(tl.int64) * K + k
            tl.store(place, scale[:, :, None] * codes + shift[:, :, None], mask=inside[:, :, None])


@jit
def words_at(place, j, inside):
    """Words `j` from each of the places [n, S] on, int32 [n, S, J]."""
    return tl.load(place[:, :, None] + j, mask=inside[:, :, None], other=0).to(tl.int32)


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
"""Where a step reads fewer values of x than there are threads, Triton 3.9 loads them in the layout of the codes,
without a detour through shared memory and its barriers; so such steps come first."""

PREFILL: list[Config] = [
    {"BM": 16, "BN": 64, "S": 8, "num_warps": 4, "num_stages": 3},
    {"BM": 16, "BN": 32, "S": 8, "num_warps": 4, "num_stages": 3},
    {"BM": 32, "BN": 64, "S": 8, "num_warps": 4, "num_stages": 3},
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
        "PLANES": layout.planes,
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
    (rows, columns), outputs = x.shape, blocks.shape[0]
    programs = triton.cdiv(outputs, 8) if way == "decode" else triton.cdiv(rows, 32) * triton.cdiv(outputs, 64)
    parts = splits(programs, _segments(kind, columns) // 16, x.device)
    constants = constants_of(kind, columns) | {"N": outputs} | ({} if way == "decode" else {"K": columns})
    function, configs = (_decode, DECODE) if way == "decode" else (_prefill, PREFILL)
    return plan(
        function, way, x, {"w": blocks.view(kind.layout.word)}, configs, outputs, "BN", outputs, parts, constants
    )


def dequantize_launch(kind: BlockType, blocks: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes the weight into `out` [out, in]."""
    rows, columns = out.shape
    arguments = {"w": blocks.view(kind.layout.word), "out": out, "N": rows, "K": columns, **constants_of(kind, columns)}
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
