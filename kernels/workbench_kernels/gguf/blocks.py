"""x @ W^T for W in GGUF blocks, sorted into planes: what `modules` and `ops` ask for.

`decode` and `prefill` are kernels of their own (`kernels.py`); `dense` de-quantizes a piece of W at a time for the
vendor's matmul. The reference puts blocks together again as the file holds them, and works by definition.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from workbench_kernels import decode
from workbench_kernels.backend import DENSE_BYTES, packing_of, triton
from workbench_kernels.gguf import kernels
from workbench_kernels.gguf.layout import BlockType
from workbench_kernels.gguf.planes import columns_of, join
from workbench_kernels.products import Launch, dequantized_by_kernel, multiply, plan

REFERENCE_WEIGHTS = 2**23
"""Weights that the reference de-quantizes at a time (32 MiB in float32)."""


def constants_of(kind: BlockType, columns: int) -> dict[str, object]:
    """What the kernels have to know of a type and of the length of a row. (`KIND` is for the tuner, which has to tell
    types apart.)"""
    layout, unpacking = kind.layout, kind.unpacking
    return {
        "KIND": kind.name,
        "BLOCKS": columns // layout.weights,
        "SEGMENTS": columns // layout.weights * layout.segments,
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


# --- public -------------------------------------------------------------------------------------


def dequantize(
    kind: BlockType,
    planes: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    rows: range | None = None,
    path: str = "auto",
) -> torch.Tensor:
    """int16 [out, row bytes / 2] -> `dtype` [out, in], or some rows of it. `path`: `auto`, `reference` or `kernel`."""
    columns = columns_of(kind, planes, torch.int16, f"{kind.name} planes")
    rows = range(planes.shape[0]) if rows is None else rows
    if not dequantized_by_kernel({f"{kind.name} planes": planes}, dtype, path):
        blocks = join(kind, planes, rows.start, rows.stop).view(-1, kind.layout.size_bytes)
        return kind.reference(blocks).view(len(rows), columns).to(dtype)
    out = torch.empty(len(rows), columns, dtype=dtype, device=planes.device)
    if rows:
        dequantize_launch(kind, planes, out, rows.start).run()
    return out


def matmul(kind: BlockType, x: torch.Tensor, planes: torch.Tensor, *, path: str = "auto") -> torch.Tensor:
    """x [..., in] times the transpose of the weight [out, in] in planes -> [..., out], of x's type; see `multiply`."""
    return multiply(
        x,
        columns_of(kind, planes, torch.int16, f"{kind.name} planes"),
        planes.shape[0],
        {f"{kind.name} planes": planes},
        path,
        reference=lambda flat: _reference(kind, flat, planes),
        dense=lambda flat: _dense(kind, flat, planes),
        kernel=lambda way, flat: decode.rows(kind, way, flat, planes) or launch(kind, way, flat, planes),
    )


def launch(kind: BlockType, way: str, x: torch.Tensor, planes: torch.Tensor) -> Launch:
    """The launch of x [rows, in] times the weight, by `decode` (one row) or `prefill`."""
    columns, outputs = x.shape[1], planes.shape[0]
    constants = constants_of(kind, columns) | {"N": outputs, **packing_of(x)}
    if way == "prefill":
        constants["K"] = columns
    function, tiles = (kernels.decode, kernels.DECODE) if way == "decode" else (kernels.prefill, kernels.PREFILL)
    made = plan(
        function,
        x,
        {"w": planes},
        outputs,
        [tile | {"S": tile["S"] // kind.layout.segment_words} for tile in tiles],
        ("BN", outputs),
        lambda config: triton.cdiv(constants["SEGMENTS"], config["S"]),
        constants,
    )
    return replace(made, arguments={**made.arguments, "x": x.view(torch.int64)})


def dequantize_launch(kind: BlockType, planes: torch.Tensor, out: torch.Tensor, first: int = 0) -> Launch:
    """The launch that writes rows of the weight, from row `first` on, into `out` [rows, in]."""
    rows, columns = out.shape
    constants = constants_of(kind, columns) | packing_of(out)
    arguments = {"w": planes, "out": out.view(torch.int64), "ALL": planes.shape[0], "FIRST": first, "N": rows}
    return Launch(
        kernels.dequantize,
        arguments | {"K": columns} | constants,
        [kernels.TILE],
        (),
        lambda meta: (triton.cdiv(rows, meta["BN"]), triton.cdiv(constants["SEGMENTS"], meta["S"])),
    )


def _reference(kind: BlockType, x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """By definition: de-quantized rows times x in float32, some rows at a time."""
    y = x.new_empty(x.shape[0], planes.shape[0])
    wide = x.float()
    for rows in _pieces(planes.shape[0], max(1, REFERENCE_WEIGHTS // x.shape[1])):
        y[:, rows.start : rows.stop] = wide @ dequantize(kind, planes, rows=rows, path="reference").t()
    return y


def _dense(kind: BlockType, x: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], planes.shape[0])
    # Multiples of 16 rows, so that every piece begins where wide loads may.
    step = max(16, DENSE_BYTES // (x.shape[1] * x.element_size()) // 16 * 16)
    for rows in _pieces(planes.shape[0], step):
        weights = dequantize(kind, planes, x.dtype, rows=rows, path="kernel")
        torch.mm(x, weights.t(), out=y[:, rows.start : rows.stop])
    return y


def _pieces(rows: int, step: int) -> Iterator[range]:
    """`step` rows at a time."""
    return (range(first, min(first + step, rows)) for first in range(0, rows, step))
