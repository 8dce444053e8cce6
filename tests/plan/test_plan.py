"""A plan against published sizes, against real checkpoints, and against what it must refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fake_driver import NVML, FakeGpu
from tests.fake_hub import SHA, hub
from tests.places import ROOT
from workbench.errors import UserError
from workbench.machine import identity
from workbench.plan import formats, need, tensors
from workbench.plan import make as plan
from workbench.recipe.choices import BackendChoice, method_of
from workbench.recipe.load import Recipe, parse
from workbench.records import Machine, Variant
from workbench.shape import Sequences, Shape, Stored

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
PUBLISHED = {
    "Q2_K": 2.95,
    "Q3_K_S": 3.41,
    "IQ4_XS": 4.17,
    "Q4_K_S": 4.36,
    "Q4_K_M": 4.58,
    "Q5_K_M": 5.33,
    "Q6_K": 6.14,
    "Q8_0": 7.95,
    "F16": 14.96,
}
"""GiB of Llama-3.1-8B's files, by llama.cpp's own documentation of its quantizer."""


def recipe(**changes: Any) -> Recipe:
    data = {"base": {"config": LLAMA_8B, "init": "random"}, "variants": [{"gguf": "Q4_K_M"}]}
    return parse({**data, **changes}, Path("r.yaml"))


def shape(**changes: Any) -> Shape:
    read = {"config": {**LLAMA_8B, **changes}, "dtype": "bfloat16", "tensors": None, "naming": "hf"}
    return tensors.shape_of(read, "here")


def stored(of: Shape, method: str, **options: Any) -> Stored:
    module, chosen = method_of(Variant("v", method, options))
    return module.sizes(of, chosen, method)


def kv_cache(of: Shape, backend: str, tokens: int, batch: int = 1, cuda: bool = True, **options: Any) -> float | None:
    choice, load = BackendChoice(backend, options), Sequences(tokens, batch, 512)
    return need.need_of(of, Variant("base", "base"), choice, load, cuda).kv_cache_bytes


def test_the_kv_cache_of_llama_at_its_full_context() -> None:
    """17.2 GB in float16, as everybody computes it; q8_0 holds 34 bytes for 32 values."""
    whole = kv_cache(shape(), "llamacpp", 131072)
    assert whole == 2 * 32 * 8 * 128 * 131072 * 2 == pytest.approx(17.2e9, rel=0.002)
    assert kv_cache(shape(), "llamacpp", 131072, kv_cache="q8_0") == whole * 34 / 64
    assert kv_cache(shape(), "vllm", 131072, 2, kv_cache="fp8") == whole
    assert kv_cache(shape(), "transformers", 1000, cuda=False) == 2 * 32 * 8 * 128 * 1000 * 4
    assert kv_cache(replace(shape(), latent=576), "vllm", 1024) == 576 * 32 * 1024 * 2


def test_sizes_are_those_that_llama_cpp_publishes() -> None:
    for kind, gib in PUBLISHED.items():
        file = stored(shape(), "gguf", type=kind)
        assert file.disk_bytes / 2**30 == pytest.approx(gib, abs=0.006), kind
        assert file.fallbacks == ()
    assert shape().parameters == 8030261248


def test_groups_that_do_not_divide_a_layer_cannot_run() -> None:
    odd = shape(hidden_size=2880, num_attention_heads=45, num_key_value_heads=9, head_dim=64)

    def reason(**options: Any) -> str | None:
        choice = BackendChoice("transformers", {})
        return need.need_of(odd, Variant("v", "awq", options), choice, Sequences(576, 1, 512), False).unsupported

    assert reason() == "group_size 128 does not divide the inputs of every layer; take 32 or 64"
    assert reason(group_size=64) is reason(group_size=-1) is reason(engine="gptqmodel") is None


def test_what_falls_back_is_named() -> None:
    odd = shape(hidden_size=2880, num_attention_heads=45, num_key_value_heads=9, head_dim=64)
    file = stored(odd, "gguf", type="Q4_K_M")
    assert "blk.0.attn_q.weight" in file.fallbacks and file.types["blk.0.attn_q.weight"] == "Q5_0"
    assert "blk.0.ffn_down.weight" not in file.fallbacks  # 14336 is a multiple of 256
    variant = Variant("gguf-Q4_K_M", "gguf", {"type": "Q4_K_M"})
    found = need.need_of(odd, variant, BackendChoice("llamacpp", {}), Sequences(576, 1, 512), True)
    assert found.fallbacks == file.fallbacks


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 64},
        {"model_type": "mistral"},
        {"model_type": "gemma2", "head_dim": 64, "tie_word_embeddings": True},
        {"model_type": "phi3"},
        {"model_type": "gemma3_text", "head_dim": 64, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.slow
def test_tensors_by_configuration_are_those_that_transformers_makes(changes: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        **LLAMA_8B,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "pad_token_id": 0,
        **changes,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**small))
    named = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    ours = tensors.shape_of({"config": small, "dtype": "float32", "tensors": None, "naming": "hf"}, "here")
    theirs = tensors.shape_of({"config": small, "dtype": "float32", "tensors": named, "naming": "hf"}, "here")
    assert sum(map(_weights, named.values())) == ours.parameters
    mixtures = [stored(each, "gguf", type="Q4_K_M").disk_bytes for each in (ours, theirs)]
    assert mixtures[0] == mixtures[1]
    assert stored(ours, "awq", group_size=128) == stored(theirs, "awq", group_size=128)


def _weights(sides: tuple[int, ...]) -> int:
    total = 1
    for side in sides:
        total *= side
    return total


def test_experts_of_a_checkpoint_become_one_tensor_a_layer() -> None:
    stored = {"model.embed_tokens.weight": [128, 256], "model.layers.0.mlp.gate.weight": [4, 256]}
    for expert in range(4):
        stored[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = [256, 512]
    read = {"config": {**LLAMA_8B, "num_experts": 4}, "dtype": "bfloat16", "tensors": stored, "naming": "hf"}
    found = {tensor.name: tensor.shape for tensor in tensors.shape_of(read, "here").tensors}
    assert found["blk.0.ffn_down_exps.weight"] == (4, 256, 512)
    assert found["blk.0.ffn_gate_inp.weight"] == (4, 256)


@pytest.mark.parametrize(
    ("pair", "down", "router"),
    [
        (("mlp.experts.gate_up_proj", [4, 256, 1024]), ("mlp.experts.down_proj", [4, 512, 256]), "mlp.router"),
        (
            ("block_sparse_moe.input_linear.weight", [4, 1024, 256]),
            ("block_sparse_moe.output_linear.weight", [4, 256, 512]),
            "block_sparse_moe.router.layer",
        ),
        (
            ("feed_forward.experts.gate_up_proj", [4, 256, 1024]),
            ("feed_forward.experts.down_proj", [4, 512, 256]),
            "feed_forward.router",
        ),
    ],
)
def test_experts_that_files_hold_together(
    pair: tuple[str, list[int]], down: tuple[str, list[int]], router: str
) -> None:
    """gpt-oss, Granite and Llama 4: as many weights, and rows as long, as those of an expert by itself."""
    stored = {"model.embed_tokens.weight": [128, 256], f"model.layers.0.{router}.weight": [4, 256]}
    stored |= {f"model.layers.0.{name}": shape for name, shape in (pair, down)}
    read = {"config": {**LLAMA_8B, "hidden_size": 256, "num_local_experts": 4}, "dtype": "bfloat16"}
    found = tensors.shape_of({**read, "tensors": stored, "naming": "hf"}, "here").tensors
    assert {tensor.name: tensor.shape for tensor in found if "ffn" in tensor.name} == {
        "blk.0.ffn_gate_inp.weight": (4, 256),
        "blk.0.ffn_gate_exps.weight": (4, 512, 256),
        "blk.0.ffn_up_exps.weight": (4, 512, 256),
        "blk.0.ffn_down_exps.weight": (4, 256, 512),
    }


def test_what_does_not_fit_says_what_would() -> None:
    roomy = plan.make(recipe(), memory_bytes=40 << 30, context=131072, cuda=True)
    assert {need.fits for need in roomy.needs if need.backend == "llamacpp"} == {True}
    tight = plan.make(recipe(), memory_bytes=20 << 30, context=131072, cuda=True)
    need = next(n for n in tight.needs if (n.variant, n.backend) == ("gguf-Q4_K_M", "llamacpp"))
    assert need.fits is False and need.fits_context_tokens is not None
    again = plan.make(recipe(), memory_bytes=20 << 30, context=need.fits_context_tokens, cuda=True)
    assert next(n for n in again.needs if (n.variant, n.backend) == ("gguf-Q4_K_M", "llamacpp")).fits
    more = plan.make(recipe(), memory_bytes=20 << 30, context=need.fits_context_tokens + 257, cuda=True)
    assert not next(n for n in more.needs if (n.variant, n.backend) == ("gguf-Q4_K_M", "llamacpp")).fits
    assert "tokens would fit" in formats.terminal(tight)
    nothing = plan.make(recipe(), memory_bytes=1 << 30, cuda=True)
    assert not any(need.fits for need in nothing.needs)
    assert "does not fit at any context" in formats.terminal(nothing)


def test_both_formats_hold_every_pair_with_its_reason() -> None:
    made = plan.make(
        recipe(backends={"llamacpp": {"kv_cache": ["f16", "q8_0"]}, "vllm": {"kv_cache": "fp8"}}), cuda=False
    )
    listed = json.loads(formats.json_text(made))
    assert [(one["variant"], one["backend"], one["options"].get("kv_cache")) for one in listed] == [
        ("base", "llamacpp", "f16"),
        ("gguf-Q4_K_M", "llamacpp", "f16"),
        ("base", "llamacpp", "q8_0"),
        ("gguf-Q4_K_M", "llamacpp", "q8_0"),
        ("base", "vllm", "fp8"),
        ("gguf-Q4_K_M", "vllm", "fp8"),
    ]
    for one in listed:
        parts = [one[f"{part}_bytes"] for part in ("weights", "kv_cache", "workspace", "runtime")]
        assert (one["need_bytes"] == sum(parts)) if one["unsupported"] is None else parts == [None] * 4
    assert listed[2]["kv_cache_bytes"] < listed[0]["kv_cache_bytes"]
    text = formats.terminal(made)
    assert "cannot run" in text and "on GPUs only" in text and "q8_0" in text


def test_fp8_on_a_cpu_is_refused_with_the_way_out() -> None:
    made = plan.make(recipe(backends={"vllm": {"kv_cache": "fp8"}}), cuda=False)
    assert "GPUs only" in str(made.needs[0].unsupported) and "q8_0" in str(made.needs[0].unsupported)
    on_gpu = plan.make(recipe(backends={"vllm": {"kv_cache": "fp8"}}), cuda=True, memory_bytes=1 << 34)
    assert on_gpu.needs[0].unsupported is None


def test_tensor_parallel_sizes_are_planned_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB of weights do not fit into one memory of 12 GiB, and do into two; a machine with two GPUs has no four."""
    asked = recipe(backends={"vllm": {"tensor_parallel": [1, 2, 4]}})
    made = plan.make(asked, cuda=True, memory_bytes=12 << 30)
    base = [need for need in made.needs if need.variant == "base"]
    assert [(need.devices, need.fits) for need in base] == [(1, False), (2, True), (4, True)]
    assert [each.runtime_bytes for each in base] == [int(n * need.CUDA_CONTEXT_BYTES) for n in (1, 2, 4)]
    assert "tensor parallel" in formats.terminal(made)
    plain = formats.terminal(plan.make(recipe(backends={"vllm": {}}), cuda=True, memory_bytes=12 << 30))
    assert "tensor parallel" not in plain
    monkeypatch.setitem(sys.modules, "pynvml", NVML([FakeGpu(uuid=f"GPU-{n}", total=12 << 30) for n in range(2)]))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    identity.machine.cache_clear()
    try:
        here = [need for need in plan.make(asked, cuda=True).needs if need.variant == "base"]
    finally:
        identity.machine.cache_clear()
    assert [need.unsupported for need in here] == [None, None, "it is to have 4 GPUs, and 2 are visible here"]
    assert [need.fits for need in here] == [False, True, None]


