"""Model types that no table of ours holds, each from a random model to the logits of the engines that run it.

AWQ and GPTQ in transformers, a GGUF file with the pass's importance matrix in llama.cpp. What is held against what: an
engine's logits of an artifact against transformers' float32 logits of the same weights de-quantized by our own
unpacking, as a divergence; that of the artifact and its base is many times larger, or the bound could not fail. What an
engine cannot do is said, and stands here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.others import unpack
from tests.worker.small_models import dequantized, pass_request, write_model
from tests.worker.unpacking import exact, load_base, with_files_weights
from workbench.machine import isolate
from workbench.worker.calibration import run as calibrate

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 384, "tie_word_embeddings": True}
WIDE |= {"initializer_range": 0.015}
"""Rows of whole K-quant blocks, and an output matrix that leaves probabilities as even as a language model's are."""
UNTIED = {"tie_word_embeddings": False}
"""Of types whose output matrix llama.cpp wants in the file."""
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 16}
HYBRID |= {"linear_num_key_heads": 8, "linear_value_head_dim": 16, "linear_key_head_dim": 16}
HYBRID |= {"full_attention_interval": 2}
ROUTED: dict[str, Any] = {"moe_intermediate_size": 256, "num_experts_per_tok": 2}
DEEPSEEK = ROUTED | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
TOGETHER: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256}
"""Types whose files hold a layer's experts in one tensor."""
SCOUT: dict[str, Any] = {"intermediate_size_mlp": 512, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2}
SCOUT |= {"num_hidden_layers": 4}
"""llama.cpp needs the one layer in four that has no rotations."""
ROUTED_KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "deepseek_v3")
ROUTED_KINDS += ("gpt_oss", "granitemoe", "llama4_text")
KINDS: dict[str, dict[str, Any]] = {
    "apertus": UNTIED,
    "arcee": {},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cwm": {},
    "ernie4_5": {},
    "exaone4": {},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "granite": {"attention_multiplier": 0.125},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jais2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "ministral": {},
    "ministral3": {},
    "nanochat": {},
    "nemotron": UNTIED,
    "olmo": {},
    "olmo2": UNTIED,
    "olmo3": UNTIED,
    "phi": UNTIED | {"num_key_value_heads": 4, "intermediate_size": 1024},
    "qwen3_5_text": HYBRID,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": UNTIED,
    "starcoder2": {},
    "vaultgemma": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": ROUTED | UNTIED | {"num_experts": 4, "shared_expert_intermediate_size": 256},
    "qwen3_moe": ROUTED | {"num_experts": 4, "norm_topk_prob": True},
    "olmoe": UNTIED | {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "glm4_moe": DEEPSEEK,
    "deepseek_v3": DEEPSEEK | LATENT | {"head_dim": 16, "num_key_value_heads": 4},
    "gpt_oss": UNTIED | TOGETHER | {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": TOGETHER | {"attention_multiplier": 0.125},
    "llama4_text": UNTIED | TOGETHER | SCOUT,
}
RANDOM = "of its weights not in the files, and would draw them at random"
UNKNOWN = "llama.cpp's converter does not know"
REASONS: dict[tuple[str, str], str] = {
    **{(kind, method): RANDOM for kind in ROUTED_KINDS for method in ("awq", "gptq")},
    # Its activation is a module with weights to AWQ's loader.
    ("starcoder2", "awq"): RANDOM,
    **{("nanochat", method): "object has no attribute 'weight'" for method in ("awq", "gptq")},
    **{(kind, "gguf"): UNKNOWN for kind in ("cwm", "helium", "ministral", "nanochat", "vaultgemma")},
    ("cohere2", "gguf"): "rotary_pct",
    # It reads the tokenizer, and this base has none.
    ("ministral3", "gguf"): "tokenizer",
}
"""(type, method) -> what the engine, or what makes its file, says instead."""
HEADS = {"nemotron": 0.007}
"""Sizes of an output matrix of its own, where squares of activations make logits of another size."""
NEAR_ROUTED = 1e-3
"""Where llama.cpp's rounding of activations to 8 bits may send a token to another expert: the same weights in a file
without quantized tensors are within 1e-6 (`NEAR_PLAIN` leaves room)."""
NEAR_PLAIN = 1e-5
TIES = 2
"""Tokens of a window whose experts weigh so nearly the same that a processor's order of sums may choose another."""
WINDOW = 32
METHODS = ("awq", "gptq")
TYPE = "Q4_K_M"
PLAIN = f"{TYPE} as F32"
"""The same weights in a file without a quantized tensor: llama.cpp then rounds no activation to 8 bits."""
NEAR = 1e-4
"""Mean divergence, nats a token: what is left is an engine's arithmetic."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of every kind: its folder, and what the pass said."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("types")
    found: dict[str, dict[str, Any]] = {}
    for seed, kind in enumerate(KINDS):
        folder = root / kind
        base = write_model(folder / "base", kind, seed, head=HEADS.get(kind, 0.015), **WIDE | KINDS[kind])
        request = pass_request(base, folder, {method: (method, {"group_size": 32}) for method in METHODS})
        found[kind] = {"folder": folder} | calibrate.run(request, lambda *_: None)
    return found


def in_a_child(function: str, payload: dict[str, Any], log: Path) -> Any:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    reply = isolate.call(
        f"tests.worker.engine_logits:{function}", payload, workdir=log, time_limit_s=400, environment=environment
    )
    assert reply.error is None, reply.log
    return reply.value


@pytest.fixture(scope="module")
def ids() -> list[int]:
    import torch

    return list(torch.randint(3, 300, (WINDOW,), generator=torch.Generator().manual_seed(9)).tolist())


def logits_of(backend: str, models: dict[str, Any], ids: list[int], folder: Path) -> tuple[dict[str, Any], Any]:
    from safetensors.torch import load_file

    out = folder / f"{backend}.safetensors"
    payload = {"backend": backend, "models": models, "ids": ids, "out": str(out)}
    failures = in_a_child("collect", payload, folder / f"{backend}-log")
    return dict(load_file(out)), failures


@pytest.fixture(scope="module")
def in_transformers(made: dict[str, Any], ids: list[int]) -> Any:
    pytest.importorskip("gptqmodel")
    models = {
        f"{kind}/{method}": {"path": str(one["folder"] / method), "format": method}
        for kind, one in made.items()
        for method in METHODS
        if method in one["variants"]
    }
    return logits_of("transformers", models, ids, next(iter(made.values()))["folder"].parent)


@pytest.fixture(scope="module")
def files(made: dict[str, Any]) -> dict[str, dict[str, str]]:
    pytest.importorskip("llama_cpp")
    models = {}
    for kind, one in made.items():
        imatrix = None if one["no_imatrix"] else str(one["folder"] / "imatrix.gguf")
        models[kind] = {"base": str(one["folder"] / "base"), "imatrix": imatrix}
    root = next(iter(made.values()))["folder"].parent
    payload = {"models": models, "types": [TYPE], "folder": str(root)}
    return dict(in_a_child("convert_and_quantize", payload, root / "convert-log"))


@pytest.fixture(scope="module")
def in_llamacpp(files: dict[str, dict[str, str]], made: dict[str, Any], ids: list[int]) -> Any:
    models = {
        f"{kind}/{name}": {"path": path, "format": "gguf"}
        for kind, each in files.items()
        for name, path in each.items()
        if name != "refused"
    }
    for kind in ROUTED_KINDS:
        path = Path(files[kind][TYPE])
        models[f"{kind}/{PLAIN}"] = {
            "path": str(unpack(path, path.with_name(f"{path.stem}-F32.gguf"))),
            "format": "gguf",
        }
    return logits_of("llamacpp", models, ids, next(iter(made.values()))["folder"].parent)


def divergence(expected: Any, found: Any, but: int = 0) -> float:
    """Mean KL(expected || found) over positions, nats, without the `but` farthest of them."""
    import torch

    p, q = torch.log_softmax(expected.double(), -1), torch.log_softmax(found[:, : expected.shape[1]].double(), -1)
    positions = (p.exp() * (p - q)).sum(-1).sort().values
    return float(positions[: len(positions) - but].mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_awq_and_gptq_in_transformers(
    kind: str, method: str, made: dict[str, Any], in_transformers: Any, ids: list[int]
) -> None:
    found, failures = in_transformers
    name = f"{kind}/{method}"
    assert made[kind]["refused"] == {}
    if (kind, method) in REASONS:
        assert REASONS[kind, method] in failures[name]
        return
    folder = made[kind]["folder"]
    wanted = exact(dequantized(folder / "base", folder / method, method, 4), ids)
    near, far = divergence(wanted, found[name]), divergence(wanted, exact(load_base(folder / "base"), ids))
    print(f"{name}: {near:.1e} from its own weights, {far:.1e} from the base")
    assert near < NEAR < far / 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gguf_with_the_importance_matrix_in_llamacpp(
    kind: str, made: dict[str, Any], files: dict[str, dict[str, str]], in_llamacpp: Any, ids: list[int]
) -> None:
    found, failures = in_llamacpp
    if (kind, "gguf") in REASONS:
        assert REASONS[kind, "gguf"] in files[kind]["refused"] + made[kind]["no_imatrix"]
        return
    assert made[kind]["no_imatrix"] == "" and not {each for each in failures if each.startswith(f"{kind}/")}
    base = made[kind]["folder"] / "base"
    plain = exact(load_base(base), ids)
    ties = TIES if kind in ROUTED_KINDS else 0
    own = divergence(plain, found[f"{kind}/F32"], but=ties)
    # What an engine does otherwise with exact weights, it does with these too.
    wanted = exact(with_files_weights(base, files[kind]["F32"], files[kind][TYPE]), ids)
    near, far = divergence(wanted, found[f"{kind}/{TYPE}"]), divergence(wanted, plain)
    print(f"{kind} {TYPE}: {near:.1e} from its own weights, {far:.1e} from the base; F32 {own:.1e}")
    bound = NEAR_ROUTED if kind in ROUTED_KINDS else NEAR
    assert own < NEAR and near < min(bound + own, far / 2) and far > 5 * NEAR
    if kind in ROUTED_KINDS:
        rest = divergence(wanted, found[f"{kind}/{PLAIN}"], but=ties)
        print(f"{kind} {PLAIN}: {rest:.1e} from its own weights")
        assert rest < NEAR_PLAIN, "what is farther is the rounding of activations, and nothing else"


def test_there_are_twenty_types_beyond_the_old_ones() -> None:
    whole = [kind for kind in KINDS if not {(kind, each) for each in (*METHODS, "gguf")} & {*REASONS}]
    assert len(KINDS) >= 30 and len(whole) >= 18
