"""Blocks sorted into planes, and back: the same bytes, in an order in which kernels read 8 or 16 of them at a time.

A file holds a weight as uint8 [out, row bytes], block after block. Planes are int16 [out, row bytes / 2], another type
so that neither is taken for the other, and as large to the byte: first what `Layout.planes` names first of every block
of every row, then what it names next. Each plane begins where its widest load may, since the parts of a block that are
multiples of 16 bytes come first. A row is therefore no run of memory any more: `taken` gathers rows.

Rejected: planes within each row, which could be indexed as blocks can, but would want up to 15 bytes of padding a row.
One layout of codes for all types: it would give wider loads to none, and every type would need a packer as well.
"""

import torch

from workbench_kernels.checks import check_packed
from workbench_kernels.gguf.layout import BlockType


def split(kind: BlockType, blocks: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """The planes of blocks as a file holds them, on their device; `ValueError` that names what is no such blocks."""
    columns_of(kind, blocks, torch.uint8, name or f"{kind.name} blocks")
    planes = torch.empty(blocks.shape[0], blocks.shape[1] // 2, dtype=torch.int16, device=blocks.device)
    for source, target in zip(_parts(kind, blocks), _views(kind, planes), strict=True):
        target.copy_(source)
    return planes


def join(kind: BlockType, planes: torch.Tensor, first: int = 0, end: int | None = None) -> torch.Tensor:
    """The blocks of some rows, as a file holds them."""
    found = [view[first:end] for view in _views(kind, planes)]
    blocks = torch.empty(found[0].shape[0], 2 * planes.shape[1], dtype=torch.uint8, device=planes.device)
    for source, target in zip(found, _parts(kind, blocks), strict=True):
        target.copy_(source)
    return blocks


def taken(kind: BlockType, planes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The planes of rows of that number [m]."""
    found = planes.new_empty(rows.shape[0], planes.shape[1])
    for source, target in zip(_views(kind, planes), _views(kind, found), strict=True):
        torch.index_select(source, 0, rows, out=target)
    return found


def held(kind: BlockType, data: torch.Tensor, name: str) -> tuple[torch.Tensor, int]:
    """What a layer holds of a weight: planes, made of blocks if blocks are given, and the columns; `ValueError` that
    names it if it is neither."""
    planes = data if data.dtype == torch.int16 else split(kind, data, name)
    return planes, columns_of(kind, planes, torch.int16, name)


def columns_of(kind: BlockType, data: torch.Tensor, dtype: torch.dtype, name: str) -> int:
    """Columns of a weight in blocks (uint8) or planes (int16); `ValueError` that names it unless its rows are whole
    blocks of this type."""
    check_packed(data, dtype, (None, None), name)
    size_bytes, weights, row_bytes = kind.layout.size_bytes, kind.layout.weights, data.shape[1] * data.itemsize
    if row_bytes == 0 or row_bytes % size_bytes:
        raise ValueError(
            f"{name} has rows of {row_bytes} bytes; supported for {kind.name}: multiples of {size_bytes} "
            f"({weights} weights each)"
        )
    return row_bytes // size_bytes * weights


def _parts(kind: BlockType, blocks: torch.Tensor) -> list[torch.Tensor]:
    """What of the blocks belongs into each plane, int16 [out, blocks of a row, size / 2]."""
    size = kind.layout.size_bytes
    each = blocks.view(torch.int16).view(blocks.shape[0], blocks.shape[1] // size, size // 2)
    return [each[:, :, first // 2 : end // 2] for first, end in kind.layout.planes]


def _views(kind: BlockType, planes: torch.Tensor) -> list[torch.Tensor]:
    """Each of the planes, int16 [out, blocks of a row, size / 2]."""
    rows, blocks = planes.shape[0], 2 * planes.shape[1] // kind.layout.size_bytes
    sizes = [(end - first) // 2 for first, end in kind.layout.planes]
    flat = planes.view(-1).split([rows * blocks * size for size in sizes])
    return [plane.view(rows, blocks, size) for plane, size in zip(flat, sizes, strict=True)]