def test_a_processors_memory_is_not_multiplied() -> None:
    asked = recipe(backends={"vllm": {"tensor_parallel": [1, 2]}})
    needs = [need for need in plan.make(asked, cuda=False, memory_bytes=12 << 30).needs if need.variant == "base"]
    assert [(need.devices, need.fits) for need in needs] == [(1, False), (2, False)]


@pytest.mark.parametrize("part", ["evaluation", "calibration"])
def test_windows_longer_than_the_models_context_are_refused(part: str) -> None:
    """They gave numbers of a model beyond its training, or an engine's own words after everything was made."""
    windows = {"source": {"text": "x"}, "window": 200_000, "windows": 1}
    with pytest.raises(UserError, match=f"{part}.*: windows of 200,000 tokens are longer than the model's context of"):
        plan.make(recipe(**{part: windows}), memory_bytes=1 << 40, cuda=False)


def test_sequences_longer_than_the_models_context_are_refused() -> None:
    with pytest.raises(UserError, match=r"r\.yaml: workload: sequences of 131,136 tokens are longer than .*131,072"):
        plan.make(recipe(workload={"prompt_tokens": [512, 131072]}))
    with pytest.raises(UserError, match="--context: sequences of 200,000"):
        plan.make(recipe(), context=200_000)
    with pytest.raises(UserError, match="--batch 0: at least 1"):
        plan.make(recipe(), batch=0)


