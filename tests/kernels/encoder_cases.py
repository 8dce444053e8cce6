"""Weights and importances on which encoders are compared, and what llama.cpp's own quantizer makes of them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import torch

COLUMNS = 512


def by_llama_cpp(kind: str, weight: Any, importance: Any = None) -> Any:
    """`ggml_quantize_chunk` of the library that llama-cpp-python brings."""
    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base*"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    number = gguf.GGMLQuantizationType[kind]
    count, size = gguf.GGML_QUANT_SIZES[number]
    rows, columns = weight.shape
    out = torch.zeros(rows, columns // count * size, dtype=torch.uint8)
    pointer = None if importance is None else importance.data_ptr()
    written = quantize(int(number), weight.data_ptr(), out.data_ptr(), 0, rows, columns, pointer)
    assert written == out.numel()
    return out


def weights(seed: int) -> Iterator[tuple[str, Any]]:
    """Blocks as models have them, and what a search stumbles over: zeros of both signs, ties, flat runs, values on the
    grid, outliers, sizes from float32's smallest to where float16 still holds the scale."""
    chance = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> Any:
        return torch.randn(rows, COLUMNS, generator=chance)

    uniform = torch.rand(24, COLUMNS, generator=chance)
    yield "normal", normal(48) * 0.02
    yield "bfloat16", (normal(24) * 0.02).bfloat16().float()
    yield "of all sizes", normal(80) * torch.logspace(-6, 3, 80)[:, None]
    yield "heavy tails", normal(24) / normal(24).abs().clamp(min=1e-3) * 0.01
    spikes = normal(24)
    spikes[:, ::256] *= 1e4
    yield "spikes", spikes
    yield "zeros", torch.tensor([[0.0], [-0.0]]).expand(2, COLUMNS).contiguous()
    yield "half zeros", torch.where(uniform < 0.5, -0.0, normal(24))
    yield "sparse", torch.where(uniform < 0.95, 0.0, normal(24))
    flat = torch.linspace(-1, 1, 9)[:, None].expand(9, COLUMNS).contiguous()
    yield "flat", flat
    outlying = flat.clone()
    outlying[:, ::37] *= 3
    yield "flat but for some", outlying
    yield "two values", torch.where(uniform < 0.9, -1.0, torch.where(uniform < 0.95, -3.0, -1.0000001))
    yield "nearly flat", normal(24) * 1e-7 - 1
    yield "one sign", torch.cat([normal(16).abs() + 0.1, -normal(16).abs() - 0.1])
    yield "whole", (normal(24) * 4).round()
    yield "on a grid", torch.randint(-8, 8, (24, COLUMNS), generator=chance) * 0.125
    exponents = torch.randint(-12, 3, (24, COLUMNS // 16, 1), generator=chance).expand(-1, -1, 16)
    yield "runs of all sizes", normal(24) * 10.0 ** exponents.reshape(24, COLUMNS)
    exponents = torch.randint(-45, -13, (24, COLUMNS // 32, 1), generator=chance).expand(-1, -1, 32)
    yield "tiny and denormal", normal(24) * 10.0 ** exponents.reshape(24, COLUMNS)
    yield "each of its own size", normal(24) * 10.0 ** torch.randint(-44, 4, (24, COLUMNS), generator=chance)
    bits = torch.randint(-(2**31), 2**31 - 1, (24, COLUMNS), generator=chance).to(torch.int32).view(torch.float32)
    yield "any bits", torch.where(bits.abs() < 1e4, bits, 0.0)


def importances(seed: int) -> Iterator[tuple[str, Any]]:
    chance = torch.Generator().manual_seed(seed + 1000)
    uniform = torch.rand(COLUMNS, generator=chance)
    yield "none", None
    yield "as measured", uniform**4 + 1e-6
    yield "some zeros", torch.where(uniform < 0.3, 0.0, uniform)
    yield "nearly all zeros", torch.where(uniform < 0.97, 0.0, uniform)
    yield "all zeros", torch.zeros(COLUMNS)
    yield "of all sizes", uniform * 10.0 ** torch.randint(-30, 8, (COLUMNS,), generator=chance)
