"""AWQ's scales, the grids and the reported errors against their definitions, in float64 and one column at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.worker.unpacking import dequantize_awq, dequantize_gptq, unpack_awq, unpack_gptq
from workbench.errors import UserError
from workbench.shape import NamedShape, Shape, Traits
from workbench.worker.architectures import Group, Layer, Producer, describe
from workbench.worker.methods import awq, gptq, grouped, rounding

torch = pytest.importorskip("torch")

NORM = Producer("norm", "norm")
SHARED = Producer("v", "linear", repeats=2, head_dim=8)


def problem(inputs: int, outputs: int, seed: int, tokens: int = 300) -> tuple[Any, Any]:
    """Correlated inputs of very different sizes, as activations are: (weight [in, out], gram)."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=chance) * torch.logspace(-1.5, 0.5, inputs)
    x = torch.randn(tokens, inputs, generator=chance) @ mix
    return torch.randn(inputs, outputs, generator=chance), x.t() @ x / tokens


def half(values: Any) -> Any:
    """As float16 stores it, within its normal numbers."""
    return np.clip(values, 2.0**-14, 65504).astype(np.float16).astype(np.float64)


def plain_error(weight: Any, size: int, zero_point: bool) -> Any:
    """W - Q(W) over each group's whole range in four bits."""
    left = np.empty_like(weight)
    for start in range(0, len(weight), size):
        part = weight[start : start + size]
        if zero_point:
            low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
            scale = half((high - low) / 15)
            zero = np.clip(np.round(-low / scale), 0, 15)
        else:
            scale, zero = half(np.abs(part).max(0) / 7.5), 8
        left[start : start + size] = part - (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
    return left


def best_scales(weight: Any, gram: Any, size: int, zero_point: bool, repeats: int, head_dim: int) -> Any:
    """importance^a / size^(1 - a) of the exponent that loses the least, if that is less than without scales.

    Of the twenty exponents every second one, then the neighbours of the best.
    """
    weight, gram = weight.double().numpy(), gram.double().numpy()

    def over_heads(values: Any) -> Any:
        table = values.reshape(-1, repeats, head_dim)
        return np.broadcast_to(table.mean(1, keepdims=True), table.shape).reshape(-1)

    importance = np.sqrt(over_heads(np.diag(gram)))
    table = np.abs(weight).reshape(-1, size, weight.shape[1])
    beside = np.sqrt(((table / table.max(1, keepdims=True)) ** 2).mean(2)).reshape(-1)
    beside = over_heads(np.maximum(beside, 1e-4))
    sample = weight[:, :: max(1, weight.shape[1] // 384)]
    tried = {}
    for step in [*range(20), None]:
        scales = np.ones(len(weight))
        if step is not None:
            scales = importance ** (step / 20) / beside ** (1 - step / 20)
            scales = np.clip(scales / np.sqrt(scales.max() * scales.min()), 1 / 256, 256)
        left = plain_error(sample * scales[:, None], size, zero_point) / scales[:, None]
        tried[step] = float(np.einsum("io,ij,jo", left, gram, left)), step, scales
    best = min(range(0, 20, 2), key=lambda step: tried[step][0])
    near = [tried[step] for step in (best, best - 1, best + 1) if 0 <= step < 20]
    return min([*near, tried[None]], key=lambda each: each[0])


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("producer", [NORM, SHARED])
def test_awqs_scales_are_the_best_of_all_exponents(producer: Producer, zero_point: bool) -> None:
    steps = set()
    for seed, outputs in enumerate((24, 24, 24, 800)):
        weight, gram = problem(64, outputs, seed)
        weight *= torch.logspace(-1, seed / 2, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))][
            :, None
        ]
        options = awq.Options(group_size=16, zero_point=zero_point)
        _, step, scales = best_scales(weight, gram, 16, zero_point, producer.repeats, producer.head_dim)
        found = awq.search_scales(weight, gram, 16, options, producer)
        steps.add(step)
        np.testing.assert_allclose(found.numpy(), scales, rtol=1e-4)
    assert len(steps) > 2, "or one exponent would do"


def test_rounding_over_the_whole_range() -> None:
    weight, _ = problem(64, 20, 3)
    weight[:16] = weight[:16].abs()  # a group without a negative weight
    for zero_point in (True, False):
        found = awq._rounding_error(weight.clone(), 16, awq.Options(group_size=16, zero_point=zero_point))
        np.testing.assert_allclose(found.numpy(), plain_error(weight.double().numpy(), 16, zero_point), atol=2e-6)


def test_scales_stay_within_a_power_of_two_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert awq.LARGEST_SCALE == 256
    monkeypatch.setattr(awq, "LARGEST_SCALE", 2.0)
    weight, gram = problem(64, 24, 1)
    scales = awq.search_scales(weight, gram, 16, awq.Options(group_size=16), NORM)
    assert (float(scales.min()), float(scales.max())) == (0.5, 2.0)


def test_where_no_scales_are_better_there_are_none() -> None:
    """Weights on the grid already: any scale would move them off it."""
    codes = torch.arange(16.0).repeat(4)[:, None].repeat(1, 8)
    assert awq.search_scales(codes, torch.diag(torch.logspace(-2, 2, 64)), 16, awq.Options(group_size=16), NORM) is None


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


def test_the_factor_gives_the_damped_matrix_back() -> None:
    _, gram = problem(24, 1, 7)
    gram[5], gram[:, 5] = 0, 0
    upper, spread, damping = rounding._factor(gram.clone(), 0.03, "here")
    mean = float(gram.diagonal().sum()) / 23
    damped = gram.double() + 0.03 * mean * torch.eye(24, dtype=torch.float64)
    damped[5, 5] = mean
    unit = upper.double()
    assert damping == 0.03 and float(spread[5]) == 0.0
    spread = spread.double()
    spread[5] = mean
    torch.testing.assert_close(unit @ torch.diag(spread) @ unit.t(), damped, rtol=1e-4, atol=1e-5)
    assert torch.equal(upper.diagonal(), torch.ones(24)) and not upper.tril(-1).any()
    # A matrix of one input's products takes ten times as much until it can be factored, from 1e-4 on.
    x = torch.randn(1, 24, generator=torch.Generator().manual_seed(0))
    assert rounding._factor(x.t() @ x - 1e-3 * torch.eye(24), 0.0, "here")[2] in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    assert rounding._factor(torch.eye(4) - 0.05 * torch.ones(4, 4) * 5, 0.02, "here")[2] == 0.02
    tight = torch.eye(8) + 1.5 * (torch.ones(8, 8) - torch.eye(8))  # its least eigenvalue is -0.5
    assert rounding._factor(tight, 0.06, "here")[2] == pytest.approx(0.6)


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


# --- whole layers ---------------------------------------------------------------------------------


def layer_of(kind: str = "llama", seed: int = 0) -> Layer:
    """A random decoder layer of 64 channels, with biases, and Grams of inputs that differ in size a hundredfold."""
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    architecture = describe(config)
    axes = architecture.sizes.axes
    chance = torch.Generator().manual_seed(seed)
    tensors, grams = {}, {}
    for name, linear in architecture.family.linears.items():
        tensors[f"{name}.weight"] = torch.randn(axes[linear.rows], axes[linear.columns], generator=chance)
        tensors[f"{name}.bias"] = torch.randn(axes[linear.rows], generator=chance)
    for group in architecture.groups:
        inputs = tensors[f"{group.linears[0]}.weight"].shape[1]
        sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=chance)]
        x = torch.randn(400, inputs, generator=chance) * sizes
        grams[group.linears[0]] = x.t() @ x / 400
        if group.producer.kind == "norm":
            tensors[f"{group.producer.module}.weight"] = torch.rand(inputs, generator=chance) + 0.5
    return Layer(0, tensors, grams, architecture)


