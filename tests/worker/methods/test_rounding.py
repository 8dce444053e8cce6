"""Grids, factors and what rounding leaves against their definitions, in float64 and one column at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.worker.layers import half, problem
from workbench.errors import UserError
from workbench.worker.methods import rounding

torch = pytest.importorskip("torch")


def best_grid(column: Any, block: Any, bits: int, symmetric: bool, lowest_zero: int) -> tuple[float, float]:
    """One column of one group: shrunken ranges, then twice finer, then two least-squares steps."""
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    low, high = min(column.min(), 0), max(column.max(), 0)
    reach = max(-low, high) / middle if symmetric else (high - low) / top
    best = (math.inf, 1.0, 1.0, float(middle))  # error, shrink, scale, zero

    def codes(scale: float, zero: float) -> Any:
        ends = (-middle, top - middle) if symmetric else (-zero, top - zero)
        return np.clip(np.round(column / scale), *ends)

    def consider(scale: float, zero: float, shrink: float) -> None:
        nonlocal best
        left = column - codes(scale, zero) * scale
        error = float(left @ block @ left)
        if error < best[0] * (1 - 1e-6):
            best = (error, shrink, scale, zero)

    def shrunk(by: float) -> None:
        scale = float(half(reach * by))
        consider(scale, best[3] if symmetric else float(np.clip(np.round(-low * by / scale), lowest_zero, top)), by)

    for i in range(-1 if symmetric else 0, 6 if bits > 3 else 9):
        shrunk(1 - 0.08 * i)
    coarse = best[1]
    for step in (0.04, -0.04):
        shrunk(coarse + step)
    for _ in range(2):
        q = codes(best[2], best[3])
        fitted = (q @ block @ column) / (q @ block @ q)
        consider(float(half(fitted)) if fitted > 0 else best[2], best[3], best[1])
    return best[2], best[3]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_the_grid_is_the_one_that_the_search_is_said_to_find(bits: int, symmetric: bool, blocks: bool) -> None:
    weight, gram = problem(48, 12, bits)
    weight[16:32] = weight[16:32].abs() + 0.2  # a group whose best zero lies below its range
    weight[3] *= 4
    weight[40] *= 30  # large where it hardly counts: the best range is far inside
    gram[40], gram[:, 40] = 1e-3 * gram[40], 1e-3 * gram[:, 40]
    for lowest_zero in (0, 1):
        grid = rounding.search_grid(weight, gram, 16, bits, symmetric=symmetric, blocks=blocks, lowest_zero=lowest_zero)
        assert grid.bits == bits
        same = 0
        for group in range(3):
            inside = slice(16 * group, 16 * group + 16)
            block = gram[inside, inside].double().numpy()
            for channel in range(12):
                column = weight[inside, channel].double().numpy()
                found = best_grid(column, block if blocks else np.diag(np.diag(block)), bits, symmetric, lowest_zero)
                same += found == (float(grid.scale[group, channel]), float(grid.zero[group, channel]))
        # Two candidates may differ by less than float32 can tell.
        assert same >= 34


def test_a_grid_of_many_channels_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(32, 20, 5)
    whole = rounding.search_grid(weight, gram, 16, 4, symmetric=False)
    monkeypatch.setattr(rounding, "CHUNK", 7)
    parts = rounding.search_grid(weight, gram, 16, 4, symmetric=False)
    assert torch.equal(whole.scale, parts.scale) and torch.equal(whole.zero, parts.zero)


def test_a_channel_without_weights_has_scale_one_and_the_middle_zero() -> None:
    weight, gram = problem(32, 4, 6)
    weight[:16, 1] = 0.0
    weight[16:, 2] = weight[16:, 2].abs()
    for symmetric in (True, False):
        grid = rounding.search_grid(weight, gram, 16, 3, symmetric=symmetric)
        assert (float(grid.scale[0, 1]), float(grid.zero[0, 1])) == (1.0, 4.0)
        assert float(grid.scale[1, 1]) != 1.0
        assert float(grid.zero[1, 2]) == (4.0 if symmetric else 1.0)


def test_float16_has_an_end_on_either_side() -> None:
    """65504 is the largest number of float16, 2^-14 the smallest that is normal."""
    assert float(torch.finfo(torch.float16).max) == 65504 and torch.finfo(torch.float16).tiny == rounding.TINY_SCALE
    found = rounding.as_half(torch.tensor([1e9, 65505.0, 65500.0, 1.0, 2.0**-14, 1e-9, 0.0]))
    assert found.tolist() == [65504.0, 65504.0, 65504.0, 1.0, 2.0**-14, 2.0**-14, 2.0**-14]
    assert found.dtype == torch.float32


def test_what_the_damping_added_is_not_told_as_error() -> None:
    weight, gram = problem(40, 12, 8)
    gram[7], gram[:, 7] = 0, 0
    grid = rounding.search_grid(weight, gram, 20, 3, symmetric=False)
    group_of = torch.arange(40) // 20
    for order in (torch.arange(40), torch.randperm(40, generator=torch.Generator().manual_seed(1))):
        made = rounding.compensate(weight, gram, grid, group_of, order, 0.5)
        left = (weight - (made.codes.float() - grid.zero[group_of]) * grid.scale[group_of]).double()
        torch.testing.assert_close(made.error.double(), ((gram.double() @ left) * left).sum(0), rtol=1e-3, atol=1e-4)


def test_shares_are_of_something() -> None:
    assert rounding.ratio(torch.tensor(1.0), torch.tensor(4.0)) == 0.25
    assert rounding.ratio(torch.tensor(-1e-9), torch.tensor(4.0)) == rounding.ratio(1.0, 0.0) == 0.0
    assert rounding.singular("here", 0.1) == "here: the Gram matrix is singular; damping raised to 0.1"


@pytest.mark.parametrize("size", [-1, 16, 32, 128, 1024])
def test_grids_that_can_be(size: int) -> None:
    rounding.check_grid("awq", size, 0.0)
    rounding.check_grid("awq", size, 0.999)


@pytest.mark.parametrize(
    ("size", "damping"), [(8, 0.1), (0, 0.1), (-16, 0.1), (15, 0.1), (17, 0.1), (32, -0.1), (32, 1.0)]
)
def test_grids_that_cannot_be(size: int, damping: float) -> None:
    with pytest.raises(UserError, match="^gptq: (group_size|damping) "):
        rounding.check_grid("gptq", size, damping)


def test_where_the_damping_is_nearly_all_of_an_error_the_rest_is_still_told_right() -> None:
    """One input counts, and its weights lie on the grid: the others' errors are nearly all damping."""
    weight, _ = problem(40, 12, 9)
    gram = torch.diag(torch.cat([torch.ones(1), torch.full((39,), 1e-9)]))
    weight[0] = 1.0
    grid = rounding.Grid(torch.full((1, 12), 0.5), torch.full((1, 12), 8.0), 4)
    order = torch.arange(39, -1, -1)
    made = rounding.compensate(weight, gram, grid, torch.zeros(40, dtype=torch.int64), order, 0.5)
    left = (weight - (made.codes.float() - 8) * 0.5).double()
    assert not left[0].any() and left[1:].abs().max() > 0.1
    torch.testing.assert_close(made.error.double(), ((gram.double() @ left) * left).sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_that_are_searched_together_get_the_same_grids(
    monkeypatch: pytest.MonkeyPatch, blocks: bool, symmetric: bool
) -> None:
    """As on a GPU: three groups and all channels at once, then the rest."""
    torch.manual_seed(0)
    weight, x = torch.randn(256, 90) * 0.02, torch.randn(500, 256)
    gram = x.t() @ x / 500
    alone = rounding.search_grid(weight, gram, 64, 4, symmetric=symmetric, blocks=blocks)
    together = [(range(3), [slice(None)]), (range(3, 4), [slice(None)])]
    monkeypatch.setattr(rounding, "_steps", lambda *_: iter(together))
    found = rounding.search_grid(weight, gram, 64, 4, symmetric=symmetric, blocks=blocks)
    assert float((found.scale == alone.scale).float().mean()) > 0.98
    assert torch.allclose(found.scale, alone.scale, rtol=0.1)


def test_a_gpu_searches_some_groups_at_once_and_no_more_weights_than_fit() -> None:
    steps = list(rounding._steps(5, 128, rounding.SLAB // 256, torch.device("cuda")))
    assert [some for some, _ in steps] == [range(0, 2), range(2, 4), range(4, 5)]
    (huge, channels), *_ = rounding._steps(3, 128, 2 * rounding.SLAB, torch.device("cuda"))
    assert huge == range(1) and channels == [slice(None)]


def test_a_processor_asks_for_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing them takes seconds, and an installation may be without."""
    monkeypatch.setattr(rounding, "by_kernel", lambda *_: pytest.fail("kernels were asked for"))
    torch.manual_seed(0)
    weight, x = torch.randn(64, 8) * 0.02, torch.randn(200, 64)
    gram = x.t() @ x / 200
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=True)
    rounding.compensate(weight, gram, grid, torch.arange(64) // 32, torch.arange(64), 0.01)
