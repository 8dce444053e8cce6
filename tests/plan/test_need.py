"""What a shape holds and a variant needs, by hand from a tiny configuration; and the disk that all of it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.plan import make as plan
from workbench.plan.need import CUDA_CONTEXT_BYTES, need_of
from workbench.plan.tensors import shape_of
from workbench.recipe.choices import BackendChoice
from workbench.recipe.load import Recipe, parse
from workbench.records import Variant
from workbench.shape import Sequences, Shape
from workbench.worker.backends import backend_named
from workbench.worker.methods import method_named

TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LOAD = Sequences(1000, 2, 900, 512)
LINEAR = 256 * 256 * 2 + 2 * 128 * 256 + 3 * 512 * 256
"""Weights of a layer's matrices: q and o, k and v, gate, up and down."""


def shape(tensors: dict[str, list[int]] | None = None, dtype: str = "bfloat16", **changes: Any) -> Shape:
    config = {name: value for name, value in {**TINY, **changes}.items() if value is not None}
    return shape_of({"config": config, "dtype": dtype, "tensors": tensors, "naming": "hf"}, "here")


def named(of: Shape) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in of.tensors}


def test_the_tensors_of_a_llama_by_hand() -> None:
    of = shape()
    found = named(of)
    layer = {
        "attn_norm.weight": (256,),
        "ffn_norm.weight": (256,),
        "attn_q.weight": (256, 256),
        "attn_k.weight": (128, 256),
        "attn_v.weight": (128, 256),
        "attn_output.weight": (256, 256),
        "ffn_gate.weight": (512, 256),
        "ffn_up.weight": (512, 256),
        "ffn_down.weight": (256, 512),
    }
    assert found == {
        "token_embd.weight": (1000, 256),
        "output.weight": (1000, 256),
        "output_norm.weight": (256,),
    } | {f"blk.{index}.{name}": sides for index in (0, 1) for name, sides in layer.items()}
    assert of.parameters == 2 * 256_000 + 256 + 2 * (LINEAR + 512)
    assert (of.hidden, of.head_dim, of.inner, of.vocab_size, of.context_tokens) == (256, 64, 512, 1000, 4096)
    assert (of.traits.layers, of.traits.heads, of.traits.kv_heads, of.traits.experts) == (2, 4, 2, 0)


QKV = {"attn_q.bias", "attn_k.bias", "attn_v.bias"}
MORE: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "tied": ({"tie_word_embeddings": True}, set(), {"output.weight"}),
    "attention": ({"attention_bias": True}, {*QKV, "attn_output.bias"}, set()),
    "mlp": ({"mlp_bias": True}, {"ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"}, set()),
    "qwen2": ({"model_type": "qwen2"}, QKV, set()),
    "qwen3": ({"model_type": "qwen3"}, {"attn_q_norm.weight", "attn_k_norm.weight"}, set()),
    "gemma2": (
        {"model_type": "gemma2", "tie_word_embeddings": None},
        {"post_attention_norm.weight", "post_ffw_norm.weight"},
        {"output.weight"},
    ),
}
"""Changes of a configuration -> what each layer has more, and what the model has less."""


@pytest.mark.parametrize("name", MORE)
def test_what_other_architectures_have_more_and_less(name: str) -> None:
    changes, more, less = MORE[name]
    plain, other = named(shape()), named(shape(**changes))
    assert set(other) - set(plain) == {f"blk.{index}.{each}" for index in (0, 1) for each in more}
    assert set(plain) - set(other) == less
    for tensor, sides in other.items():
        if tensor.endswith(".bias"):
            assert sides == (other[tensor.replace(".bias", ".weight")][0],)
        if tensor.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
            assert sides == (64,)


def test_what_a_configuration_says_beside_sizes() -> None:
    assert shape(max_position_embeddings=None).context_tokens == 0
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        assert shape(tensors={}, **{key: 6}).traits.experts == 6
    windowed = {"sliding_window": 64}
    assert shape(**windowed).sliding_window == shape(**windowed, use_sliding_window=True).sliding_window == 64
    assert shape(**windowed, use_sliding_window=False).sliding_window is shape(sliding_window=0).sliding_window is None
    latent = shape(kv_lora_rank=32, qk_rope_head_dim=16)
    assert latent.latent == 48 and latent.cached_values == 2 * 48
    assert shape(kv_lora_rank=32).latent == 32 and shape(qk_rope_head_dim=16).latent is None
    assert shape().cached_values == 2 * 2 * 2 * 64
    inside = {"model_type": "gemma3", "text_config": TINY | {"model_type": "gemma3_text"}, "hidden_size": 1}
    assert shape_of({"config": inside, "dtype": "float16", "tensors": None, "naming": "hf"}, "here").hidden == 256
    with pytest.raises(UserError, match="^here: its config.json does not say"):
        shape(hidden_size=None)