def test_an_unknown_architecture_is_refused_unless_its_files_tell() -> None:
    with pytest.raises(UserError, match="tensors of a 'lama' do not follow .* Did you mean 'llama'"):
        shape(model_type="lama")
    with pytest.raises(UserError, match="does not say 'hidden_size'"):
        tensors.shape_of(
            {"config": {"model_type": "llama"}, "dtype": "bfloat16", "tensors": {}, "naming": "hf"}, "here"
        )


def test_a_directory_is_planned_from_its_headers(tiny_llama: Path) -> None:
    made = plan.make(recipe(base={"path": str(tiny_llama)}), cuda=False)
    base = next(need for need in made.needs if (need.variant, need.backend) == ("base", "transformers"))
    files = sum(path.stat().st_size for path in tiny_llama.glob("*.safetensors"))
    assert 0 < files - base.disk_bytes < 8192  # The rest is the file's header.


@pytest.mark.slow
def test_a_bases_layers_are_shown_as_running_them_finds_them(tiny_llama: Path) -> None:
    kinds = plan.layers(recipe(base={"path": str(tiny_llama)}))
    assert formats.layers(kinds, "terminal").splitlines()[1:] == [
        "  self_attn.q_proj, self_attn.k_proj, self_attn.v_proj <- input_layernorm",
        "  self_attn.o_proj <- self_attn.v_proj, each for 2 heads",
        "  mlp.gate_proj, mlp.up_proj <- post_attention_layernorm",
        "  mlp.down_proj <- mlp.up_proj",
    ]
    (found,) = json.loads(formats.layers(kinds, "json"))
    assert found["layers"] == "0-1" and len(found["groups"]) == 4
    with pytest.raises(UserError, match="'gpt_neox' keeps its decoder layers elsewhere"):
        plan.layers(recipe(base={"config": LLAMA_8B | {"model_type": "gpt_neox"}, "init": "random"}))


