"""AWQ's layout, its scales, and that folding leaves a layer's function alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.worker.unpacking import dequantize_awq, unpack_awq
from workbench.errors import UserError
from workbench.recipe.load import parse
from workbench.worker.calibration.discover import structures_of
from workbench.worker.layers import Group, Layer, Producer, Structure
from workbench.worker.methods import awq, rounding

torch = pytest.importorskip("torch")

NORM = Producer("norm", "norm")


def layer_of(kind: str = "llama", seed: int = 0, **more) -> Layer:
    """A random decoder layer of 64 channels with Grams of inputs that differ in size a hundredfold."""
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **more,
    }
    (structure,) = structures_of(config | {"head_dim": 16})
    chance = torch.Generator().manual_seed(seed)
    rows = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.qkv_proj": (128, 64),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.gate_up_proj": (256, 64),
        "mlp.down_proj": (64, 128),
    }
    tensors = {f"{name}.weight": torch.randn(*rows[name], generator=chance) for name in structure.linears}
    grams = {}
    for group in structure.groups:
        inputs = rows[group.linears[0]][1]
        x = (
            torch.randn(800, inputs, generator=chance)
            * torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=chance)]
        )
        grams[group.linears[0]] = x.t() @ x / 800
        if group.producer and group.producer.kind == "norm":
            tensors[f"{group.producer.module}.weight"] = torch.rand(inputs, generator=chance) + 0.5
    return Layer(0, tensors, grams, structure)


def test_pack_and_unpack_are_inverse_in_autoawqs_order() -> None:
    codes = torch.randint(0, 16, (6, 32), dtype=torch.uint8)
    assert torch.equal(unpack_awq(awq.pack(codes)), codes)
    one = torch.arange(8, dtype=torch.uint8)[None]
    assert awq.pack(one).item() == 0x75316420


def test_scales_lower_the_error() -> None:
    layer = layer_of()
    gram = layer.grams["mlp.down_proj"]
    weight = layer.tensors["mlp.down_proj.weight"].t().contiguous()
    options = awq.Options(group_size=32)
    scales = awq.search_scales(weight, gram, 32, options, NORM)
    assert scales is not None and scales.max() / scales.min() > 2

    def error(by):
        return float(
            rounding.quadratic(awq._rounding_error(weight * by[:, None], 32, options) / by[:, None], gram).sum()
        )

    assert error(scales) < 0.8 * error(torch.ones_like(scales))


def test_dead_channels_keep_scale_one() -> None:
    layer = layer_of()
    gram = layer.grams["mlp.down_proj"].clone()
    gram[64:], gram[:, 64:] = 0, 0
    weight = layer.tensors["mlp.down_proj.weight"].t().contiguous()
    scales = awq.search_scales(weight, gram, 32, awq.Options(group_size=32), NORM)
    assert torch.equal(scales[64:], torch.ones(64)) and torch.isfinite(scales).all()
    assert awq.search_scales(weight, torch.zeros(128, 128), 32, awq.Options(group_size=32), NORM) is None


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
def test_folded_weights_compute_the_same(kind: str, rounding: str) -> None:
    """De-quantized and with the folds undone, every matrix is near the original; errors are as reported."""
    layer = layer_of(kind)
    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    options = awq.Options(group_size=32, rounding=rounding)
    made, errors, warnings = awq.quantize(layer, options)
    assert not warnings
    assert all(torch.equal(layer.tensors[name], before[name]) for name in before)
    folds = [(group, awq._scales(layer, group, options)) for group in layer.structure.groups]
    assert any(scales is not None for _, scales in folds)
    for group, scales in folds:
        producer = group.producer
        if producer.kind == "norm" and scales is not None:
            plus = 1.0 if producer.one_plus else 0.0
            torch.testing.assert_close(
                (made[f"{producer.module}.weight"] + plus) * scales, before[f"{producer.module}.weight"] + plus
            )
        for name in group.linears:
            weight = dequantize_awq({s: made[f"{name}.{s}"] for s in ("qweight", "qzeros", "scales")})
            if scales is not None:
                weight = weight / scales
            for other, others in folds:
                if others is not None and other.producer.module == name:
                    weight = weight * awq.producing_rows(other.producer, others, len(weight))[:, None]
            original, gram = before[f"{name}.weight"], layer.grams[group.linears[0]]
            lost = ((original - weight) @ gram * (original - weight)).sum()
            share = float(lost / (original @ gram * original).sum())
            assert share < 0.03
            if not any(others is not None and other.producer.module == name for other, others in folds):
                assert share == pytest.approx(errors[f"{name}.weight"], rel=0.02)


def test_scales_of_repeated_heads_are_equal() -> None:
    layer = layer_of()
    group = layer.structure.groups[1]
    scales = awq._scales(layer, group, awq.Options(group_size=32)).view(2, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])


def test_compensation_lowers_the_error() -> None:
    nearest = awq.quantize(layer_of(), awq.Options(group_size=32))[1]
    compensated = awq.quantize(layer_of(), awq.Options(group_size=32, rounding="compensated"))[1]
    assert sum(compensated.values()) <= sum(nearest.values())


def test_modules_to_not_convert_stay_as_they_were() -> None:
    layer = layer_of()
    made, errors, _ = awq.quantize(layer, awq.Options(group_size=32, modules_to_not_convert=("down_proj",)))
    assert "mlp.down_proj.weight" in made and "mlp.down_proj.qweight" not in made
    assert "mlp.down_proj.weight" not in errors


def test_names_and_limits() -> None:
    assert awq.default_name(awq.Options()) == "awq-4bit-g128"
    assert awq.default_name(awq.Options(rounding="compensated")) == "awq-4bit-g128-compensated"
    assert awq.limits(awq.Options()) == {}
    assert "vllm" in awq.limits(awq.Options(zero_point=False))
    assert awq.stored(awq.Options(group_size=-1), "a", 16, 96)["scales"] == ("F16", (1, 16)), "one group"
    with pytest.raises(UserError, match="compensated"):
        awq.check(awq.Options(rounding="compensated", engine="gptqmodel"))


@pytest.mark.parametrize("options", [{"zero_point": False}])
def test_what_an_engine_cannot_load_is_said_when_the_recipe_is_read(options: dict[str, object]) -> None:
    """Of the engines that the recipe asks for; the variant is made for the others."""
    source = {"text": "x"}
    recipe = {
        "base": {"path": "models/base"},
        "variants": [{"awq": options}],
        "calibration": {"source": source},
        "backends": ["vllm", "transformers"],
    }
    (warning,) = parse(recipe, Path("r.yaml")).warnings
    assert " will not run on vllm: vLLM " in warning
    assert parse(recipe | {"backends": ["transformers"]}, Path("r.yaml")).warnings == ()


def test_gradients_are_by_outputs_as_they_are_after_folding() -> None:
    """Rows that were divided by d err by a d-th, and what they do counts d times as much, either way."""
    gradients = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    gradients = gradients @ gradients.t()
    divisors = torch.arange(1.0, 11.0)
    want = gradients * divisors[:, None] * divisors
    assert torch.allclose(awq._scaled(gradients[None], divisors)[0], want)
    runs = torch.zeros(3, 4, 4)
    for run, rows in enumerate(torch.arange(10).split(4)):
        runs[run, : len(rows), : len(rows)] = gradients[rows][:, rows]
    found = awq._scaled(runs, divisors)
    for run, rows in enumerate(torch.arange(10).split(4)):
        assert torch.allclose(found[run, : len(rows), : len(rows)], want[rows][:, rows])


def test_what_rows_were_divided_by_is_the_product_over_what_they_feed() -> None:
    first, second = (Group((name,), Producer("v", "linear")) for name in ("o", "gate"))
    other = Group(("down",), Producer("up", "linear"))
    layer = Layer(0, {"v.weight": torch.ones(4, 8)}, {}, Structure(()))
    scales = torch.tensor([1.0, 2.0, 3.0, 4.0])
    folds = [(first, scales), (second, scales), (other, scales), (first, None)]
    found = awq._divisors(layer, Group(("q", "v"), None), folds)
    assert list(found) == ["v"] and torch.equal(found["v"], scales * scales)
