"""Decoder layers of more than thirty model types are run to find what shares an input and what produces it.

What is found is held against what the layers' papers and classes say, and every producer against the layer itself:
folded with factors that are no powers of two, it computes the same. Then what cannot be taken, in words.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.worker.small_models import SIZES
from workbench.errors import UserError
from workbench.worker.calibration import discover
from workbench.worker.calibration.discover import structures_of, told
from workbench.worker.calibration.skeleton import Skeleton, output_of
from workbench.worker.layers import Group, Producer, Structure, fold

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NO = "nothing that can be scaled"
Q, OUT, UP, DOWN = "q_proj, k_proj, v_proj", "o_proj <- v_proj, each for 2 heads", "gate_proj, up_proj", "down_proj"
PLAIN = f"{Q} <- input_layernorm | {OUT} | {UP} <- post_attention_layernorm | {DOWN} <- up_proj"
ONE_HALF = f"{Q} <- input_layernorm | {OUT} | up_proj <- post_attention_layernorm | {DOWN} <- {NO}"
POST_NORM = f"{Q} <- {NO} | {OUT} | {UP} <- {NO} | {DOWN} <- up_proj"
FUSED = (
    f"{Q} <- input_layernorm | {OUT} | gate_up_proj <- post_attention_layernorm | "
    "down_proj <- gate_up_proj rows 128 to 255"
)
GEMMA = (
    f"{Q} <- input_layernorm (1 + weight) | {OUT} | {UP} <- pre_feedforward_layernorm (1 + weight) | {DOWN} <- up_proj"
)
COHERE = f"{Q}, {UP} <- input_layernorm | {OUT} | {DOWN} <- up_proj"
LINEAR = f"{UP} <- post_attention_layernorm (1 + weight) | {DOWN} <- up_proj"
FOUND: dict[str, str | tuple[dict[str, Any], list[str]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "granite", "granite_swa", "smollm3", "cwm")
        + ("ernie4_5", "helium", "hunyuan_v1_dense", "hyperclovax", "seed_oss", "stablelm"),
        PLAIN,
    ),
    **dict.fromkeys(("gemma2", "gemma3_text", "vaultgemma"), GEMMA),
    "gemma": GEMMA.replace("pre_feedforward", "post_attention"),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "olmo"), POST_NORM),
    **dict.fromkeys(("glm", "glm4"), FUSED),
    **dict.fromkeys(("cohere", "cohere2"), COHERE),
    **dict.fromkeys(("arcee", "jais2"), ONE_HALF),
    "nemotron": ONE_HALF.replace("norm ", "norm (1 + weight) "),
    "apertus": ONE_HALF.replace("input_", "attention_").replace("post_attention_", "feedforward_"),
    "starcoder2": ONE_HALF.replace("up_proj", "c_fc").replace("down_proj", "c_proj"),
    "nanochat": f"{Q} <- {NO} | {OUT} | fc1 <- {NO} | fc2 <- {NO}",
    "diffllama": PLAIN.replace(OUT, f"o_proj <- {NO}"),
    "bitnet": f"{Q} <- input_layernorm | o_proj <- attn_sub_norm | {UP} <- post_attention_layernorm | "
    f"{DOWN} <- ffn_sub_norm",
    "phi": f"{Q}, fc1 <- input_layernorm | dense <- v_proj, each for 2 heads | fc2 <- {NO}",
    "phi3": "qkv_proj <- input_layernorm | o_proj <- qkv_proj rows 96 to 127, each for 2 heads | "
    "gate_up_proj <- post_attention_layernorm | down_proj <- gate_up_proj rows 128 to 255",
    "persimmon": "query_key_value <- input_layernorm | dense <- query_key_value rows 32 to 47 of each of 4 runs | "
    f"dense_h_to_4h <- post_attention_layernorm | dense_4h_to_h <- {NO}",
    "lfm2": (
        {"layer_types": ["conv", "full_attention"]},
        [
            "in_proj <- operator_norm | out_proj <- in_proj rows 128 to 191 | w1, w3 <- ffn_norm | w2 <- w3",
            f"{Q} <- operator_norm | out_proj <- v_proj, each for 2 heads | w1, w3 <- ffn_norm | w2 <- w3",
        ],
    ),
    "olmo_hybrid": (
        {"layer_types": ["linear_attention", "full_attention"]},
        [
            f"{Q}, a_proj, b_proj, g_proj <- input_layernorm | o_proj <- o_norm, each for 4 heads | "
            f"{UP} <- post_attention_layernorm | {DOWN} <- up_proj",
            POST_NORM,
        ],
    ),
    "qwen3_5_text": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_value_head_dim": 16,
        }
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 16},
        [
            "in_proj_qkv, in_proj_z, in_proj_b, in_proj_a <- input_layernorm (1 + weight) | "
            f"out_proj <- norm, each for 4 heads | {LINEAR}",
            f"{Q} <- input_layernorm (1 + weight) | {OUT} | {LINEAR}",
        ],
    ),
}
"""Model type -> its layers' groups in words, without the names of the modules around; where they differ, of each."""


def config_of(kind: str, **more: Any) -> dict[str, Any]:
    return dict(transformers.AutoConfig.for_model(kind, **SIZES | more).to_dict())