def share_lost(made: Any, wanted: Any, gram: Any) -> float:
    """tr(E G E^T) / tr(W G W^T), of [out, in] in float64."""
    left, wanted, gram = (wanted - made).double(), wanted.double(), gram.double()
    return float(((left @ gram) * left).sum() / ((wanted @ gram) * wanted).sum())


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_awq_tells_the_share_that_each_layer_loses(kind: str) -> None:
    """Of what is stored: columns multiplied by their scales, rows divided by those of what they feed."""
    layer, options = layer_of(kind), awq.Options(group_size=32)
    made, errors, _ = awq.quantize(layer, options)
    folds = {group.linears: awq._scales(layer, group, options) for group in layer.architecture.groups}
    assert sum(scales is not None for scales in folds.values()) >= 3
    folded = dict(layer.tensors)
    for group in layer.architecture.groups:
        if folds[group.linears] is not None:
            awq._fold(folded, group, folds[group.linears])
    for group in layer.architecture.groups:
        scales = folds[group.linears]
        gram = layer.grams[group.linears[0]]
        gram = gram if scales is None else gram / scales[:, None] / scales
        for name in group.linears:
            stored = dequantize_awq({part: made[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")})
            assert errors[f"{name}.weight"] == pytest.approx(
                share_lost(stored, folded[f"{name}.weight"], gram), rel=1e-3
            )
            assert torch.equal(made[f"{name}.bias"], folded[f"{name}.bias"])


def output(tensors: Any, name: str, x: Any) -> Any:
    return x @ tensors[f"{name}.weight"].t() + tensors.get(f"{name}.bias", 0)


def test_folding_leaves_what_a_layer_computes() -> None:
    """Into a norm, into one that multiplies by one more than its weight, and into rows of a linear layer."""
    chance = torch.Generator().manual_seed(2)
    x, scales = torch.randn(5, 8, generator=chance), torch.rand(8, generator=chance) + 0.3
    for plus in (True, False):
        producer = Producer("norm", "norm", one_plus=plus)
        before = {"norm.weight": torch.rand(8, generator=chance), "q.weight": torch.randn(4, 8, generator=chance)}
        after = dict(before)
        awq._fold(after, Group(("q",), producer), scales)
        one, two = (output(t, "q", x * (t["norm.weight"] + plus)) for t in (before, after))
        torch.testing.assert_close(one, two)
        assert not torch.equal(before["q.weight"], after["q.weight"])
    # Two query heads of two channels share each value head; the values are rows 3 to 6 of a fused matrix.
    producer = Producer("qkv", "linear", rows=(3, 7), repeats=2, head_dim=2)
    shared = torch.rand(2, 2, generator=chance) + 0.3
    scales = shared[:, None].expand(2, 2, 2).reshape(8)
    before = {
        "qkv.weight": torch.randn(9, 8, generator=chance),
        "qkv.bias": torch.randn(9, generator=chance),
        "o.weight": torch.randn(4, 8, generator=chance),
    }
    after = dict(before)
    awq._fold(after, Group(("o",), producer), scales)

    def attended(tensors: Any) -> Any:
        values = output(tensors, "qkv", x)[:, 3:7].view(5, 2, 1, 2).expand(5, 2, 2, 2).reshape(5, 8)
        return output(tensors, "o", values)

    torch.testing.assert_close(attended(before), attended(after))
    for rows in (slice(0, 3), slice(7, 9)):
        assert torch.equal(before["qkv.weight"][rows], after["qkv.weight"][rows])
        assert torch.equal(before["qkv.bias"][rows], after["qkv.bias"][rows])


def test_what_stays_unconverted_is_folded_and_not_packed() -> None:
    """A group that is left out whole gets no scales; one that is left out in part stays beside the others."""
    layer = layer_of()
    options = awq.Options(group_size=32, modules_to_not_convert=("k_proj", "mlp.down_proj"))
    made, errors, _ = awq.quantize(layer, options)
    assert set(errors) == {
        f"{name}.weight"
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    scales = awq._scales(layer, layer.architecture.groups[0], options)
    torch.testing.assert_close(made["self_attn.k_proj.weight"], layer.tensors["self_attn.k_proj.weight"] * scales)
    assert torch.equal(made["mlp.down_proj.weight"], layer.tensors["mlp.down_proj.weight"])
    # The rows of the up projection are not divided for it.
    into = awq._scales(layer, layer.architecture.groups[2], options)
    rows = dequantize_awq({part: made[f"mlp.up_proj.{part}"] for part in ("qweight", "qzeros", "scales")}) / into
    wanted = layer.tensors["mlp.up_proj.weight"]
    assert float((rows - wanted).norm() / wanted.norm()) < 0.2


def test_symmetric_awq_and_rows_without_groups() -> None:
    layer = layer_of(seed=3)
    made, _, _ = awq.quantize(layer, awq.Options(group_size=32, zero_point=False))
    assert (unpack_awq(made["mlp.down_proj.qzeros"]) == 8).all()
    made, errors, _ = awq.quantize(layer, awq.Options(group_size=-1))
    assert made["mlp.down_proj.scales"].shape == (1, 64) and made["mlp.down_proj.qzeros"].shape == (1, 8)
    assert made["mlp.down_proj.scales"].dtype == torch.float16
    assert max(errors.values()) < 0.1


def test_awq_tells_of_a_singular_matrix() -> None:
    layer = layer_of()
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    layer.grams["mlp.down_proj"] = x.t() @ x
    options = awq.Options(group_size=32, rounding="compensated", damping=0.0)
    _, _, warnings = awq.quantize(layer, options)
    (warning,) = (each for each in warnings if "down_proj" in each)
    assert warning.startswith("layer 0 mlp.down_proj: the Gram matrix is singular; damping raised to ")
    assert awq.quantize(layer_of(), replace(options, damping=0.01))[2] == []


GPTQ = [{}, {"sym": False}, {"desc_act": True}, {"bits": 3}, {"order": "natural"}, {"group_size": -1}]


@pytest.mark.parametrize("changes", GPTQ, ids=str)
def test_gptq_tells_the_share_that_each_layer_loses(changes: dict[str, Any]) -> None:
    layer, options = layer_of(), replace(gptq.Options(group_size=32), **changes)
    made, errors, warnings = gptq.quantize(layer, options)
    assert warnings == [] and set(errors) == {f"{name}.weight" for name in layer.architecture.linears}
    for group in layer.architecture.groups:
        gram = layer.grams[group.linears[0]]
        for name in group.linears:
            parts = {part: made[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            wanted = layer.tensors[f"{name}.weight"]
            stored = dequantize_gptq(parts, options.bits)
            assert errors[f"{name}.weight"] == pytest.approx(share_lost(stored, wanted, gram), rel=0.01)
            assert torch.equal(made[f"{name}.bias"], layer.tensors[f"{name}.bias"])
            for part, (dtype, shape) in gptq.stored(options, name, *wanted.shape).items():
                assert tuple(parts[part].shape) == shape
                assert parts[part].dtype == {"I32": torch.int32, "F16": torch.float16}[dtype]
            inputs = wanted.shape[1]
            size = inputs if options.group_size == -1 else options.group_size
            if options.desc_act:
                # Act-order's groups are runs of the sorted columns.
                place = gram.diagonal().argsort(descending=True).argsort()
                assert torch.equal(parts["g_idx"], (place // size).int())
            else:
                assert parts["g_idx"].tolist() == [column // size for column in range(inputs)]
            if options.sym:
                zeros = unpack_gptq(parts["qzeros"].t().contiguous(), options.bits)
                assert (zeros == 2 ** (options.bits - 1) - 1).all(), "stored less one"


def test_gptq_rounds_in_the_order_that_was_asked_for() -> None:
    gram = torch.diag(torch.tensor([1.0, 5, 3, 2, 9, 4, 8, 7]))
    orders = {
        "natural": [0, 1, 2, 3, 4, 5, 6, 7],
        "group-aware": [4, 6, 7, 5, 1, 2, 3, 0],
    }
    for name, order in orders.items():
        assert gptq.column_order(gram, 4, gptq.Options(order=name)).tolist() == order  # type: ignore[arg-type]
    assert gptq.column_order(gram, 4, gptq.Options(desc_act=True)).tolist() == [4, 6, 7, 1, 5, 2, 3, 0]


def test_gptq_tells_of_a_singular_matrix() -> None:
    layer = layer_of()
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    layer.grams["mlp.down_proj"] = x.t() @ x
    _, _, warnings = gptq.quantize(layer, gptq.Options(group_size=32, damping=0.0))
    assert len(warnings) == 1 and warnings[0].startswith("layer 0 mlp.down_proj: the Gram matrix is singular")


def test_what_configurations_say() -> None:
    assert awq.quantization_config(awq.Options()) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert awq.quantization_config(awq.Options(modules_to_not_convert=("a",)))["modules_to_not_convert"] == ["a"]
    config = gptq.quantization_config(gptq.Options())
    assert config["meta"] == {"damp_percent": 0.01, "act_group_aware": True} and config["lm_head"] is False
    for options in (gptq.Options(desc_act=True), gptq.Options(order="natural")):
        assert gptq.quantization_config(options)["meta"] == {"damp_percent": 0.01, "act_group_aware": False}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (awq.Options(group_size=-1, zero_point=False), "awq-4bit-row-sym"),
        (awq.Options(engine="gptqmodel"), "awq-4bit-g128-gptqmodel"),
        (gptq.Options(group_size=-1, order="natural"), "gptq-4bit-row-natural"),
        (gptq.Options(order="natural", desc_act=True), "gptq-4bit-g128-act-order"),
        (gptq.Options(bits=8, engine="gptqmodel"), "gptq-8bit-g128-gptqmodel"),
    ],
)
def test_names_have_what_differs(options: Any, name: str) -> None:
    method = awq if isinstance(options, awq.Options) else gptq
    assert method.default_name(options) == name
    assert grouped.tensor_type(options) == f"I{options.bits}-" + ("row" if options.group_size == -1 else "g128")


def test_whole_words_only() -> None:
    assert gptq.pack(torch.zeros(32, 1, dtype=torch.uint8), 3).shape == (3, 1)
    with pytest.raises(ValueError, match="20 codes of 3 bits"):
        gptq.pack(torch.zeros(20, 1, dtype=torch.uint8), 3)
    # A code above its bits loses what does not fit, and the last word's high bit is a sign.
    assert gptq.pack(torch.tensor([[19]] + [[0]] * 6 + [[15]], dtype=torch.uint8), 4).item() == 3 - (1 << 28)


def test_what_a_layers_shape_must_be() -> None:
    for rows, columns, bits in ((8, 32, 4), (32, 64, 3), (16, 32, 2), (4, 32, 8)):
        grouped.check_linear(gptq.Options(bits=bits, group_size=32), "here", rows, columns, [])  # type: ignore[arg-type]
    grouped.check_linear(gptq.Options(group_size=-1), "here", 8, 72, [])
    with pytest.raises(UserError, match="^here: group_size 32 does not divide its 48 inputs; take 16 or -1$"):
        grouped.check_linear(gptq.Options(group_size=32), "here", 8, 48, ["16"])
    with pytest.raises(UserError, match=r"48 inputs; take -1 \(whole rows\)$"):
        grouped.check_linear(gptq.Options(group_size=32), "here", 8, 48, [])
    for rows, columns in ((12, 32), (8, 36)):
        with pytest.raises(UserError, match="^here: 4 bits are stored 8 at a time"):
            grouped.check_linear(gptq.Options(group_size=-1), "here", rows, columns, [])
    assert grouped.group_sizes([96, 64]) == [16, 32] and grouped.group_sizes([1024]) == [16, 32, 64, 128, 256, 512]


def test_the_bytes_of_a_checkpoint_by_hand() -> None:
    """Two matrices of a layer, an embedding and a norm in 16 bits; names of no layer are not packed."""
    shape = Shape(
        (
            NamedShape("token_embd.weight", (100, 64)),
            NamedShape("blk.0.attn_q.weight", (64, 64)),
            NamedShape("blk.0.ffn_down.weight", (64, 128)),
            NamedShape("blk.0.attn_norm.weight", (64,)),
            NamedShape("blk.0.attn_q.bias", (64,)),
            NamedShape("blk.0.other.weight", (8, 40)),
        ),
        Traits(1, 4, 2),
        64,
        16,
        128,
        100,
        0,
        "float16",
    )
    plain = 2 * (100 * 64 + 64 + 64 + 8 * 40)
    packed = sum(
        rows * columns // 2 + columns // 32 * (rows // 2 + 2 * rows) for rows, columns in ((64, 64), (64, 128))
    )
    assert awq.sizes(shape, awq.Options(group_size=32), "awq").disk_bytes == plain + packed
    assert gptq.sizes(shape, gptq.Options(group_size=32), "gptq").disk_bytes == plain + packed + 4 * (64 + 128)
    left = awq.sizes(shape, awq.Options(group_size=32, modules_to_not_convert=("layers.0.self_attn",)), "awq")
    assert left.disk_bytes == plain + 2 * 64 * 64 + 64 * 128 // 2 + 4 * (32 + 128)
    assert left.refused is awq.sizes(shape, awq.Options(group_size=64), "awq").refused is None
    assert awq.sizes(shape, awq.Options(), "awq").refused == (
        "group_size 128 does not divide the inputs of every layer; take 16 or 32 or 64 or -1"
    )


def test_how_each_is_made() -> None:
    ours, theirs = (grouped.making("awq", awq.Options(engine=engine)) for engine in ("workbench", "gptqmodel"))  # type: ignore[arg-type]
    assert (ours.stage, ours.calibration) == ("pass", "tokens") and theirs.stage == "base"
    assert theirs.arguments == {"method": "awq"} and theirs.python == "gptqmodel"
