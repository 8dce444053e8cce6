"""A block of columns rounded with error feedback by one launch, against the same a column at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.places import ROOT

torch = pytest.importorskip("torch")

PROGRAM = """
import torch
from workbench.worker.methods import rounding

def problem(device):
    torch.manual_seed(0)
    inputs, outputs, size = 336, 45, 48
    weight, x = torch.randn(inputs, outputs) * 0.02, torch.randn(2000, inputs)
    gram = x.t() @ x / 2000
    grid = rounding.search_grid(weight, gram, size, 4, symmetric=False)
    order = torch.randperm(inputs)
    group_of = torch.arange(inputs) // size
    moved = [tensor.to(device) for tensor in (weight, gram)]
    grid = rounding.Grid(grid.scale.to(device), grid.zero.to(device), 4)
    return moved, grid, group_of.to(device), order.to(device)
"""


def run(words: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM + words],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), **environment},
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.mark.slow
def test_interpreted() -> None:
    """336 columns are two whole blocks and a part of one; 45 channels a program and a part of one."""
    pytest.importorskip("triton")
    words = """
from workbench.worker.methods.feedback import factored, feedback
moved, grid, group_of, order = problem("cpu")
plain = rounding.compensate(*moved, grid, group_of, order, 0.01)
factor = factored(moved[1], order, 0.01)
codes = torch.empty_like(moved[0])
by_kernel = rounding.by_kernel(factor, grid, group_of[order].tolist(), codes)
error, residual = feedback(moved[0], factor, None, by_kernel)
back = torch.empty(codes.shape, dtype=torch.uint8)
back[order] = codes.to(torch.uint8)
lost = moved[0][order] - (codes - grid.zero[group_of[order]]) * grid.scale[group_of[order]]
assert torch.allclose(lost, error, atol=1e-7)
assert torch.allclose(factor.spread @ residual.square(), plain.error, rtol=0.02)
print(float((back == plain.codes).float().mean()))
"""
    # A sum in another order decides a tie otherwise, and what follows it.
    assert float(run(words, TRITON_INTERPRET="1")) > 0.99


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    words = """
found = []
for device in ("cpu", "cuda"):
    moved, grid, group_of, order = problem(device)
    found.append(rounding.compensate(*moved, grid, group_of, order, 0.01))
assert torch.allclose(found[0].error, found[1].error.cpu(), rtol=0.02)
print(float((found[0].codes == found[1].codes.cpu()).float().mean()))
"""
    assert float(run(words)) > 0.99


def test_what_it_refuses() -> None:
    pytest.importorskip("triton")
    from workbench_kernels.feedback import round_block

    def block(columns: int, *, strided: bool = False) -> list[Any]:
        table = torch.zeros(columns, 8)
        weight = torch.zeros(8, columns).t() if strided else table
        group = torch.zeros(columns, dtype=torch.int32)
        return [table, weight, torch.eye(columns), table, table, group, 15.0, table, table, table]

    with pytest.raises(ValueError, match="a block of 129 columns; supported: 128"):
        round_block(*block(129))
    with pytest.raises(ValueError, match=r"strides \(1, 16\); supported: contiguous"):
        round_block(*block(16, strided=True))