def test_a_checkpoints_names_are_those_of_a_gguf_file() -> None:
    hf = {
        "model.embed_tokens.weight": [1000, 256],
        "lm_head.weight": [1000, 256],
        "model.norm.weight": [256],
        "model.layers.11.self_attn.q_proj.weight": [256, 256],
        "model.layers.11.self_attn.k_proj.bias": [128],
        "model.layers.11.self_attn.q_norm.weight": [64],
        "model.layers.11.self_attn.k_norm.weight": [64],
        "model.layers.11.mlp.down_proj.weight": [256, 512],
        "model.layers.11.input_layernorm.weight": [256],
        "model.layers.11.post_attention_layernorm.weight": [256],
    }
    assert named(shape(tensors=hf)) == {
        "token_embd.weight": (1000, 256),
        "output.weight": (1000, 256),
        "output_norm.weight": (256,),
        "blk.11.attn_q.weight": (256, 256),
        "blk.11.attn_k.bias": (128,),
        "blk.11.attn_q_norm.weight": (64,),
        "blk.11.attn_k_norm.weight": (64,),
        "blk.11.ffn_down.weight": (256, 512),
        "blk.11.attn_norm.weight": (256,),
        "blk.11.ffn_norm.weight": (256,),
    }
    gemma = {
        "model.language_model.layers.0.post_attention_layernorm.weight": [256],
        "model.language_model.layers.0.pre_feedforward_layernorm.weight": [256],
    }
    assert set(named(shape(tensors=gemma))) == {"blk.0.post_attention_norm.weight", "blk.0.ffn_norm.weight"}
    experts = {f"model.layers.3.{part}.weight": [512, 256] for part in (
        "mlp.experts.0.gate_proj", "mlp.experts.1.gate_proj", "mlp.experts.0.up_proj",
        "block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.7.w2", "block_sparse_moe.experts.7.w3",
    )} | {"model.layers.3.block_sparse_moe.gate.weight": [8, 256]}  # fmt: skip
    assert named(shape(tensors=experts)) == {
        "blk.3.ffn_gate_exps.weight": (3, 512, 256),
        "blk.3.ffn_up_exps.weight": (2, 512, 256),
        "blk.3.ffn_down_exps.weight": (1, 512, 256),
        "blk.3.ffn_gate_inp.weight": (8, 256),
    }
    as_it_is = shape_of({"config": TINY, "dtype": "float16", "tensors": {"x.weight": [2, 3]}, "naming": "gguf"}, "here")
    assert named(as_it_is) == {"x.weight": (2, 3)}


@pytest.mark.parametrize("cuda", [False, True])
def test_a_need_is_the_sum_of_its_parts(cuda: bool) -> None:
    of, choice = shape(), BackendChoice("transformers", {})
    found = need_of(of, Variant("base", "base"), choice, LOAD, cuda)
    backend = backend_named("transformers")
    expected = backend.needs(of, "hf", _stored(of), LOAD, backend.Options(), cuda)
    runtime = CUDA_CONTEXT_BYTES if cuda else expected.runtime
    parts = (found.weights_bytes, found.kv_cache_bytes, found.workspace_bytes, found.runtime_bytes)
    assert parts == tuple(map(int, (expected.weights, expected.kv_cache, expected.workspace, runtime)))
    assert found.need_bytes == pytest.approx(expected.weights + expected.kv_cache + expected.workspace + runtime, abs=1)
    assert CUDA_CONTEXT_BYTES == 600e6
    assert found.disk_bytes == 2 * of.parameters and found.bits_per_weight == 16.0
    assert (found.unsupported, found.devices) == (None, 1)


def _stored(of: Shape) -> Any:
    from workbench.worker.methods import method_named

    base = method_named("base")
    return base.sizes(of, base.Options(), "hf")


