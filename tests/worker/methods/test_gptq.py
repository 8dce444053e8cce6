"""GPTQ's rounding against its definition, and its layout against the bits on paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.unpacking import unpack_gptq
from workbench.errors import UserError
from workbench.recipe.load import parse
from workbench.worker.methods import gptq, rounding

torch = pytest.importorskip("torch")


def problem(inputs: int = 96, outputs: int = 40, tokens: int = 400, seed: int = 0):
    """Correlated inputs of very different sizes, as activations are: (weight [in, out], gram)."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=chance) * torch.logspace(-1.5, 0.5, inputs)
    x = torch.randn(tokens, inputs, generator=chance) @ mix
    return torch.randn(inputs, outputs, generator=chance), x.t() @ x / tokens


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_pack_and_unpack_are_inverse(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (96, 5), dtype=torch.uint8)
    packed = gptq.pack(codes, bits)
    assert packed.shape == (96 * bits // 32, 5) and packed.dtype == torch.int32
    assert torch.equal(unpack_gptq(packed, bits), codes)


def test_packed_word_is_lowest_first() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None]
    assert gptq.pack(codes, 4).item() == 0x76543210
    three = torch.tensor([5, 1, 7] + [0] * 7 + [6] + [0] * 21, dtype=torch.uint8)[:, None]
    words = gptq.pack(three, 3)[:, 0].tolist()
    # The eleventh value, 6 = 0b110, has its two low bits in the first word and its high bit in the second.
    assert words[0] & 0xFFFFFFFF == 5 | 1 << 3 | 7 << 6 | 0b10 << 30
    assert words[1:] == [1, 0]


def test_whole_range_of_scales_is_searched() -> None:
    """A single outlier in an unimportant channel must not set the scale of the group."""
    weight, gram = torch.randn(64, 3), torch.eye(64)
    weight[7] = 40.0
    gram[7, 7] = 1e-6
    grid = rounding.search_grid(weight, gram, 64, 4, symmetric=True)
    assert float(grid.scale.max()) < 40 / 8 * 0.65


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_grid_beats_the_plain_range(symmetric: bool) -> None:
    weight, gram = problem()
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=symmetric, blocks=True)
    _, error = rounding.nearest(weight, grid)
    table = weight.view(3, 32, -1)
    if symmetric:
        scale, zero = rounding.as_half(table.abs().amax(1) / 7.5), torch.full((3, 40), 8.0)
    else:
        low, high = table.amin(1).clamp(max=0), table.amax(1).clamp(min=0)
        scale = rounding.as_half((high - low) / 15)
        zero = (-low / scale).round().clamp(1, 15)
    _, plain = rounding.nearest(weight, rounding.Grid(scale, zero, 4))
    assert rounding.quadratic(error, gram).sum() < 0.9 * rounding.quadratic(plain, gram).sum()
    assert torch.equal(grid.scale.half().float(), grid.scale)
    assert grid.zero.min() >= 1 and grid.zero.max() <= 15


def reference_gptq(weight, gram, grid, group_of, order, damping):
    """The published form: errors spread through the upper Cholesky factor of the inverse, in float64."""
    w = weight[order].double().clone()
    h = gram[order][:, order].double()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty_like(w)
    for k in range(len(w)):
        row = int(group_of[order[k]])
        scale, zero = grid.scale[row].double(), grid.zero[row].double()
        codes[k] = (w[k] / scale + zero).round().clamp(0, 2**grid.bits - 1)
        error = (w[k] - (codes[k] - zero) * scale) / upper[k, k]
        w[k + 1 :] -= upper[k, k + 1 :, None] * error[None]
    back = torch.empty_like(codes)
    back[order] = codes
    return back.to(torch.uint8)


def test_feedback_is_gptqs() -> None:
    """Equal but for values that lie on a rounding boundary in one arithmetic and not the other."""
    weight, gram = problem(inputs=288, outputs=64, tokens=2000)
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=True)
    group_of = torch.arange(288) // 32
    order = rounding.group_aware_order(gram.diagonal(), 32)
    ours = rounding.compensate(weight, gram, grid, group_of, order, 0.01).codes
    theirs = reference_gptq(weight, gram, grid, group_of, order, 0.01)
    assert (ours != theirs).float().mean() < 2e-3


def test_reported_error_is_the_error() -> None:
    weight, gram = problem()
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=False)
    group_of, order = torch.arange(96) // 32, rounding.group_aware_order(gram.diagonal(), 32)
    made = rounding.compensate(weight, gram, grid, group_of, order, 0.01)
    value = (made.codes.float() - grid.zero[group_of]) * grid.scale[group_of]
    error = (weight - value).double()
    exact = ((gram.double() @ error) * error).sum(0)
    torch.testing.assert_close(made.error.double(), exact, rtol=2e-3, atol=1e-5)
    _, plain = rounding.nearest(weight, grid)
    assert exact.sum() < 0.7 * rounding.quadratic(plain, gram).sum()


