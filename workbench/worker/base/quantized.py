"""Bases that somebody quantized, as the floats that their codes mean: AWQ, GPTQ, compressed-tensors, MXFP4.

    AWQ, GPTQ, compressed-tensors of integers    d (q - z)      in float32, exactly: 9 bits times a scale's 11
    MXFP4 (gpt-oss's experts)                    2^(e - 127) v  in bfloat16, exactly: v is one of 16 levels

FP8 is `floats.py`'s. What a scheme says of inputs is left out: the base computes with whole ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workbench.errors import UserError
from workbench.worker import Tensors
from workbench.worker.base.checkpoint import StoredTensor, packed_by
from workbench.worker.methods import compressed_tensors, gptq
from workbench.worker.methods.checkpoint import Scheme, scheme, unpacked

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""MXFP4's magnitudes; the fourth bit is the sign (OCP Microscaling Formats 1.0, E2M1)."""
BIAS = 127
"""Of its scales' exponents."""
NAME = "the base"


@dataclass(frozen=True)
class Quantized:
    """A packed base's `config.json` and its tensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def by(self) -> str:
        """Which of the four."""
        return packed_by(self.config, self.tensors)

    @property
    def dtype(self) -> str:
        """What holds the weights exactly, in torch's words."""
        return "bfloat16" if self.by == "mxfp4" else "float32"

    @cached_property
    def how(self) -> Scheme:
        """Its `quantization_config`, of all but MXFP4. `UserError` for layouts that are not read."""
        return scheme(self.config, NAME)

    @property
    def type(self) -> str:
        """What a weight was stored in."""
        return "MXFP4" if self.by == "mxfp4" else self.how.tensor_type

    def plain(self) -> dict[str, StoredTensor]:
        """The weights as they will be, by their names in a model of floats."""
        if self.by == "mxfp4":
            shapes = {}
            for name, tensor in self.tensors.items():
                if name.endswith("_blocks"):
                    *first, rows, groups, half = tensor.shape
                    shapes[name.removesuffix("_blocks")] = [*first, groups * half * 2, rows]
                elif f"{name.removesuffix('_scales')}_blocks" not in self.tensors:
                    shapes[name] = list(tensor.shape)
        else:
            shapes = unpacked(self.tensors, self.how, NAME)
        kind = {"bfloat16": "BF16", "float32": "F32"}[self.dtype]
        some = next(iter(self.tensors.values()))
        return {name: StoredTensor(some.file, kind, tuple(shape), 0).of_type(kind) for name, shape in shapes.items()}

    def maker(self) -> Callable[[str], Any]:
        """What gives a weight by its plain name."""
        if self.by == "mxfp4":
            return self._of_levels
        return self._of_compressed if self.by == "compressed-tensors" else self._of_words

    def _read(self, name: str) -> Any:
        if name not in self.tensors:
            raise UserError(f"{NAME}: tensor {name} is missing. Fetch it again")
        return self.tensors[name].read(name)

    def _parts(self, stem: str, *ends: str) -> Tensors:
        return {end: self._read(f"{stem}{end}") for end in ends if f"{stem}{end}" in self.tensors}

    def _of_words(self, name: str) -> Any:
        """AWQ's and GPTQ's."""
        import torch

        from workbench.worker.ggml.carry import Packed
        from workbench.worker.kernels import import_kernels

        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" not in self.tensors:
            return self._read(name)
        import_kernels()
        packed = Packed(stem, self.tensors, None if self.by == "awq" else self.how.options.bits)
        codes, zeros = torch.from_numpy(packed.codes()), torch.from_numpy(packed.zeros)
        order = self._parts(stem, ".g_idx").get(".g_idx")
        return affine(codes, zeros, self._read(f"{stem}.scales").t(), order)

    def _of_compressed(self, name: str) -> Any:
        """compressed-tensors', in words or a byte a code."""
        import torch

        found = self._parts(name, "", *(end.removeprefix(".weight") for end in compressed_tensors.BESIDE), "_packed")
        if "_scale" not in found:
            return self._read(name)
        bits, scales, zeros = self.how.options.bits, found["_scale"], found.get("_zero_point")
        scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
        if "_packed" in found:
            rows, columns = found["_shape"].tolist()
            codes = gptq.unpack(found["_packed"].t().contiguous(), bits).t()[:, :columns]
            zeros = torch.full((1, 1), 2 ** (bits - 1)) if zeros is None else gptq.unpack(zeros, bits)[:rows]
        else:
            codes = found[""]
            zeros = torch.zeros(1, 1) if zeros is None else zeros.reshape(scales.shape)
        return affine(codes, zeros, scales, found.get("_g_idx"))

    def _of_levels(self, name: str) -> Any:
        """MXFP4's: 16 bytes of 32 codes, the lower four bits first, and an exponent; rows and columns change places."""
        import torch

        if f"{name}_blocks" not in self.tensors:
            return self._read(name)
        blocks, exponents = self._read(f"{name}_blocks"), self._read(f"{name}_scales")
        levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], dtype=torch.bfloat16)
        values = torch.stack([levels[(blocks & 15).int()], levels[(blocks >> 4).int()]], -1).flatten(-2)
        whole = torch.ldexp(values, (exponents.int() - BIAS)[..., None])
        return whole.flatten(-2).transpose(-1, -2).contiguous()


def affine(codes: Any, zeros: Any, scales: Any, group_of: Any) -> Any:
    """d (q - z), float32 [outputs, in]: codes [outputs, in], zeros and scales [outputs, groups] or fewer rows;
    `group_of` [in] where groups are no runs of inputs."""
    import torch

    groups = scales.shape[1]
    if group_of is None:
        group_of = torch.arange(codes.shape[1]) // -(-codes.shape[1] // groups)
    zeros = zeros.float().expand(-1, groups)
    return (codes.float() - zeros[:, group_of.long()]) * scales.float()[:, group_of.long()]