def test_bits_a_weight_are_rounded_to_four_digits() -> None:
    of = shape()
    found = need_of(of, Variant("v", "awq", {"group_size": 128}), BackendChoice("vllm", {}), LOAD, True)
    packed = LINEAR // 2 + sum(
        columns // 128 * (rows // 2 + 2 * rows)
        for rows, columns in ((256, 256), (256, 256), (128, 256), (128, 256), (512, 256), (512, 256), (256, 512))
    )
    total = 2 * (2 * 256_000 + 256 + 2 * 512) + 2 * packed
    assert (found.disk_bytes, found.bits_per_weight) == (total, round(8 * total / of.parameters, 4))


def test_a_sliding_window_and_a_refusal_are_told() -> None:
    windowed = need_of(shape(sliding_window=64), Variant("base", "base"), BackendChoice("llamacpp", {}), LOAD, False)
    assert windowed.notes[0] == "layers with a sliding window of 64 may keep less than this KV cache"
    for variant, backend in (
        (Variant("v", "awq", {"group_size": 384}), "transformers"),
        (Variant("v", "gptq", {"group_size": 64, "desc_act": True}), "llamacpp"),
        (Variant("v", "gptq", {"bits": 3, "group_size": 64}), "vllm"),
    ):
        found = need_of(shape(), variant, BackendChoice(backend, {}), LOAD, False)
        assert found.unsupported and found.need_bytes is found.fits is None and found.disk_bytes > 0


# --- whole plans ----------------------------------------------------------------------------------

GGUF = [{"gguf": "Q8_0"}]


def recipe(variants: list[Any], base: dict[str, Any] | None = None, **more: Any) -> Recipe:
    data = {"base": base or {"config": TINY, "init": "random"}, "variants": variants, "backends": {"llamacpp": None}}
    data["calibration"] = {"source": {"text": "x"}, "window": 64}
    return parse({**data, **more}, Path("r.yaml"))


def disk(of: Shape, *variants: Any, base: dict[str, Any] | None = None, backend: str = "llamacpp") -> int:
    return plan.make(
        recipe(list(variants), base, backends={backend: None}), shape=of, memory_bytes=1, cuda=False
    ).disk_bytes


def test_the_disk_is_that_of_the_base_its_conversion_and_every_variant() -> None:
    of = shape()
    base = 2 * of.parameters
    here = {"path": "/nowhere"}
    awq, gptq = ({method: {"group_size": 64}} for method in ("awq", "gptq"))
    packed = _of(of, "awq", group_size=64)
    assert disk(of, awq, backend="transformers") == base + packed, "a base that is drawn or fetched is written"
    assert disk(of, awq, base=here, backend="transformers") == packed, "and one that is there is not"
    assert disk(of, awq, gptq, base=here, backend="transformers") == packed + _of(of, "gptq", group_size=64)
    # An engine that reads GGUF alone needs the base's conversion too, in 16 bits what it holds itself.
    with_gguf = base + _of(of, "gguf", type="Q8_0")
    assert disk(of, {"gguf": "Q8_0"}) == 2 * base + _of(of, "gguf", type="Q8_0")
    assert disk(of, {"gguf": "Q8_0"}, base=here) == with_gguf
    wide = replace(of, dtype="float32")
    converted = disk(wide, {"gguf": "Q8_0"}, base=here) - _of(wide, "gguf", type="Q8_0")
    assert converted == 2 * base + _base_as_gguf(wide), "float32 is converted, and once more to 16 bits to be run"


def _of(of: Shape, method: str, **options: Any) -> int:
    from workbench.recipe.choices import method_of

    module, chosen = method_of(Variant("v", method, options))
    return int(module.sizes(of, chosen, module.WRITES[0]).disk_bytes)


def _base_as_gguf(of: Shape) -> int:
    from workbench.worker.methods import method_named

    base = method_named("base")
    return int(base.sizes(of, base.Options(), "gguf").disk_bytes)


def test_what_does_not_fit_is_told_the_longest_context_that_does() -> None:
    """By trying every length."""
    of = shape(num_hidden_layers=2, num_key_value_heads=4)
    variant, choice = Variant("base", "base"), BackendChoice("transformers", {})
    point = Sequences(150, 1, 120, 0)

    def need(tokens: int) -> int:
        shorter = point._replace(tokens=tokens, prompt_tokens=min(120, tokens))
        return need_of(of, variant, choice, shorter, False).need_bytes or 0

    for memory in (need(150) - 1, need(70), need(1) - 1):
        found = plan._fitted(need_of(of, variant, choice, point, False), of, variant, choice, point, False, memory)
        fitting = [tokens for tokens in range(1, 151) if need(tokens) <= memory]
        assert (found.fits, found.fits_context_tokens) == (False, max(fitting, default=None))
    enough = plan._fitted(need_of(of, variant, choice, point, False), of, variant, choice, point, False, need(150))
    assert (enough.fits, enough.fits_context_tokens) == (True, None)