def test_group_aware_order_keeps_groups_together() -> None:
    order = rounding.group_aware_order(torch.tensor([1.0, 2, 9, 3, 8, 5, 0, 4]), 4)
    assert order.tolist() == [2, 3, 1, 0, 4, 5, 7, 6]


def test_singular_gram_raises_its_damping() -> None:
    weight, _ = problem(inputs=64)
    x = torch.randn(1, 64)
    gram = x.t() @ x
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=True)
    made = rounding.compensate(weight, gram, grid, torch.arange(64) // 32, torch.arange(64), 0.0)
    assert made.damping > 0
    assert torch.isfinite(made.error).all()


def test_what_no_damping_mends_names_the_layer() -> None:
    """Opposite infinities of two channels, say: no Gram matrix of finite inputs looks so."""
    weight, _ = problem(inputs=64)
    gram = torch.eye(64)
    gram[3, 5] = gram[5, 3] = 1e4
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=True)
    with pytest.raises(
        UserError, match="layer 7 mlp.down_proj: the Gram matrix cannot be factored even with damping 1"
    ):
        rounding.compensate(weight, gram, grid, torch.arange(64) // 32, torch.arange(64), 0.01, "layer 7 mlp.down_proj")


def test_dead_inputs_leave_finite_scales() -> None:
    weight, gram = problem()
    weight[64:] = 0
    gram[64:], gram[:, 64:] = 0, 0
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=True)
    assert torch.equal(grid.scale[2], torch.ones(40))
    assert (grid.scale.half() > 0).all()
    order = rounding.group_aware_order(gram.diagonal(), 32)
    made = rounding.compensate(weight, gram, grid, torch.arange(96) // 32, order, 0.01)
    assert (made.codes[64:] == 8).all() and torch.isfinite(made.error).all()


def test_all_dead_inputs_are_still_rounded() -> None:
    weight = torch.randn(32, 8)
    gram = torch.zeros(32, 32)
    grid = rounding.search_grid(weight, gram, 32, 4, symmetric=True)
    made = rounding.compensate(weight, gram, grid, torch.zeros(32, dtype=torch.int64), torch.arange(32), 0.01)
    value = (made.codes.float() - 8) * grid.scale
    assert (weight - value).abs().max() < weight.abs().max() / 2


def test_quadratic_reads_the_upper_half_only() -> None:
    weight, gram = problem(inputs=600, outputs=7, tokens=700)
    exact = ((gram.double() @ weight.double()) * weight.double()).sum(0)
    half = gram.clone()
    half[512:, :256] = float("nan")
    torch.testing.assert_close(rounding.quadratic(weight, half).double(), exact, rtol=1e-4, atol=1e-3)


def test_names_and_limits() -> None:
    assert gptq.default_name(gptq.Options()) == "gptq-4bit-g128"
    assert gptq.default_name(gptq.Options(bits=3, sym=False, desc_act=True)) == "gptq-3bit-g128-asym-act-order"
    assert gptq.limits(gptq.Options()) == {}
    assert "vllm" in gptq.limits(gptq.Options(bits=3))
    assert gptq.limits(gptq.Options(sym=False)).keys() == {"vllm"}
    assert gptq.limits(gptq.Options(bits=8, sym=False)).keys() == {"vllm", "llamacpp"}
    assert "desc_act" in gptq.limits(gptq.Options(desc_act=True))["vllm"]
    assert gptq.limits(gptq.Options(desc_act=True, group_size=-1)) == {}


@pytest.mark.parametrize("size", [0, -2, 24, 100])
def test_impossible_group_sizes_are_refused(size: int) -> None:
    with pytest.raises(UserError, match="group_size"):
        gptq.check(gptq.Options(group_size=size))


@pytest.mark.parametrize("options", [{"bits": 3}, {"sym": False}, {"desc_act": True}])
def test_what_an_engine_cannot_load_is_said_when_the_recipe_is_read(options: dict[str, object]) -> None:
    """Of the engines that the recipe asks for; the variant is made for the others."""
    source = {"text": "x"}
    recipe = {
        "base": {"path": "models/base"},
        "variants": [{"gptq": options}],
        "calibration": {"source": source},
        "backends": ["vllm", "transformers"],
    }
    (warning,) = parse(recipe, Path("r.yaml")).warnings
    assert " will not run on vllm: vLLM " in warning
    assert parse(recipe | {"backends": ["transformers"]}, Path("r.yaml")).warnings == ()