@pytest.mark.parametrize("kind", sorted(FOUND))
def test_what_is_found_is_right_and_what_is_folded_computes_the_same(kind: str) -> None:
    expected = FOUND[kind]
    more, words = ({}, [expected]) if isinstance(expected, str) else expected
    config = config_of(kind, **more)
    structures = structures_of(config)
    found = [" | ".join(each.groups) for each in told(structures)]
    for prefix in ("self_attn.", "linear_attn.", "mlp.", "feed_forward.", "conv."):
        found = [each.replace(prefix, "") for each in found]
    assert found == words
    assert len(structures) == 2
    folded_is_the_same(config, structures)


def folded_is_the_same(config: dict[str, Any], structures: tuple[Structure, ...]) -> None:
    """Every producer at once, by the very function that AWQ uses, with factors between 1/3 and 3."""
    chance = torch.Generator().manual_seed(1)
    skeleton = Skeleton(config, 50)
    x = torch.randn(2, 30, 64, generator=chance)
    with torch.inference_mode():
        calls = skeleton.calls(torch.zeros(1, 30, dtype=torch.int64), torch.device("cpu"))
        for layer, call, structure in zip(skeleton.layers, calls, structures, strict=True):
            tensors = discover._random_weights(layer, chance)
            layer.load_state_dict(tensors, assign=True)
            layer.eval()
            folded = dict(tensors)
            for group in structure.groups:
                if group.producer:
                    size = tensors[f"{group.linears[0]}.weight"].shape[1]
                    scales = 3 ** (torch.rand(size, generator=chance) * 2 - 1)
                    heads = scales.view(-1, group.producer.repeats, group.producer.head_dim)
                    if group.producer.repeats > 1:
                        scales = heads[:, :1].expand_as(heads).reshape(-1)
                    fold(folded, group, scales)
            before, after = output_of(layer, x, call), output_of(layer, x, call, folded)
            assert (after - before).norm() / before.norm() < 1e-5
            changed = [name for name in tensors if folded[name] is not tensors[name]]
            assert bool(changed) == any(group.producer for group in structure.groups)


def test_thirty_further_types_and_the_seven_old_ones() -> None:
    assert len(FOUND) >= 37 and {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"} <= {*FOUND}


def test_queries_and_keys_are_a_pair_unless_they_are_normed() -> None:
    pair = ("self_attn.q_proj", "self_attn.k_proj")
    found = {kind: structures_of(config_of(kind))[0].scores for kind in ("llama", "qwen3", "phi3", "gemma2", "olmo2")}
    assert found == {"llama": pair, "qwen3": None, "phi3": None, "gemma2": pair, "olmo2": None}


def test_a_producer_that_does_not_hold_on_the_base_is_left_out() -> None:
    """What a layer of random weights proves is proven again on weights at hand."""
    skeleton = Skeleton(config_of("llama"), 50)
    chance = torch.Generator().manual_seed(2)
    call = skeleton.calls(torch.zeros(1, 30, dtype=torch.int64), torch.device("cpu"))[0]
    layer, x = skeleton.layers[0].eval(), torch.randn(1, 30, 64, generator=chance)
    tensors = discover._random_weights(layer, chance)
    layer.load_state_dict(tensors, assign=True)
    structure = structures_of(config_of("llama"))[0]
    wrong = Group(("self_attn.o_proj",), Producer("self_attn.q_proj", "linear"))
    mixed = Structure((structure.groups[0], wrong, *structure.groups[2:]), scores=structure.scores)

    def run(state: Any = None) -> Any:
        return output_of(layer, x, call, state)

    with torch.inference_mode():
        assert discover.proven(structure, tensors, run) == structure
        found = discover.proven(mixed, tensors, run)
    assert found.groups[1] == Group(wrong.linears, None) and found.groups[0] == structure.groups[0]


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("inkling_text", {}, "its experts are no gated pair of linear layers"),
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16}, "its experts are no gated pair of linear layers"),
        ("gpt_neox", {}, "keeps its decoder layers elsewhere than in `model.layers`"),
        ("mamba", {}, "keeps its decoder layers elsewhere than in `model.layers`"),
        ("t5", {}, "is no causal language model"),
        ("gemma4_text", {"layer_types": None, "hidden_size_per_layer_input": 0}, "is given more than hidden states"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "do not run one at a time"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(kind: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=f"'{kind}'.*{words}.*engine: gptqmodel") as caught:
        structures_of(config_of(kind, **more))
    assert "\n" not in str(caught.value)


def test_what_transformers_does_not_know_and_wrappers_are_refused() -> None:
    with pytest.raises(UserError, match="'lama' is not known to transformers.*engine: gptqmodel"):
        structures_of(SIZES | {"model_type": "lama"})
    with pytest.raises(UserError, match=r"only text models.*\(gemma3_text\).*as the base.*engine: gptqmodel"):
        structures_of({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


def test_layers_are_told_in_runs() -> None:
    one, two = Structure((Group(("a", "b"), None),)), Structure((Group(("a",), Producer("n", "norm")),))
    assert [(each.layers, each.groups) for each in told((one, one, two, one, two))] == [
        ("0-1, 3", [f"a, b <- {NO}"]),
        ("2, 4", ["a <- n"]),
    ]
