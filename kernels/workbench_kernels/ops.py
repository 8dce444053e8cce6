"""The products as PyTorch operators: opaque to `torch.compile`, of known shape, and safe inside a CUDA graph.

Inside a graph nothing may wait for the device or look at its memory; none of the kernels does, and what they
allocate comes from the graph's own pool. A shape's first call may tune and compile: run it once before the capture.
"""

import torch

from workbench_kernels import awq, gptq
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.planes import columns_of, taken
from workbench_kernels.gguf.types import block_type


@torch.library.custom_op("workbench_kernels::awq_matmul", mutates_args=())
def awq_matmul(x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """`awq.matmul` with the path that fits the device and the rows."""
    return awq.matmul(x, qweight, qzeros, scales)


@torch.library.custom_op("workbench_kernels::gptq_matmul", mutates_args=())
def gptq_matmul(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    plain: bool,
) -> torch.Tensor:
    """`gptq.matmul` with the path that fits the device and the rows."""
    return gptq.matmul(x, qweight, qzeros, scales, g_idx, bits, plain=plain)


@awq_matmul.register_fake
@gptq_matmul.register_fake
def _(
    x: torch.Tensor, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *others: object
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[1])


@torch.library.custom_op("workbench_kernels::block_matmul", mutates_args=())
def block_matmul(x: torch.Tensor, planes: torch.Tensor, kind: str) -> torch.Tensor:
    """`blocks.matmul` for the block type of that name."""
    return blocks.matmul(block_type(kind), x, planes)


@block_matmul.register_fake
def _(x: torch.Tensor, planes: torch.Tensor, kind: str) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], planes.shape[0])


@torch.library.custom_op("workbench_kernels::block_rows", mutates_args=())
def block_rows(ids: torch.Tensor, planes: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` [...] of a packed matrix, de-quantized: `dtype` [..., columns]."""
    known = block_type(kind)
    found = blocks.dequantize(known, taken(known, planes, ids.reshape(-1)), dtype)
    return found.view(*ids.shape, found.shape[1])


@block_rows.register_fake
def _(ids: torch.Tensor, planes: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    columns = columns_of(block_type(kind), planes, torch.int16, "planes")
    return planes.new_empty(*ids.shape, columns, dtype=dtype)
