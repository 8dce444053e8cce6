"""The calibration pass end to end on small random models of every architecture it knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.worker import calibrate, imatrix

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 354, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 256},
}
TOKENS = 24 * 40


def write_model(folder: Path, kind: str, seed: int = 0) -> Path:
    """A random model with weights large enough for its layers to matter, and biases and norms that are not trivial."""
    more = dict(MODELS[kind])
    config = transformers.AutoConfig.for_model(more.pop("model_type", kind), **SIZES | more)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith(".bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() == 2 and "embed" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def write_tokens(path: Path, lengths: list[int], vocabulary: int = 354, seed: int = 1) -> Path:
    chance = torch.Generator().manual_seed(seed)
    windows = [torch.randint(3, vocabulary, (n,), generator=chance).tolist() for n in lengths]
    path.write_text(json.dumps({"windows": windows}))
    return path


def payload(base: Path, folder: Path, variants: dict[str, tuple[str, dict[str, Any]]], **more: Any) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = more.pop("tokens", None) or write_tokens(folder / "tokens.json", [40] * 24)
    entries = []
    for name, (method, options) in variants.items():
        (folder / name).mkdir(exist_ok=True)
        entries.append({"name": name, "method": method, "options": options, "out": str(folder / name)})
    return {
        "base": str(base), "tokens": str(tokens), "tokens_digest": "t", "variants": entries,
        "imatrix_out": str(folder / "i.gguf"), "state": str(folder / "state"), "device": "cpu", "threads": 1,
        "seed": 0, "precision": "float32",
    } | more  # fmt: skip


def quiet(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total * 1.001


def run(*args: Any, **more: Any) -> dict[str, Any]:
    return calibrate.run(payload(*args, **more), quiet)


VARIANTS = {
    "awq": ("awq", {"group_size": 32}),
    "awq-compensated": ("awq", {"group_size": 32, "rounding": "compensated"}),
    "gptq": ("gptq", {"group_size": 32}),
    "gptq-8": ("gptq", {"group_size": -1, "bits": 8}),
}


def dequantized(base: Path, out: Path, method: str, bits: int) -> Any:
    """The base's model with a written checkpoint's weights in place, float32."""
    from safetensors.torch import load_file

    from workbench.worker.methods import awq, gptq

    tensors = load_file(out / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    state = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            parts = {
                s: tensors[f"{stem}.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx") if f"{stem}.{s}" in tensors
            }
            state[f"{stem}.weight"] = awq.dequantize(parts) if method == "awq" else gptq.dequantize(parts, bits)
        elif suffix not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra and set(missing) <= {"lm_head.weight"}
    return model.eval()


def relative(found: Any, expected: Any) -> float:
    expected = expected - expected.mean(-1, keepdim=True)
    found = found - found.mean(-1, keepdim=True)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """The forward pass is the model's own, and every variant computes nearly what the base does."""
    base = write_model(tmp_path / "base", kind)
    made = run(base, tmp_path / "work", VARIANTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    windows = torch.tensor(json.loads((tmp_path / "work/tokens.json").read_text())["windows"])

    inputs: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.__setitem__(name, x[0].reshape(-1, x[0].shape[-1]))
            )
    with torch.no_grad():
        expected = model(windows).logits
    importance = imatrix.load(tmp_path / "work/i.gguf")
    described = calibrate._Base.open(base).architecture
    assert len(importance) == 2 * len(described.linears)
    for layer in range(2):
        for linear, short in described.gguf.items():
            x = inputs[f"model.layers.{layer}.{linear}"]
            torch.testing.assert_close(
                torch.from_numpy(importance[f"blk.{layer}.{short}.weight"]), (x * x).mean(0), rtol=2e-4, atol=1e-6
            )
    # How near 4 bits come depends on the architecture; that 8 bits come much nearer shows that nothing else is off.
    shares = {}
    for name, (method, options) in VARIANTS.items():
        quantized = dequantized(base, tmp_path / "work" / name, method, options.get("bits", 4))
        with torch.no_grad():
            shares[name] = relative(quantized(windows).logits, expected)
        errors = made["variants"][name]["tensor_errors"]
        assert len(errors) == 2 * len(described.linears)
        assert all(0 <= value < 0.05 for value in errors.values())
    assert shares["gptq-8"] < 0.03
    assert shares["gptq"] < 0.5 and shares["awq"] < 1.4 * shares["gptq"], shares
    assert shares["awq-compensated"] < 1.2 * shares["gptq"], shares


def test_bytes_repeat_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "one", VARIANTS)
    run(base, tmp_path / "two", VARIANTS)

    real, calls = calibrate._forward, []

    def dies_in_second_layer(*args: Any) -> Any:
        calls.append(args[2])
        if args[2] == 1 and calls.count(1) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrate, "_forward", dies_in_second_layer)
    request = payload(base, tmp_path / "three", VARIANTS)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(request, quiet)
    resumed = calibrate.run(request, quiet)
    assert calls == [0, 1, 1]
    assert len(resumed["variants"]["awq"]["tensor_errors"]) == 14
    for name in VARIANTS:
        for file in sorted((tmp_path / "one" / name).iterdir()):
            content = file.read_bytes()
            assert content == (tmp_path / "two" / name / file.name).read_bytes(), file.name
            assert content == (tmp_path / "three" / name / file.name).read_bytes(), file.name
    assert (tmp_path / "one/i.gguf").read_bytes() == (tmp_path / "three/i.gguf").read_bytes()


