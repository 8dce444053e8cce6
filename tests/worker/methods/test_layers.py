"""Whole layers: folding changes nothing, and the share that is told to be lost is the share that is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.worker.layers import layer_of
from tests.worker.unpacking import dequantize_awq, dequantize_gptq, unpack_awq, unpack_gptq
from workbench.worker.layers import Group, Producer
from workbench.worker.methods import awq, gptq

torch = pytest.importorskip("torch")


def share_lost(made: Any, wanted: Any, gram: Any) -> float:
    """tr(E G E^T) / tr(W G W^T), of [out, in] in float64."""
    left, wanted, gram = (wanted - made).double(), wanted.double(), gram.double()
    return float(((left @ gram) * left).sum() / ((wanted @ gram) * wanted).sum())


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_awq_tells_the_share_that_each_layer_loses(kind: str) -> None:
    """Of what is stored: columns multiplied by their scales, rows divided by those of what they feed."""
    layer, options = layer_of(kind), awq.Options(group_size=32)
    made, errors, _ = awq.quantize(layer, options)
    folds = {group.linears: awq._scales(layer, group, options) for group in layer.structure.groups}
    assert sum(scales is not None for scales in folds.values()) >= 3
    folded = dict(layer.tensors)
    for group in layer.structure.groups:
        if folds[group.linears] is not None:
            awq.fold(folded, group, folds[group.linears])
    for group in layer.structure.groups:
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
        awq.fold(after, Group(("q",), producer), scales)
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
    awq.fold(after, Group(("o",), producer), scales)

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
    scales = awq._scales(layer, layer.structure.groups[0], options)
    torch.testing.assert_close(made["self_attn.k_proj.weight"], layer.tensors["self_attn.k_proj.weight"] * scales)
    assert torch.equal(made["mlp.down_proj.weight"], layer.tensors["mlp.down_proj.weight"])
    # The rows of the up projection are not divided for it.
    into = awq._scales(layer, layer.structure.groups[2], options)
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
    assert warnings == [] and set(errors) == {f"{name}.weight" for name in layer.structure.linears}
    for group in layer.structure.groups:
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
