"""Every operation at odd shapes, and how far it is from the format's own de-quantizer: what the tests of the kernels
run in Triton's interpreter (as a program, in a process of its own: Triton reads `TRITON_INTERPRET` when it is first
imported, and other tests import it) and on a GPU.

    TRITON_INTERPRET=1 python tests/kernels/kernel_cases.py      prints one JSON line a case
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCALES_AT = {
    "Q8_0": (0,), "Q6_K": (208,), "Q5_K": (0, 2), "Q5_1": (0, 2), "Q5_0": (0,), "Q4_K": (0, 2), "Q4_1": (0, 2),
    "Q4_0": (0,), "Q3_K": (108,), "Q2_K": (80, 82), "IQ4_XS": (0,), "IQ4_NL": (0,),
}  # fmt: skip
"""Where a block keeps its float16 numbers; all other bytes may be anything."""
BLOCKS = {"Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"}
"""Types of 32 weights a block."""


def cases() -> Iterator[dict[str, Any]]:
    """Rows of x, columns (`K`), rows of W (`N`), parts that K is cut into; each with an `id`."""
    for name in SCALES_AT:
        small = name in BLOCKS
        for dtype in ("float32", "float16"):
            for path, m, n, blocks, parts in (
                ("decode", 1, 11, 17 if small else 3, 1),
                ("prefill", 5, 67, 3 if small else 1, 1),
                ("dense", 3, 21, 17 if small else 2, 1),
            ):
                yield {
                    "op": "blocks",
                    "kind": name,
                    "dtype": dtype,
                    "path": path,
                    "M": m,
                    "N": n,
                    "parts": parts,
                    "K": blocks * (32 if small else 256),
                }
    for name, path, m, n, k, parts in (
        ("Q4_K", "decode", 1, 1, 256, 1),
        ("Q4_K", "decode", 1, 7, 256 * 5, 2),
        ("Q8_0", "decode", 1, 9, 32 * 37, 4),
        ("Q6_K", "prefill", 17, 3, 256 * 3, 2),
        ("Q4_0", "prefill", 1, 5, 32 * 29, 4),
        ("Q5_K", "prefill", 2, 1, 256, 1),
    ):
        yield {"op": "blocks", "kind": name, "dtype": "float32", "path": path, "M": m, "N": n, "K": k, "parts": parts}
    for k, n, group in ((96, 24, 32), (130, 8, 130), (48, 136, 16), (384, 16, 128)):
        for path, m in (("decode", 1), ("prefill", 7), ("dense", 3)):
            for dtype in ("float32", "float16"):
                yield {
                    "op": "awq",
                    "dtype": dtype,
                    "path": path,
                    "M": m,
                    "N": n,
                    "K": k,
                    "group": group,
                    "parts": 2 if k == 384 and path != "dense" else 1,
                }
    for bits in (2, 4, 8):
        for k, n, group, order in ((96, 48, 32, "plain"), (112, 16, 112, "plain"), (128, 32, 32, "act")):
            for path, m in (("decode", 1), ("prefill", 7), ("dense", 3)):
                for dtype in ("float32", "float16"):
                    yield {
                        "op": "gptq",
                        "bits": bits,
                        "dtype": dtype,
                        "path": path,
                        "M": m,
                        "N": n,
                        "K": k,
                        "group": group,
                        "order": order,
                        "parts": 2 if order == "act" and path != "dense" else 1,
                    }


def name_of(case: dict[str, Any]) -> str:
    """`Q4_K-decode-float16-1x768x11`."""
    kind = case.get("kind") or case["op"] + (f"{case['bits']}-{case['order']}" if "bits" in case else "")
    shape = f"{case['M']}x{case['K']}x{case['N']}"
    return "-".join([kind, case["path"], case["dtype"], shape, f"parts{case['parts']}"])


def tolerance(case: dict[str, Any]) -> float:
    """Of the largest output: float32 differs by the order of sums, 16 bits by rounding x, the tile and y."""
    return {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[case["dtype"]]


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> Any:
    """Any bytes with sensible scales, uint8 [rows, row bytes]."""
    import gguf
    import numpy as np
    import torch

    weights, size = gguf.GGML_QUANT_SIZES[getattr(gguf.GGMLQuantizationType, name)]
    chance = np.random.default_rng(seed)
    raw = chance.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    for at in SCALES_AT[name]:
        values = chance.normal(0, 0.02, raw.shape[:2]).astype(np.float16)
        raw[:, :, at : at + 2] = values.view(np.uint8).reshape(*raw.shape[:2], 2)
    return torch.from_numpy(raw.reshape(rows, -1))


def random_words(*shape: int) -> Any:
    """Any 32 bits, int32."""
    import torch

    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def by_gguf(name: str, data: Any) -> Any:
    """The `gguf` package's de-quantizer, float32 [rows, columns]."""
    import gguf
    import torch

    return torch.from_numpy(gguf.dequantize(data.numpy(), getattr(gguf.GGMLQuantizationType, name)))


def by_definition(bits: int, codes: Any, zeros: Any, scales: Any, group_of: Any) -> Any:
    """w = (q - zero) x scale for codes [in, out], zeros and scales [groups, out]; float32 [out, in]."""
    return ((codes.float() - zeros.float()[group_of]) * scales.float()[group_of]).t()


