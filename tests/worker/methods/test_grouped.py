"""What AWQ's and GPTQ's checkpoints share: names, words, layouts and bytes."""

from __future__ import annotations

from typing import Any

import pytest

from workbench.errors import UserError
from workbench.shape import NamedShape, Shape, Traits
from workbench.worker.methods import awq, gptq, grouped

torch = pytest.importorskip("torch")


def test_what_configurations_say() -> None:
    assert awq.quantization_config(awq.Options()) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
    assert awq.quantization_config(awq.Options(), ["mlp.gate"])["modules_to_not_convert"] == ["mlp.gate"]
    assert gptq.quantization_config(gptq.Options(), ["mlp.gate"])["dynamic"] == {r"-:.*\.mlp\.gate$": {}}
    config = gptq.quantization_config(gptq.Options())
    assert "dynamic" not in config
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
        (gptq.Options(objective="output"), "gptq-4bit-g128-output"),
        (awq.Options(rounding="compensated", objective="output"), "awq-4bit-g128-compensated-output"),
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
    with pytest.raises(UserError, match="^here: group_size 32 does not divide its 48 inputs; take 16$"):
        grouped.check_linear(gptq.Options(group_size=32), "here", 8, 48, ["16"])
    with pytest.raises(UserError, match=r"48 inputs; take -1 \(whole rows\)$"):
        grouped.check_linear(gptq.Options(group_size=32), "here", 8, 48, [])
    for rows, columns in ((12, 32), (8, 36)):
        with pytest.raises(UserError, match="^here: 4 bits are stored 8 at a time"):
            grouped.check_linear(gptq.Options(group_size=-1), "here", rows, columns, [])
    assert grouped.group_sizes([96, 64]) == [32] and grouped.group_sizes([1024]) == [32, 64, 128]


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
    whole = gptq.Options(group_size=-1)
    assert gptq.sizes(shape, whole, "mlx").disk_bytes == plain + 64 * 64 // 2 + 64 * 128 // 2 + 4 * (64 + 64)
    assert gptq.sizes(shape, gptq.Options(bits=8, group_size=32), "gptq").disk_bytes == plain + sum(
        rows * columns + columns // 32 * (rows + 2 * rows) + 4 * columns for rows, columns in ((64, 64), (64, 128))
    )
    assert left.refused is awq.sizes(shape, awq.Options(group_size=64), "awq").refused is None
    assert awq.sizes(shape, awq.Options(), "awq").refused == (
        "group_size 128 does not divide the inputs of every layer; take 32 or 64"
    )


def test_how_each_is_made() -> None:
    ours, theirs = (grouped.making("awq", awq.Options(engine=engine)) for engine in ("workbench", "gptqmodel"))  # type: ignore[arg-type]
    assert (ours.stage, ours.calibration) == ("pass", "tokens") and theirs.stage == "base"
    assert theirs.arguments == {"method": "awq"} and theirs.python == "gptqmodel"


@pytest.mark.parametrize(
    ("bits", "zeros", "kind"),
    [
        (4, (8, 8), "Q4_0"),
        (3, (4, 4), "Q4_0"),
        (3, (0, 7), "Q4_0"),
        (4, (7, 8), "Q4_1"),
        (4, (8, 9), "Q4_1"),
        (4, (0, 15), "Q4_1"),
        (8, (128, 128), "Q8_0"),
        (8, (127, 128), None),
        (8, (128, 129), None),
        (8, (0, 255), None),
    ],
)
def test_the_type_that_holds_codes_less_their_zeros(bits: int, zeros: tuple[int, int], kind: str | None) -> None:
    """Q4_0 has -8 to 7 and Q8_0 -128 to 127; Q4_1 has any four bits, with a least value of its own."""
    values = [code - zero for zero in range(zeros[0], zeros[1] + 1) for code in range(2**bits)]
    signed = "Q4_0" if min(values) >= -8 and max(values) <= 7 else "Q8_0"
    fits = min(values) >= -128 and max(values) <= 127
    assert grouped.container(bits, *zeros) == kind
    assert kind in (signed, "Q4_1") or not fits