def test_points_are_the_workloads_and_those_that_are_served() -> None:
    asked = recipe(
        GGUF,
        workload={"prompt_tokens": [100, 300], "new_tokens": 20, "batch": [1, 8], "requests": 3},
        evaluation={"source": {"text": "x"}, "window": 64, "windows": 2},
    )
    made = plan.make(asked, shape=shape(), memory_bytes=1 << 40, cuda=False)
    assert made.points == (
        Sequences(120, 1, 100, 64),
        Sequences(320, 1, 300, 64),
        Sequences(120, 8, 100, 64),
        Sequences(130, 1, 100, 64),
        Sequences(130, 8, 100, 64),
    )
    assert (made.context_tokens, made.batch, made.memory_bytes, made.parameters) == (
        320,
        8,
        1 << 40,
        shape().parameters,
    )
    asked = recipe(GGUF, workload={"prompt_tokens": 100, "new_tokens": 20, "batch": 8})
    for context, batch, point in (
        (50, None, Sequences(50, 8, 50, 0)),
        (500, None, Sequences(500, 8, 100, 0)),
        (None, 3, Sequences(120, 3, 100, 0)),
    ):
        found = plan.make(asked, shape=shape(), context=context, batch=batch, memory_bytes=1, cuda=False)
        assert found.points == (point,)


@pytest.mark.parametrize(("tokens", "refused"), [(4096, False), (4097, True)])
def test_what_is_longer_than_the_context_is_refused(tokens: int, refused: bool) -> None:
    load = {"prompt_tokens": tokens - 16, "new_tokens": 16}
    if not refused:
        assert plan.check_context(recipe(GGUF, workload=load), 4096) == []
        return
    with pytest.raises(
        UserError, match="r.yaml: workload: sequences of 4,097 tokens .* 4,096: use fewer `prompt_tokens`"
    ):
        plan.check_context(recipe(GGUF, workload=load), 4096)
    (note,) = plan.check_context(recipe(GGUF, workload=load), 0)
    assert "does not say how long its context is" in note and f"workload: {tokens:,}" in note


def test_a_gguf_file_in_vllm_is_de_quantized_or_stays_packed() -> None:
    """On a CPU only the type of 4 bits, on a GPU that of 8 too; the output matrix of Q6_K and norms in 16 bits."""
    of, backend, method = shape(), backend_named("vllm"), method_named("gguf")
    plain = of.parameters - 2 * LINEAR
    for kind, bits, where in (("Q4_0", 4.5, (False, True)), ("Q8_0", 8.5, (True,))):
        stored = method.sizes(of, method.Options(type=kind), "gguf")
        for cuda in (False, True):
            weights, packed = (
                backend.needs(of, "gguf", stored, LOAD, backend.Options(gguf=how), cuda).weights
                for how in ("dequantize", "repack")
            )
            assert weights == 2 * of.parameters
            assert packed == (2 * LINEAR * bits / 8 + 2 * plain if cuda in where else weights), (kind, cuda)


def test_an_option_that_came_later_leaves_keys_as_they_were() -> None:
    """What was measured before there was `gguf: repack` is not measured again."""
    base = {"base": {"path": "x"}, "variants": [{"gguf": "Q4_0"}]}
    for backend in ("vllm", "vllm-serve"):
        before, packed = (
            parse({**base, "backends": {backend: given}}, Path("r.yaml")).backends[0].options
            for given in ({}, {"gguf": "repack"})
        )
        assert "gguf" not in before and packed == before | {"gguf": "repack"}


def test_packed_kernels_of_vllm_are_for_16_bits() -> None:
    backend = backend_named("vllm")
    said = "vLLM's packed kernels compute in 16 bits: leave out `gguf: repack` or `dtype: float32`"
    assert backend.refuses(backend.Options(dtype="float32", gguf="repack"), "gguf", False) == said
    assert backend.refuses(backend.Options(dtype="float16", gguf="repack"), "gguf", False) is None