def unpacked(words: Any, bits: int, order: tuple[int, ...] | None = None) -> list[list[int]]:
    """Words [n, m] along their second axis to numbers [n, m x 32 / bits], by Python's own integers."""
    count = 32 // bits
    rows = []
    for row in words.tolist():
        values: list[int] = []
        for word in row:
            cut = [(word >> (bits * i)) & (2**bits - 1) for i in range(count)]
            values += [cut[i] for i in order] if order else cut
        rows.append(values)
    return rows


def weight_of(case: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """(de-quantized weight float32 [N, K], packed tensors as the operation takes them), on the CPU."""
    import torch
    from workbench_kernels.gguf.planes import split
    from workbench_kernels.gguf.types import block_type

    torch.manual_seed(case["K"] * 1000 + case["N"])
    n, k = case["N"], case["K"]
    if case["op"] == "blocks":
        data = random_blocks(case["kind"], n, k, seed=k + n)
        return by_gguf(case["kind"], data), (split(block_type(case["kind"]), data),)
    groups = k // case["group"]
    scales = (torch.rand(groups, n) * 0.05 + 0.01).half()
    plain = torch.arange(k) // case["group"]
    if case["op"] == "awq":
        qweight, qzeros = random_words(k, n // 8), random_words(groups, n // 8)
        # Column e of eight is in nibble (0, 4, 1, 5, 2, 6, 3, 7)[e].
        order = (0, 4, 1, 5, 2, 6, 3, 7)
        codes, zeros = torch.tensor(unpacked(qweight, 4, order)), torch.tensor(unpacked(qzeros, 4, order))
        return by_definition(4, codes, zeros, scales, plain), (qweight, qzeros, scales)
    bits = case["bits"]
    qweight, qzeros = random_words(k * bits // 32, n), random_words(groups, n * bits // 32)
    group_of = plain if case["order"] == "plain" else plain[torch.randperm(k)]
    codes = torch.tensor(unpacked(qweight.t(), bits)).t()
    zeros = (torch.tensor(unpacked(qzeros, bits)) + 1) % 2**bits
    return by_definition(bits, codes, zeros, scales, group_of), (qweight, qzeros, scales, group_of.to(torch.int32))


def product(case: dict[str, Any], x: Any, packed: tuple[Any, ...], path: str) -> Any:
    """The operation itself."""
    from workbench_kernels import awq, gptq
    from workbench_kernels.gguf import blocks
    from workbench_kernels.gguf.types import block_type

    if case["op"] == "blocks":
        return blocks.matmul(block_type(case["kind"]), x, *packed, path=path)
    if case["op"] == "awq":
        return awq.matmul(x, *packed, path=path)
    return gptq.matmul(x, *packed, case["bits"], plain=case["order"] == "plain", path=path)


def dequantized(case: dict[str, Any], packed: tuple[Any, ...], path: str) -> Any:
    """The de-quantize-only operation, float32."""
    from workbench_kernels import awq, gptq
    from workbench_kernels.gguf import blocks
    from workbench_kernels.gguf.types import block_type

    if case["op"] == "blocks":
        return blocks.dequantize(block_type(case["kind"]), *packed, path=path)
    if case["op"] == "awq":
        return awq.dequantize(*packed, path=path)
    return gptq.dequantize(*packed, case["bits"], plain=case["order"] == "plain", path=path)


def repeats(case: dict[str, Any], x: Any, packed: tuple[Any, ...]) -> bool:
    """Where K is in parts: whether a launch run twice gives the same both times, its counters back at zero."""
    from workbench_kernels.gguf import blocks
    from workbench_kernels.gguf.types import block_type

    if case["op"] != "blocks" or case["parts"] == 1:
        return True
    launch = blocks.launch(block_type(case["kind"]), case["path"], x, *packed)
    launch.run()
    first = launch.out.clone()
    launch.out.zero_()
    launch.run()
    counters: Any = launch.arguments["arrived"]
    return bool((first == launch.out).all()) and not counters.any()


def run(case: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """`matmul`, `reference`: largest errors over the largest output; `same`: de-quantizing is exact, both ways;
    `steady`: see `repeats`."""
    import torch
    from workbench_kernels import products
    from workbench_kernels.gguf import blocks

    weight, packed = weight_of(case)
    x = torch.randn(case["M"], case["K"]).to(getattr(torch, case["dtype"]))
    exact = x.double() @ weight.double().t()
    moved = tuple(tensor.to(device) for tensor in packed)
    kept, products.splits = (products.splits, blocks.DENSE_BYTES), lambda *_: case["parts"]
    blocks.DENSE_BYTES = 0  # the fewest rows at a time
    try:
        y = product(case, x.to(device), moved, case["path"]).cpu()
        steady = repeats(case, x.to(device), moved)
    finally:
        products.splits, blocks.DENSE_BYTES = kept
    plain = product(case, x, packed, "reference")
    ways = [dequantized(case, packed, "reference")]
    if case["path"] == "dense":
        ways.append(dequantized(case, moved, "kernel").cpu())
    largest = float(exact.abs().max())
    return {
        "id": name_of(case),
        "matmul": float((y.double() - exact).abs().max()) / largest,
        "reference": float((plain.double() - exact).abs().max()) / largest,
        "same": all(torch.equal(way, weight) for way in ways),
        "steady": steady,
        "dtype": str(y.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))
    from workbench_kernels.backend import INTERPRET

    if not INTERPRET:
        sys.exit("set TRITON_INTERPRET=1 (and install triton)")
    for one in cases():
        try:
            print(json.dumps(run(one)), flush=True)
        except Exception:
            print(json.dumps({"id": name_of(one), "error": traceback.format_exc()}), flush=True)
