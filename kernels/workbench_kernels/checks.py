"""What a kernel may be given. Every refusal is a `ValueError` that names the tensor and says what is supported.

A wrong stride or type in a kernel is not an exception but a wrong number, so nothing is launched before this.
"""

import torch

from workbench_kernels.backend import ACTIVATIONS

ALIGNMENT_BYTES = 16


def short(dtype: torch.dtype) -> str:
    """`float16` for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def check_activations(x: torch.Tensor, columns: int, device: torch.device, name: str = "x") -> None:
    """Refuse an x unless it is [..., columns] of a floating type the kernels know, contiguous, on `device`."""
    if x.dtype not in ACTIVATIONS:
        raise ValueError(f"{name} is {short(x.dtype)}; supported: {', '.join(map(short, ACTIVATIONS))}")
    if x.ndim < 1 or x.shape[-1] != columns:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; supported: last dimension {columns}, as the weight's")
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()} for shape {tuple(x.shape)}; supported: contiguous")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the weight on {device}; supported: both on one device")


def check_packed(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], name: str) -> None:
    """Refuse a stored tensor of another type or shape (None: any size), or one that is not contiguous."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {short(tensor.dtype)}; supported: {short(dtype)}")
    if tensor.ndim != len(shape) or any(b is not None and a != b for a, b in zip(tensor.shape, shape, strict=False)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; supported: [{wanted}]")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; supported: contiguous")


def check_aligned(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that do not begin at a multiple of 16 bytes, as the wide loads of kernels need. (A tensor of its
    own does; one that lies in a mapped file may not.)"""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % ALIGNMENT_BYTES:
            raise ValueError(f"{name} begins at an odd address; supported: a multiple of {ALIGNMENT_BYTES} bytes")


def check_same_device(tensors: dict[str, torch.Tensor]) -> None:
    """Refuse a weight whose parts are on several devices."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{where}; supported: all parts of a weight on one device")