def test_the_type_that_gptqs_codes_are_carried_to() -> None:
    found = {
        (bits, sym): gptq.container_of(gptq.Options(bits=bits, sym=sym)) for bits in (4, 8) for sym in (True, False)
    }  # type: ignore[arg-type]
    assert found == {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0", (8, False): ""}


def test_groups_of_whole_blocks_can_be_carried() -> None:
    for size in (32, 64, 128, -1):
        assert grouped.carried_limits(gptq.Options(group_size=size)) == {}
    for size in (16, 48):
        assert "blocks are of 32 weights" in grouped.carried_limits(gptq.Options(group_size=size))["llamacpp"]


@pytest.mark.parametrize(("kind", "block_bytes"), [("Q4_0", 18), ("Q4_1", 20), ("Q8_0", 34)])
def test_the_bytes_of_a_carried_file_by_hand(kind: str, block_bytes: int) -> None:
    shape = Shape(
        (
            NamedShape("token_embd.weight", (100, 64)),
            NamedShape("blk.0.attn_q.weight", (64, 64)),
            NamedShape("blk.0.ffn_down.weight", (64, 128)),
            NamedShape("blk.0.attn_norm.weight", (64,)),
        ),
        Traits(1, 4, 2),
        64,
        16,
        128,
        100,
        0,
        "bfloat16",
    )
    all_packed = grouped.carried_sizes(shape, gptq.Options(group_size=32), gptq.quantizes, kind)
    assert all_packed.disk_bytes == 100 * 64 * 2 + 64 * 4 + 64 * (64 + 128) // 32 * block_bytes
    assert list(all_packed.types.values()) == ["BF16", kind, kind, "F32"]
    kept = awq.Options(group_size=32, modules_to_not_convert=("down_proj",))
    some = grouped.carried_sizes(shape, kept, awq.quantizes, kind)
    assert some.types["blk.0.ffn_down.weight"] == "BF16"
    refused = grouped.carried_sizes(shape, gptq.Options(group_size=48), gptq.quantizes, "")
    assert refused.disk_bytes == 0 and refused.refused


def test_matrices_that_gguf_has_no_name_for_here_count_by_their_own() -> None:
    """A plan of an architecture that its table does not hold, by its files' headers."""
    names = ("blk.3.self_attn.dense.weight", "blk.3.attn_q.weight", "blk.3.ffn_gate_inp.weight", "lm_head.weight")
    found = [grouped._linear(NamedShape(name, (64, 64))) for name in names]
    assert found == ["model.layers.3.self_attn.dense", "model.layers.3.self_attn.q_proj", None, None]
    assert grouped._linear(NamedShape("blk.3.self_attn.q_norm.weight", (64,))) is None
    assert grouped._linear(NamedShape("blk.3.ffn_up_exps.weight", (8, 64, 64))) == "model.layers.3.ffn_up_exps"
    assert grouped._linear(NamedShape("blk.3.linear_attn.conv1d.weight", (64, 1, 4))) is None


def test_experts_count_one_by_one() -> None:
    traits = Traits(layers=1, heads=4, kv_heads=2, experts=8)
    sizes = {}
    for shape in ((64, 128), (8, 64, 128)):
        tensors = (NamedShape("blk.0.ffn_up_exps.weight" if len(shape) == 3 else "blk.0.ffn_up.weight", shape),)
        whole = Shape(tensors, traits, 128, 32, 64, 100, 0, "bfloat16")
        sizes[len(shape)] = gptq.sizes(whole, gptq.Options(group_size=32), "gptq").disk_bytes
    assert sizes[3] == 8 * sizes[2] > 0


@pytest.mark.parametrize("method", [awq, gptq])
def test_gradients_are_the_workbenchs_own(method: Any) -> None:
    with pytest.raises(UserError, match="`objective: output` is the workbench's own; leave out `engine: gptqmodel`"):
        method.check(method.Options(objective="output", engine="gptqmodel"))
    assert method.making(method.Options(objective="output"), cuda=False).gradients
    assert not method.making(method.Options(), cuda=False).gradients


def test_an_order_of_its_own_for_each_of_q_k_and_v_is_refused() -> None:
    with pytest.raises(UserError, match="leave `desc_act` out"):
        gptq.check(gptq.Options(desc_act=True, objective="output"))
