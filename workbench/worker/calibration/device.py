"""Where the pass runs, and how precisely.

Matrix products of the forward pass take bfloat16 inputs where the processor multiplies them natively (twice as
fast; the residual stream, norms and Grams stay float32), else float32. Everything made of a Gram matrix is float32
proper: TF32 keeps ten bits of each factor, and a Cholesky factor of a matrix so rounded is another matrix's.

One device is enough for any base: only one layer is ever on it; several share the windows (`team.py`). A layer whose
quantizing does not fit there is quantized in host memory (`with_cpu_fallback`). Rejected: spreading a layer's matrices
over several devices, which would only help where one layer with its Grams fills a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.errors import UserError, out_of_memory, unknown


def choose_device(name: str) -> Any:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device. Raises `UserError` for one that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}': torch sees {torch.cuda.device_count()} CUDA devices here; take `cpu`")
    return device


def choose_devices(name: str, count: int | None) -> list[Any]:
    """The devices that share the windows of a pass, the first as `choose_device` has it: so many from there on, or,
    where it is not said, all GPUs if none is named, else one. Raises `UserError` for more GPUs than there are."""
    import torch

    first = choose_device(name)
    if first.type == "cpu":
        return [first] * (count or 1)
    number = first.index or 0
    seen = torch.cuda.device_count() - number
    count = count or (seen if first.index is None else 1)
    if count > seen:
        raise UserError(f"calibration.devices: {count}, and torch sees {seen} CUDA devices here; ask for no more")
    return [first, *(torch.device("cuda", number + more) for more in range(1, count))]


def choose_precision(name: str, device: Any) -> str:
    """`float32` or `bfloat16`: of the forward pass's matrix products; `auto` is what the processor does natively."""
    import torch

    if name != "auto":
        if name not in ("float32", "bfloat16"):
            raise unknown("precision", name, ("auto", "float32", "bfloat16"))
        return name
    if device.type == "cuda":
        # torch counts emulation as support, which is slower than float32.
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None) or (lambda: False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None) or (lambda: False)
    return "bfloat16" if native() or amx() else "float32"


def exact_products() -> None:
    """Float32 products in float32, whatever a library or an environment variable has asked of torch before."""
    import torch

    torch.set_float32_matmul_precision("highest")


def name_of(device: Any) -> str:
    """What of a device decides the last bits: its model, not its number."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def synchronize(device: Any) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_cpu_fallback(attempt: Callable[[], Any], fallback: Callable[[], Any], device: Any) -> tuple[Any, bool]:
    """`attempt()`, or where the device's memory does not hold that, `fallback()`, and whether it came to that."""
    import torch

    try:
        return attempt(), False
    except Exception as error:
        if not out_of_memory(error):
            raise
    # Not inside the handler: the exception's frames hold what filled the memory.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fallback(), True
