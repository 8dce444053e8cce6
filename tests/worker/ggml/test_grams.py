"""Gram matrices on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.worker.ggml import grams

torch = pytest.importorskip("torch")


def test_a_matrix_comes_back_for_every_tensor_that_has_its_input(tmp_path: Path) -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    first, second = x.t() @ x, x[:, :5].t() @ x[:, :5]
    first, second = (first + first.t()) / 2, (second + second.t()) / 2
    grams.write(tmp_path, 0, {("q", "k", "v"): first, ("o",): second})
    grams.write(tmp_path, 1, {("up",): 2 * first})
    found = grams.read(tmp_path)
    for name in ("q", "k", "v"):
        assert torch.equal(found.load(name), first)
    assert torch.equal(found.load("o"), second) and torch.equal(found.load("up"), 2 * first)
    assert found.has("k", 12) and not found.has("k", 5) and found.has("o", 5) and not found.has("other", 12)
    held = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert held < 4 * (2 * 78 + 15) + 1000, "the half of it above the diagonal"
