"""Codes and scales into the bytes of blocks: what the encoders of all types share once a search has found them."""

import torch


def in_order(values: torch.Tensor) -> torch.Tensor:
    """[run, runs, blocks, rows] or [runs, blocks, rows] -> [rows x blocks, weights or runs], in the file's order."""
    parts = values.permute(*reversed(range(values.ndim)))
    return parts.reshape(parts.shape[0] * parts.shape[1], -1)


def half(value: torch.Tensor) -> torch.Tensor:
    """Floats [blocks, rows] -> the two bytes of each one's float16, uint8 [rows x blocks, 2]."""
    return value.half().t().flatten().view(torch.uint8).view(-1, 2)


def bits(planes: torch.Tensor) -> torch.Tensor:
    """Eight planes of one bit each [n, 8, m] -> bytes [n, m], the first plane in the lowest bit."""
    return sum((planes[:, i] << i for i in range(1, 8)), planes[:, 0])


def quarters(planes: torch.Tensor) -> torch.Tensor:
    """Four planes of two bits each [..., 4, m] -> bytes [..., m], the first plane in the lowest bits."""
    return planes[..., 0, :] | (planes[..., 1, :] << 2) | (planes[..., 2, :] << 4) | (planes[..., 3, :] << 6)


def halves(codes: torch.Tensor, run: int) -> torch.Tensor:
    """The lower four bits of codes [n, weights] -> bytes [n, weights / 2 run, run]: each has a code of one run in its
    low half, and the same of the next run in its high half."""
    pairs = codes.view(codes.shape[0], -1, 2, run) & 15
    return pairs[:, :, 0] | (pairs[:, :, 1] << 4)


def joined(*parts: torch.Tensor) -> torch.Tensor:
    """Blocks of their parts, each [n, ...], one after the other: uint8 [n, bytes of a block]."""
    return torch.cat([part.to(torch.uint8).flatten(1) for part in parts], dim=1)
