"""Linear layers and an embedding that hold packed weights, in place of `torch.nn.Linear` and `torch.nn.Embedding`.

Weights are buffers, in the types of their files whatever the model's dtype: `module.half()` leaves packed integers
alone, and scales stay the float16 they were stored in. Memory holds what the file holds; the
bytes of GGUF blocks are sorted into planes when a module is made (`gguf/planes.py`), no more and no fewer.
Everything that can be wrong with a weight is found when a module is made, and said with the layer's name.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

from workbench_kernels import awq, gptq, ops
from workbench_kernels.gguf.planes import held
from workbench_kernels.gguf.types import block_type


class _Packed(nn.Module):
    """What the three linear layers share: sizes, the bias, and that tensors keep their types."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None

    def _finish(self, in_features: int, out_features: int, bias: torch.Tensor | None) -> None:
        self.in_features, self.out_features = in_features, out_features
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; supported: [{out_features}]")
        self.register_buffer("bias", bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # `.to(dtype)` may move packed tensors but must not convert the scales among them.
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None and name != "bias"}
        nn.Module._apply(self, fn, recurse)
        for name, tensor in kept.items():
            self._buffers[name] = tensor.to(getattr(self, name).device)
        return self

    def _biased(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class AwqLinear(_Packed):
    """`awq.matmul`; tensors as in the checkpoint."""

    def __init__(
        self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        in_features, out_features, _ = awq.check(qweight, qzeros, scales)
        for name, tensor in zip(awq.TENSORS, (qweight, qzeros, scales), strict=True):
            self.register_buffer(name, tensor)
        self._finish(in_features, out_features, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._biased(ops.awq_matmul(x.contiguous(), self.qweight, self.qzeros, self.scales))


class GptqLinear(_Packed):
    """`gptq.matmul`; tensors as in the checkpoint."""

    def __init__(
        self,
        qweight: torch.Tensor,
        qzeros: torch.Tensor,
        scales: torch.Tensor,
        g_idx: torch.Tensor,
        bits: int,
        bias: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        in_features, out_features = gptq.check(qweight, qzeros, scales, g_idx, bits)
        gptq.check_g_idx(g_idx, scales.shape[0])
        self.bits, self.plain = bits, gptq.plain_order(g_idx, scales.shape[0])
        for name, tensor in zip(gptq.TENSORS, (qweight, qzeros, scales, g_idx), strict=True):
            self.register_buffer(name, tensor)
        self._finish(in_features, out_features, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.qweight, self.qzeros, self.scales, self.g_idx)
        return self._biased(ops.gptq_matmul(x.contiguous(), *weight, self.bits, self.plain))


class BlockLinear(_Packed):
    """`blocks.matmul`; `data`: blocks of the type `kind` as in a GGUF file, uint8 [out, row bytes], or planes."""

    def __init__(self, data: torch.Tensor, kind: str, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        planes, in_features = held(block_type(kind), data, "data")
        self.kind = kind
        self.register_buffer("planes", planes)
        self._finish(in_features, data.shape[0], bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._biased(ops.block_matmul(x.contiguous(), self.planes, self.kind))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"


class BlockEmbedding(nn.Module):
    """Rows of a packed matrix, de-quantized as they are looked up; may share its `planes` with a `BlockLinear`."""

    planes: torch.Tensor

    def __init__(self, data: torch.Tensor, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        planes, self.embedding_dim = held(block_type(kind), data, "data")
        self.num_embeddings, self.kind, self.dtype = data.shape[0], kind, dtype
        self.register_buffer("planes", planes)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = ops.block_rows(ids, self.planes, self.kind, self.dtype)
        return rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, kind={self.kind}"