def test_interrupted_work_of_other_tokens_is_not_gone_on_with(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    request = payload(base, tmp_path / "work", {"gptq": VARIANTS["gptq"]})
    calibrate.run(request, quiet)
    first = (tmp_path / "work/gptq/model.safetensors").read_bytes()
    other = write_tokens(tmp_path / "other.json", [40] * 24, seed=5)
    calibrate.run(request | {"tokens": str(other), "tokens_digest": "u"}, quiet)
    assert (tmp_path / "work/gptq/model.safetensors").read_bytes() != first


def test_what_is_written_beside_the_weights(tmp_path: Path, tiny_llama: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens.json", [40] * 24)
    run(tiny_llama, tmp_path / "work", VARIANTS, tokens=tokens)
    for name, (method, _) in VARIANTS.items():
        out = tmp_path / "work" / name
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == method
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
        assert config["torch_dtype"] == config["dtype"] == "float16"
        assert (out / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
        assert (out / "quantize_config.json").exists() == (method == "gptq")
        assert not list(out.glob("*.new"))


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "whole", {"gptq": VARIANTS["gptq"]})
    monkeypatch.setattr(calibrate, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(calibrate, "COPY_BYTES", 1_000)
    run(base, tmp_path / "split", {"gptq": VARIANTS["gptq"]})
    from safetensors.torch import load_file

    whole = load_file(tmp_path / "whole/gptq/model.safetensors")
    index = json.loads((tmp_path / "split/gptq/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and set(index["weight_map"]) == set(whole)
    for file in set(index["weight_map"].values()):
        for name, tensor in load_file(tmp_path / "split/gptq" / file).items():
            assert index["weight_map"][name] == file and torch.equal(tensor, whole[name])


def test_windows_of_different_lengths(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "qwen2")
    lengths = [40, 17, 40, 33, 17, 5, 120]
    run(base, tmp_path / "work", {}, tokens=write_tokens(tmp_path / "tokens.json", lengths))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    seen: list[Any] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.no_grad():
        for window in json.loads((tmp_path / "tokens.json").read_text())["windows"]:
            model(torch.tensor([window]))
    expected = (torch.cat(seen) ** 2).mean(0)
    found = torch.from_numpy(imatrix.load(tmp_path / "work/i.gguf")["blk.1.ffn_down.weight"])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-7)


def test_bfloat16_pass_is_near_the_float32_pass(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "full", {})
    run(base, tmp_path / "half", {}, precision="bfloat16")
    full, half = imatrix.load(tmp_path / "full/i.gguf"), imatrix.load(tmp_path / "half/i.gguf")
    for name, values in full.items():
        assert abs(half[name] / values - 1).max() < 0.03
    assert (tmp_path / "full/i.gguf").read_bytes() != (tmp_path / "half/i.gguf").read_bytes()


# --- bad input ----------------------------------------------------------------------------------


def test_group_size_that_does_not_divide(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    with pytest.raises(
        UserError, match=r"q_proj \(64 x 64\): group_size 128 does not divide its 64 inputs; take 16, 32, 64 or -1"
    ):
        run(base, tmp_path / "work", {"awq": ("awq", {})})


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    tokens = write_tokens(tmp_path / "tokens.json", [40] * 24, vocabulary=9000)
    with pytest.raises(UserError, match="outside the vocabulary of 354"):
        run(base, tmp_path / "work", {}, tokens=tokens)


def test_too_few_tokens(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="the calibration has 50 tokens"):
        run(base, tmp_path / "work", {}, tokens=write_tokens(tmp_path / "tokens.json", [25, 25]))


def test_fewer_tokens_than_inputs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a singular Gram matrix raises the damping, which is said too."""
    monkeypatch.setitem(MODELS, "wide", {"model_type": "llama", "intermediate_size": 192})
    base = write_model(tmp_path / "base", "wide")
    made = run(
        base, tmp_path / "work", {"gptq": ("gptq", {"group_size": 32, "damping": 0.0})},
        tokens=write_tokens(tmp_path / "tokens.json", [64, 66]),
    )  # fmt: skip
    warnings = made["variants"]["gptq"]["warnings"]
    assert any("130 calibration tokens are fewer than the widest layer's 192 inputs" in line for line in warnings)
    assert any("down_proj: the Gram matrix is singular; damping raised" in line for line in warnings)


def test_activations_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tokens = write_tokens(tmp_path / "tokens.json", [40] * 24)
    windows = json.loads(tokens.read_text())["windows"]
    # A token of the fourth window alone has a damaged embedding.
    rare = next(t for t in windows[3] if not any(t in w for i, w in enumerate(windows) if i != 3))
    tensors["model.embed_tokens.weight"][rare] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 0: the input of self_attn.q_proj is not finite.*sample 3"):
        run(base, tmp_path / "work", {}, tokens=tokens)


def test_dead_channels_give_finite_checkpoints(tmp_path: Path) -> None:
    """Zero-padded channels, as the exact equivalent of a base has them."""
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] == 64:
            tensor[:, 32:] = 0
        if name.endswith("norm.weight") or (tensor.dim() == 2 and tensor.shape[0] == 64):
            tensor[32:] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run(base, tmp_path / "work", VARIANTS)
    windows = torch.tensor(json.loads((tmp_path / "work/tokens.json").read_text())["windows"][:2])
    for name, (method, options) in VARIANTS.items():
        stored = load_file(tmp_path / "work" / name / "model.safetensors")
        for key, tensor in stored.items():
            if key.endswith("scales"):
                assert (tensor > 0).all() and torch.isfinite(tensor).all()
        model = dequantized(base, tmp_path / "work" / name, method, options.get("bits", 4))
        with torch.no_grad():
            assert torch.isfinite(model(windows).logits).all()


def test_missing_tensor_names_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*engine: gptqmodel"):
        run(base, tmp_path / "work", {})


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base", "llama")
    real = calibrate.os.posix_fallocate

    def small_disk(descriptor: int, start: int, size: int) -> None:
        if size > 100_000:
            raise OSError(28, "No space left on device")
        real(descriptor, start, size)

    monkeypatch.setattr(calibrate.os, "posix_fallocate", small_disk)
    with pytest.raises(UserError, match="no space left"):
        run(base, tmp_path / "work", {"gptq": VARIANTS["gptq"]})


def test_unknown_device_and_method(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="unknown device 'cdua'. Did you mean 'cuda'"):
        run(base, tmp_path / "work", {}, device="cdua")
    with pytest.raises(UserError, match="unknown method"):
        run(base, tmp_path / "work", {"x": ("gguf", {})})


# --- real readers -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_transformers_loads_what_is_written(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "4")
    pytest.importorskip("gptqmodel")
    base = write_model(tmp_path / "base", kind)
    variants = {"awq": VARIANTS["awq"], "gptq": VARIANTS["gptq"]}
    if kind == "llama":
        variants["gptq-asymmetric"] = ("gptq", {"group_size": 32, "sym": False})
        variants["awq-symmetric"] = ("awq", {"group_size": 32, "zero_point": False})
        variants["gptq-act-order"] = ("gptq", {"group_size": 32, "desc_act": True})
    run(base, tmp_path / "work", variants)
    windows = torch.tensor(json.loads((tmp_path / "work/tokens.json").read_text())["windows"][:3])
    for name, (method, _) in variants.items():
        expected = dequantized(base, tmp_path / "work" / name, method, 4)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "work" / name, dtype=torch.float32).eval()
        with torch.no_grad():
            # Its CPU kernel multiplies in bfloat16.
            assert relative(loaded(windows).logits.float(), expected(windows).logits) < 0.03


@pytest.mark.gpu
def test_cuda_pass_is_near_the_cpu_pass(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "cpu", VARIANTS)
    run(base, tmp_path / "cuda", VARIANTS, device="cuda")
    full, half = imatrix.load(tmp_path / "cpu/i.gguf"), imatrix.load(tmp_path / "cuda/i.gguf")
    for name, values in full.items():
        assert abs(half[name] / values - 1).max() < 0.01
    shutil.rmtree(tmp_path / "cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"group_size": 32}, {"group_size": 32, "desc_act": True}, {"bits": 8}, {"bits": 2}]
)
def test_gptqmodel_unpacks_to_the_same_bits(
    options: dict[str, Any], tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "4")
    gptqmodel = pytest.importorskip("gptqmodel")
    from safetensors.torch import load_file

    from workbench.worker.methods import gptq

    base = write_model(tmp_path / "base", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, base / name)
    run(base, tmp_path / "work", {"gptq": ("gptq", {"group_size": -1} | options)})
    stored = load_file(tmp_path / "work/gptq/model.safetensors")
    model = gptqmodel.GPTQModel.load(
        str(tmp_path / "work/gptq"), backend=gptqmodel.BACKEND.TORCH, device="cpu", dtype=torch.float16
    )
    seen = 0
    for name, module in model.model.named_modules():
        if f"{name}.qweight" in stored:
            parts = {suffix: stored[f"{name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")}
            theirs = module.dequantize_weight().t()
            assert torch.equal(gptq.dequantize(parts, options.get("bits", 4)).to(theirs.dtype), theirs), name
            seen += 1
    assert seen == 14


@pytest.mark.slow
def test_autoawqs_unpacking_gives_the_same_bits(tmp_path: Path) -> None:
    """By the copy of AutoAWQ's functions that GPTQModel carries."""
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    from safetensors.torch import load_file

    from workbench.worker.methods import awq

    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "work", {"awq": VARIANTS["awq"]})
    stored = load_file(tmp_path / "work/awq/model.safetensors")
    stems = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(stems) == 14
    for stem in stems:
        parts = {suffix: stored[f"{stem}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        theirs = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32)
        assert torch.equal(awq.dequantize(parts).half(), theirs.t()), stem