def test_gram_matrices_that_are_kept_are_planned(tiny_llama: Path) -> None:
    """Once, whatever looks at them: half a symmetric matrix of 64 inputs three times a layer, and one of 128."""
    calibration = {"source": {"text": "many words " * 99}, "window": 8, "windows": 2}
    plain, one, two = (
        plan.make(recipe(base={"path": str(tiny_llama)}, variants=variants, calibration=calibration), cuda=False)
        for variants in (
            [{"gguf": {"type": "Q4_0", "imatrix": True}}],
            [{"gguf": {"type": "Q4_0", "rounding": "compensated"}}],
            [{"gguf": {"type": kind, "rounding": "compensated"}} for kind in ("Q4_0", "Q4_1")],
        )
    )
    grams = 2 * 4 * (3 * 64 * 65 // 2 + 128 * 129 // 2)
    assert one.disk_bytes - plain.disk_bytes == grams
    assert two.disk_bytes - one.disk_bytes == two.needs[-1].disk_bytes


def test_hidden_states_of_a_pass_backward_are_planned(tiny_llama: Path) -> None:
    calibration = {"source": {"text": "many words " * 99}, "window": 8, "windows": 2}
    inputs, outputs = (
        plan.make(
            recipe(
                base={"path": str(tiny_llama)},
                variants=[{"gptq": {"group_size": 32, "objective": objective}}],
                calibration=calibration,
            ),
            cuda=False,
        )
        for objective in ("input", "output")
    )
    assert outputs.disk_bytes - inputs.disk_bytes == 4 * 16 * 64 * (2 + 3)


def hub_plan(tmp_path: Path, **env: str) -> list[dict[str, Any]]:
    """What `workbench plan` prints as JSON for a base on the hub, with a hub cache of its own."""
    (tmp_path / "r.yaml").write_text("base: {hub: owner/name}\nvariants: [{gguf: Q8_0}]\n")
    own = {"WORKBENCH_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "plan", str(tmp_path / "r.yaml"), "--device", "cpu", "-f", "json"],
        env={**os.environ, **own, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def base_needs(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the base needs, engine by engine, by whatever name."""
    return [{**need, "base": ""} for need in made if need["variant"] == "base"]


def by_path(model: Path) -> list[dict[str, Any]]:
    """The same of a plan of the files themselves."""
    return base_needs(json.loads(formats.json_text(plan.make(recipe(base={"path": str(model)}), cuda=False))))


def test_a_base_on_the_hub_is_planned_from_its_snapshot(tiny_llama: Path, tmp_path: Path) -> None:
    """`plan` failed for every base on the hub: a tensor's type and shape had changed places."""
    repo = tmp_path / "hf" / "hub" / "models--owner--name"
    shutil.copytree(tiny_llama, repo / "snapshots" / SHA)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    made = hub_plan(tmp_path, HF_HUB_OFFLINE="1")
    assert base_needs(made) == by_path(tiny_llama)


@pytest.fixture
def headers_hub(tiny_llama: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub on loopback with one model; and what was asked of it."""
    with hub({"owner/name": tiny_llama}) as found:
        yield found


def test_a_base_on_the_hub_is_planned_from_headers_alone(
    tiny_llama: Path, tmp_path: Path, headers_hub: tuple[str, list[str]]
) -> None:
    endpoint, asked = headers_hub
    made = hub_plan(tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
    assert base_needs(made) == by_path(tiny_llama)
    assert [line for line in asked if line.startswith("GET model.safetensors")] == ["GET model.safetensors 0-100000"], (
        "no weights but what came with the header"
    )


def test_nothing_is_fetched_for_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        plan.make(recipe(base={"path": str(tmp_path / "nowhere")}))
    with pytest.raises(UserError, match="hub is off"):
        plan.make(recipe(base={"hub": "nobody/nothing"}))


def test_the_plan_is_for_the_point_that_needs_most() -> None:
    """Prompts of each length alone, and the first length in each batch: never the longest in the largest."""
    load = {"prompt_tokens": [512, 4096], "new_tokens": 128, "batch": [1, 4], "requests": 2}
    made = plan.make(recipe(workload=load, backends={"llamacpp": None}), cuda=True, memory_bytes=1 << 40)
    cache = made.needs[0].kv_cache_bytes
    assert cache == kv_cache(shape(), "llamacpp", 4224)
    wide = plan.make(
        recipe(workload={**load, "batch": [1, 16]}, backends={"llamacpp": None}), cuda=True, memory_bytes=1
    )
    assert wide.needs[0].kv_cache_bytes == kv_cache(shape(), "llamacpp", 512 + 192, 16)
    assert "16 of 640 or 704 tokens" in formats.terminal(wide)
    one = plan.make(recipe(workload=load, backends={"llamacpp": None}), cuda=True, memory_bytes=1 << 40, context=1024)
    assert [(point.tokens, point.batch) for point in one.points] == [(1024, 1)]


def test_out_of_memory_is_answered_with_the_batch_that_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine of 24 GiB, Llama-3.1-8B in four bits takes some sequences of 8,192 tokens, and not 64."""
    from workbench.machine import identity

    monkeypatch.setattr(identity, "machine", lambda: Machine(memory_bytes=24 << 30))
    monkeypatch.setattr(identity, "has_cuda", lambda: False)
    wide = recipe(workload={"prompt_tokens": 8000, "new_tokens": 192, "batch": 64}, backends={"llamacpp": None})
    said = plan.advice(wide, wide.backends[0], "gguf-Q4_K_M")
    assert "a batch of 64 needs" in said and "of 24.00 GiB here" in said
    batch = int(said.split("and a batch of ")[1].split()[0])
    assert 1 < batch < 64
    for many, fits in ((batch, True), (batch + 1, False)):
        made = plan.make(wide, memory_bytes=24 << 30, batch=many, cuda=False)
        assert next(need for need in made.needs if need.variant == "gguf-Q4_K_M").fits is fits
    assert plan.advice(wide, wide.backends[0], "no-such-variant") == ""
    small = recipe(backends={"llamacpp": None})
    assert plan.advice(small, small.backends[0], "gguf-Q4_K_M").endswith(" here")


def test_every_evaluation_set_and_the_scores_of_attention_need_room() -> None:
    def workspace(backend: dict[str, Any], **sets: int) -> float:
        texts = {
            name: {"source": {"text": "many words " * 9999}, "window": size, "windows": 1}
            for name, size in sets.items()
        }
        asked = recipe(evaluation=texts, backends={"transformers": backend})
        made = plan.make(asked, memory_bytes=1 << 40, cuda=False)
        return float(next(each.workspace_bytes or 0 for each in made.needs if each.variant == "base"))

    short, long = workspace({}, first=512), workspace({}, first=512, second=8192)
    assert long > 2**31 > 2**29 > short
    # 32 heads, the scores of a prompt of 512 with their softmax in float32.
    assert workspace({"attention": "eager"}, first=512) > 32 * 512**2 * 8
