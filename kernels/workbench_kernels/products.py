"""A product with a packed weight, as far as it is the same for every layout: which way, the launch, the sum of parts.

A layout (`awq`, `gptq`, `gguf.blocks`) checks its tensors and brings its reference and its kernels; the rest is here.
"""

from collections.abc import Callable, Mapping

import torch

from workbench_kernels.backend import ACTIVATIONS, Kernel, bucket, choose_path, triton
from workbench_kernels.checks import check_activations, check_aligned, short


def multiply(
    x: torch.Tensor,
    columns: int,
    outputs: int,
    tensors: dict[str, torch.Tensor],
    path: str,
    *,
    reference: Callable[[torch.Tensor], torch.Tensor],
    dense: Callable[[torch.Tensor], torch.Tensor],
    kernel: Callable[[str, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x [..., columns] times the transpose of a packed weight [outputs, columns] -> [..., outputs], of x's type.

    `tensors`: the weight's, by name. The three ways get x as [rows, columns]; `kernel` also whether by `decode` or
    `prefill`. `path`: see `backend.choose_path`. `ValueError` for a shape, type, stride or device that is not covered.
    """
    check_activations(x, columns, next(iter(tensors.values())).device)
    flat = x.view(-1, columns)
    way = choose_path(path, x, flat.shape[0])
    if flat.shape[0] == 0 or outputs == 0:
        return x.new_zeros(*x.shape[:-1], outputs)
    if way == "reference":
        y = reference(flat)
    elif way == "dense":
        y = dense(flat)
    else:
        check_aligned(tensors)
        y = kernel(way, flat)
    return y.view(*x.shape[:-1], outputs)


def dequantized_by_kernel(tensors: dict[str, torch.Tensor], dtype: torch.dtype, path: str) -> bool:
    """Whether a kernel de-quantizes these tensors to `dtype`; else the reference does.

    `path`: `auto`, `reference` or `kernel`. `ValueError` for a type or device that is not covered.
    """
    name, first = next(iter(tensors.items()))
    if dtype not in ACTIVATIONS:
        raise ValueError(f"{name} to {short(dtype)}; supported: {', '.join(map(short, ACTIVATIONS))}")
    if path == "reference" or (path == "auto" and first.device.type != "cuda"):
        return False
    choose_path("dense", first, first.shape[0])
    check_aligned(tensors)
    return True


def launch(
    way: str,
    kernels: tuple[Kernel, Kernel],
    x: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    outputs: int,
    tiles: tuple[str, int],
    parts: int,
    constants: Mapping[str, object],
) -> torch.Tensor:
    """x [rows, in] times a packed weight by its decode or prefill kernel -> [rows, outputs], of x's type.

    `kernels`: decode, prefill. `tiles`: the constant that says how long a tile is along the weight's stored outputs,
    and how many of those there are. `parts`: into how many K is cut; each sums into a plane of its own.
    """
    rows, (tile, length) = x.shape[0], tiles
    out = x.new_empty(parts, rows, outputs, dtype=x.dtype if parts == 1 else torch.float32)
    if way == "decode":
        kernels[0][lambda meta: (triton.cdiv(length, meta[tile]), parts)](x, *tensors, out, SPLIT=parts, **constants)
    else:
        kernels[1][lambda meta: (triton.cdiv(rows, meta["BM"]), triton.cdiv(length, meta[tile]), parts)](
            x, *tensors, out, M=rows, BUCKET=bucket(rows), SPLIT=parts, **constants
        )
    # The planes are always summed in the same order, so a result does not change from run to run.
    return out.sum(0).to(x.dtype) if parts > 1 else out[0].to(x.dtype)
