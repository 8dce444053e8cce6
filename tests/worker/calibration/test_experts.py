"""Experts through the pass: each by the tokens that are sent to it, or by all of its layer's where those are few."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import dequantized, pass_request, relative, write_model, write_tokens
from workbench.worker.calibration import run as calibrate
from workbench.worker.calibration import walk
from workbench.worker.calibration.experts import probabilities, router_of
from workbench.worker.calibration.skeleton import Skeleton
from workbench.worker.calibration.weights import open_weights, read_layer
from workbench.worker.ggml import imatrix
from workbench.worker.layers import Structure, parts_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 32}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {"num_experts": 4},
    "olmoe": {"num_experts": 4},
    "glm4_moe": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}
    | LATENT
    | {"num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 64}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 64},
    "llama4_text": {"num_local_experts": 4, "intermediate_size": 64, "intermediate_size_mlp": 128}
    | {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
}
VARIANTS = {
    "awq": {"group_size": 32},
    "gptq": {"group_size": 32},
    "gptq-8": {"group_size": 32, "bits": 8},
}


def base_of(folder: Path, kind: str, **more: Any) -> Path:
    """Two experts a token, of 64 channels each."""
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False}
    return write_model(folder / "base", kind, **sizes | KINDS[kind] | more)


def run(base: Path, folder: Path, windows: int = 24, variants: Any = VARIANTS) -> dict[str, Any]:
    named = {name: (name.partition("-")[0], options) for name, options in variants.items()}
    folder.mkdir(exist_ok=True)
    tokens = write_tokens(folder / "tokens.json", [40] * windows)
    return dict(calibrate.run(pass_request(base, folder, named, tokens=tokens), lambda *_: None))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_expert_is_quantized_and_the_model_computes_nearly_the_same(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, kind)
    made = run(base, tmp_path / "work")
    assert made["refused"] == {}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.randint(3, 354, (2, 40), generator=torch.Generator().manual_seed(5))
    shares = {}
    with torch.no_grad():
        expected = model(ids).logits
        for name, options in VARIANTS.items():
            quantized = dequantized(base, tmp_path / "work" / name, name.partition("-")[0], options.get("bits", 4))
            shares[name] = relative(quantized(ids).logits, expected)
            errors = made["variants"][name]["tensor_errors"]
            # Three linear layers of each of four experts of each layer that has some.
            routed = [error for tensor, error in errors.items() if ".experts." in tensor]
            layers = 1 if {"first_k_dense_replace", "interleave_moe_layer_step"} & {*KINDS[kind]} else 2
            assert len(routed) == 12 * layers and all(0 < error < 0.06 for error in errors.values())
    # A router may send a token elsewhere, so that eight bits are no sixteenth of four.
    assert shares["gptq-8"] < 0.12 and max(shares["gptq"], shares["awq"]) < 0.7, shares
    assert shares["gptq-8"] < 0.5 * shares["gptq"]
    assert sum(map(len, made["experts"].values())) == 4 * layers


def means_of(model: Any, ids: Any, name: str) -> Callable[[int], Any]:
    """The mean square of what each expert of a module is sent."""
    sent: dict[int, list[Any]] = {}

    def before(module: Any, inputs: tuple[Any, ...]) -> None:
        hidden, index = inputs[:2]
        for number in range(module.num_experts):
            sent.setdefault(number, []).append(hidden[(index == number).any(-1)])

    hook = model.get_submodule(name).register_forward_pre_hook(before)
    with torch.no_grad():
        model(ids)
    hook.remove()
    return lambda number: torch.cat(sent[number])


def test_importance_is_each_experts_own(tmp_path: Path) -> None:
    base = base_of(tmp_path, "qwen3_moe")
    made = run(base, tmp_path / "work", variants={})
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor(json.loads((tmp_path / "work/tokens.json").read_text())["windows"])
    sent = means_of(model, ids, "model.layers.1.mlp.experts")
    found = imatrix.load(tmp_path / "work/imatrix.gguf")
    gate = torch.from_numpy(found["blk.1.ffn_gate_exps.weight"]).view(4, 64)
    assert torch.equal(gate, torch.from_numpy(found["blk.1.ffn_up_exps.weight"]).view(4, 64))
    assert found["blk.1.ffn_down_exps.weight"].shape == (4 * 64,)
    for number, count in enumerate(made["experts"]["model.layers.1.mlp.experts"]):
        x = sent(number)
        assert len(x) == count >= walk.FEWEST_ROUTED
        torch.testing.assert_close(gate[number], (x * x).mean(0), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gate[0], gate[1], rtol=0.05)


def test_starved_experts_are_calibrated_on_all_tokens_of_their_layer_and_named(tmp_path: Path) -> None:
    base = base_of(tmp_path, "qwen3_moe", num_experts=16)
    made = run(base, tmp_path / "work")
    counts = made["experts"]["model.layers.0.mlp.experts"]
    starved = [number for number, count in enumerate(counts) if count < walk.FEWEST_ROUTED]
    assert 0 < len(starved) < 16 and sum(counts) == 2 * 24 * 40
    (told,) = [each for each in made["variants"]["gptq"]["warnings"] if "experts saw fewer than" in each]
    assert told.startswith(f"{sum(c < 128 for each in made['experts'].values() for c in each)} of 32 experts")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor(json.loads((tmp_path / "work/tokens.json").read_text())["windows"])
    everything: list[Any] = []
    hook = model.get_submodule("model.layers.0.mlp.experts").register_forward_pre_hook(
        lambda _, inputs: everything.append(inputs[0])
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    # Each token counts by how likely the router was to send it there.
    chances = (everything[0] @ model.get_submodule("model.layers.0.mlp.gate").weight.t()).softmax(-1)
    gate = torch.from_numpy(imatrix.load(tmp_path / "work/imatrix.gguf")["blk.0.ffn_gate_exps.weight"]).view(16, 64)
    for number in range(16):
        weights = chances[:, number, None] / chances[:, number].sum()
        near = torch.allclose(gate[number], (weights * everything[0] ** 2).sum(0), rtol=1e-3, atol=1e-6)
        assert near == (number in starved)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_routers_rows_say_where_it_sends_a_token(kind: str, tmp_path: Path) -> None:
    """By one layer of transformers' own model; Llama 4's experts are given other numbers than its router."""
    base = base_of(tmp_path, kind)
    with torch.no_grad():
        layer = Skeleton(json.loads((base / "config.json").read_text()), 64).layers[1]
    name = next(name for name, _ in layer.named_modules() if name.endswith(".experts"))
    router = router_of(layer, name)
    if kind == "llama4_text":
        assert router is None
        return
    block = layer.get_submodule(name.removesuffix(".experts"))
    own = next(place for place, module in block.named_modules() if module is router)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().model.layers[1]
    place = next(place for place, _ in model.named_modules() if place.endswith(".experts")).removesuffix(".experts")
    router, given, sent = model.get_submodule(f"{place}.{own}"), list[Any](), list[Any]()
    router.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model.get_submodule(f"{place}.experts").register_forward_pre_hook(lambda _, inputs: sent.append(inputs[1]))
    with torch.no_grad():
        model.get_submodule(place)(torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3)))
        chances = probabilities(router, given[0])
    assert chances.shape == (40, 4) and torch.allclose(chances.sum(-1), torch.ones(40), atol=1e-4)
    assert torch.equal(chances.topk(2).indices.sort().values, sent[0].sort().values)


def test_experts_in_parts_are_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has no more numbers in its Gram matrices than the layer has weights."""
    base = base_of(tmp_path, "deepseek_v3")
    whole = run(base, tmp_path / "whole", windows=5)
    structure, tensors = open_weights(base).structures[1], read_layer(open_weights(base), 1, torch.device("cpu"))
    # Matrices with hardly a row have far larger Gram matrices.
    flat = {name: tensor[:8] for name, tensor in tensors.items()}
    parts = parts_of(structure, flat)
    assert len(parts_of(structure, tensors)) == 1 and len(parts) > 2
    assert [group for part in parts for group in part.groups] == list(structure.groups)
    monkeypatch.setattr(calibrate, "parts_of", lambda one, _: alone(one) if one.experts else [one])
    parted = run(base, tmp_path / "parted", windows=5)
    for file in ("awq/model.safetensors", "gptq/model.safetensors", "imatrix.gguf"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parted" / file).read_bytes()
    assert parted["experts"] == whole["experts"]


def alone(structure: Structure) -> list[Structure]:
    """Each expert in a part of its own."""
    (groups,) = structure.experts.values()
    rest = [group for group in structure.groups if not group.routed]
    return [replace(structure, groups=tuple(each)) for each in (rest, *zip(groups[::2], groups[1::2], strict=True))]


def test_what_no_layout_holds_is_named_to_readers(tmp_path: Path) -> None:
    """The shared expert's gate has one channel."""
    base = base_of(tmp_path, "qwen2_moe")
    run(base, tmp_path / "work")
    said = {name: json.loads((tmp_path / f"work/{name}/config.json").read_text()) for name in ("awq", "gptq")}
    assert said["awq"]["quantization_config"]["modules_to_not_convert"] == ["mlp.shared_expert_gate"]
    assert list(said["gptq"]["quantization_config"]["dynamic"]) == [r"-:.*\.mlp\.shared_expert_gate$"]


def test_layers_without_experts_are_of_their_own_kind(tmp_path: Path) -> None:
    weights = open_weights(base_of(tmp_path, "deepseek_v3"))
    dense, sparse = weights.structures
    assert dense.experts == {} and list(sparse.experts) == ["mlp.experts"]
    assert "mlp.gate_proj" in dense.linears and "mlp.experts.3.down_proj" in sparse.linears
    assert "mlp.shared_experts.up_proj" in sparse.linears and "mlp.gate" not in sparse.linears


@pytest.mark.parametrize(
    ("kind", "turned", "in_turn", "undone"),
    [("gpt_oss", True, True, False), ("granitemoe", False, False, True), ("llama4_text", True, False, True)],
)
def test_how_files_hold_experts_together_is_found(
    kind: str, turned: bool, in_turn: bool, undone: bool, tmp_path: Path
) -> None:
    """Rows of gate and up in turn or in halves; and whether what up puts out may be scaled, which gpt-oss's clamp and
    its `up + 1` forbid."""
    base = base_of(tmp_path, kind)
    weights = open_weights(base)
    structure = weights.structures[1]
    whole = {name: each for stored in structure.stored for name, each in [(stored.parts[0], stored)]}
    ((place, _),) = structure.experts.items()
    pair = whole[f"{place}.{{}}.gate_proj.weight"]
    assert (pair.transposed, pair.interleaved) == (turned, in_turn)
    assert [bool(group.producer) for group in structure.experts[place][1::2]] == [undone] * 4
    stored = load_file(base / "model.safetensors")
    both = next(stored[name] for each in pair.names if (name := f"model.layers.1.{each}") in stored)[3]
    both = both.t() if turned else both
    gate, up = (both[::2], both[1::2]) if in_turn else both.chunk(2)
    tensors = read_layer(weights, 1, torch.device("cpu"))
    assert torch.equal(tensors[f"{place}.3.gate_proj.weight"], gate)
    assert torch.equal(tensors[f"{place}.3.up_proj.weight"], up)


def test_starved_experts_that_are_given_zeros_for_what_they_are_not_sent(tmp_path: Path) -> None:
    """Llama 4 gives every expert every token, multiplied by zero or by its score."""
    base = base_of(tmp_path, "llama4_text", num_local_experts=16)
    made = run(base, tmp_path / "work")
    ((name, counts),) = made["experts"].items()
    assert sum(counts) == 24 * 40 and any(count < walk.FEWEST_ROUTED for count in counts)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.tensor(json.loads((tmp_path / "work/tokens.json").read_text())["windows"])
    given: list[Any] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    sent = given[0].view(16, -1, 64)
    assert [int(each.any(-1).sum()) for each in sent] == counts
    everything = given[0][given[0].any(-1)]
    gate = torch.from_numpy(imatrix.load(tmp_path / "work/imatrix.gguf")["blk.1.ffn_gate_exps.weight"]).view(16, 64)
    for number, count in enumerate(counts):
        seen = everything if count < walk.FEWEST_ROUTED else sent[number][sent[number].any(-1)]
        torch.testing.assert_close(gate[number], (seen * seen).mean(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_layer_in_parts_whose_queries_and_keys_are_a_pair(kind: str, tmp_path: Path) -> None:
    """Only the first part has them: as Mixtral 8x7B, whose experts' Gram matrices outnumber a layer's weights."""
    wide = {"mixtral": {"intermediate_size": 256}, "qwen2_moe": {"moe_intermediate_size": 256}}[kind]
    base = base_of(tmp_path, kind, **wide)
    weights = open_weights(base)
    parts = parts_of(weights.structures[0], read_layer(weights, 0, "cpu"))
    assert len(parts) > 1 and [part.scores is not None for part in parts] == [True] + [False] * (len(parts) - 1)
    assert [*run(base, tmp_path / "work", 4)["variants"]] == [*VARIANTS]


def test_layers_behind_the_last_are_left_out(tmp_path: Path) -> None:
    """They draft tokens (multi-token prediction); transformers leaves them out as well."""
    base = base_of(tmp_path, "glm4_moe", num_nextn_predict_layers=1)
    file = base / "model.safetensors"
    tensors = load_file(file)
    more = {name.replace("layers.1.", "layers.2."): one.clone() for name, one in tensors.items() if "layers.1." in name}
    save_file(tensors | more | {"model.layers.2.eh_proj.weight": torch.ones(64, 128)}, file, {"format": "pt"})
    made = run(base, tmp_path / "work", 4, {"awq": {"group_size": 32}})
    (said,) = (text for text in made["variants"]["awq"]["warnings"] if "draft" in text)
    assert said == f"left out: {len(more) + 1} tensors of layers that only draft tokens (multi-token prediction)"
    assert not any("layers.2." in name for name in load_file(tmp_path / "work" / "awq" / "model.safetensors"))
    written = json.loads((tmp_path / "work" / "awq" / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == 0
