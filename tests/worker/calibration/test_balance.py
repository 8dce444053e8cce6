"""Channels beyond float16 are brought into its range by powers of two, and what a layer computes stays to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.worker.layers import layer_of
from workbench.worker.calibration.balance import balanced
from workbench.worker.layers import Layer

torch = pytest.importorskip("torch")

UP, DOWN, NORM = "mlp.up_proj.weight", "mlp.down_proj.weight", "post_attention_layernorm.weight"


def products(layer: Layer) -> Any:
    """Of the first column of what reads the up-projection with its rows: what both compute together."""
    return layer.tensors[DOWN].double()[:, :, None] * layer.tensors[UP].double()[None]


def changed(layer: Layer) -> set[str]:
    after = balanced(layer)
    return {name for name in layer.tensors if after.tensors[name] is not layer.tensors[name]}


def test_what_float16_holds_is_left_as_it_is() -> None:
    layer = layer_of()
    assert balanced(layer) is layer


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_tiny_projection_and_the_large_one_that_reads_it_meet_half_way(kind: str) -> None:
    layer = layer_of(kind)
    layer.tensors[UP] *= 1e-8
    layer.tensors[DOWN] *= 1e6
    layer.tensors[UP][5] = 0.0
    layer.shared["stacked"] = "of the weights before"
    after = balanced(layer)
    assert torch.equal(products(after), products(layer)) and after.shared == {}
    scales = (after.tensors[DOWN] / layer.tensors[DOWN])[0]
    rows = layer.tensors[UP].abs().amax(1).tolist()
    columns = layer.tensors[DOWN].abs().amax(0).tolist()
    assert scales.tolist() == [
        2.0 ** round(math.log2(row / column) / 2) if row else 1.0 for row, column in zip(rows, columns, strict=True)
    ]
    assert torch.equal(after.tensors["mlp.up_proj.bias"], layer.tensors["mlp.up_proj.bias"] / scales)
    # Of the inputs that a channel has then, which are as much larger.
    first = "mlp.down_proj"
    torch.testing.assert_close(after.grams[first], layer.grams[first] / scales / scales[:, None])
    assert {name for name in layer.grams if after.grams[name] is not layer.grams[name]} == {first}
    assert layer.tensors[DOWN].abs().max() > 1e6, "the layer that was given stays as it was"


def test_heads_that_share_values_share_a_factor() -> None:
    layer = layer_of()
    layer.tensors["self_attn.v_proj.weight"] *= 1e-7
    layer.tensors["self_attn.o_proj.weight"] *= 1e6
    after = balanced(layer)
    scales = (after.tensors["self_attn.o_proj.weight"] / layer.tensors["self_attn.o_proj.weight"])[0].view(2, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])
    values = layer.tensors["self_attn.v_proj.weight"] / after.tensors["self_attn.v_proj.weight"]
    assert torch.equal(values[:, 0].view(2, 16), scales[:, 0])
    columns = layer.tensors["self_attn.o_proj.weight"].abs().amax(0).view(2, 2, 16).amax(1)
    sizes = layer.tensors["self_attn.v_proj.weight"].abs().amax(1).view(2, 16)
    assert torch.equal(scales[:, 0], (sizes / columns).log2().div(2).round().exp2())


def test_a_norm_is_brought_into_range_too() -> None:
    layer = layer_of()
    layer.tensors[NORM] *= 1e-6
    assert changed(layer) == {NORM, "mlp.gate_proj.weight", UP}
    plus = layer_of("gemma2")
    plus.tensors["pre_feedforward_layernorm.weight"] *= 1e-6
    assert changed(plus) == set(), "one more than nearly nothing is one"
    plus.tensors["pre_feedforward_layernorm.weight"] += 1e6
    assert changed(plus) != set()


@pytest.mark.parametrize(
    ("made", "read", "moved"),
    [
        (2.0**-14, 1.0, False),
        (2.0**-14 * 0.99, 1.0, True),
        (1.0, 2.0**-11, False),
        (1.0, 2.0**-11 * 0.99, True),
        (65504.0, 1.0, False),
        (65540.0, 1.0, True),
        (1.0, 65540.0, True),
    ],
)
def test_the_ends_of_float16(made: float, read: float, moved: bool) -> None:
    """Of its normal numbers; of 16 levels eight lie on either side of zero, so weights end eight times higher."""
    layer = layer_of()
    layer.tensors[UP] = torch.full_like(layer.tensors[UP], made)
    layer.tensors[DOWN] = torch.full_like(layer.tensors[DOWN], read)
    assert bool(changed(layer)) == moved


def test_a_channel_that_is_hardly_felt_moves_nothing() -> None:
    for part, moved in ((0.009, False), (0.02, True)):
        layer = layer_of()
        layer.tensors[UP] = torch.ones_like(layer.tensors[UP])
        layer.tensors[DOWN] = torch.ones_like(layer.tensors[DOWN])
        layer.tensors[UP][3] = 2.0**-20
        layer.tensors[DOWN][:, 3] = 2.0**20 * part
        # That alone is beyond float16 on either side.
        assert (DOWN in changed(layer)) == moved


def test_queries_and_keys_meet_half_way_unless_they_are_normed() -> None:
    names = [f"self_attn.{each}_proj.{part}" for each in "qk" for part in ("weight", "bias")]
    layer, normed, fused = layer_of(), layer_of("qwen3"), layer_of("phi3")
    for one in (layer, normed):
        for name, by in zip(names, (1e-8, 1e-8, 1e3, 1e3), strict=True):
            one.tensors[name] *= by
    after = balanced(layer)
    query, bias, key, other = (after.tensors[name] / layer.tensors[name] for name in names)
    sizes = [float(layer.tensors[f"self_attn.{each}_proj.weight"].abs().max()) for each in "qk"]
    factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    assert (
        (query == factor).all() and (bias == factor).all() and (key == 1 / factor).all() and (other == 1 / factor).all()
    )
    assert balanced(normed) is normed and balanced(fused) is fused


@pytest.mark.parametrize(
    ("query", "key", "moved"),
    [
        (2.0**-11, 1.0, False),
        (2.0**-11 * 0.99, 1.0, True),
        (1.0, 65504.0, False),
        (1.0, 65540.0, True),
        (0.0, 1e6, False),
    ],
)
def test_the_ends_of_float16_for_queries_and_keys(query: float, key: float, moved: bool) -> None:
    layer = layer_of()
    for each, size in (("q", query), ("k", key)):
        tensor = layer.tensors[f"self_attn.{each}_proj.weight"]
        layer.tensors[f"self_attn.{each}_proj.weight"] = torch.full_like(tensor, size)
    assert ("self_attn.q_proj.bias" in changed(layer)) == moved
