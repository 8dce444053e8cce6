"""The calibration pass end to end on small random models of every architecture it knows."""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.places import ROOT
from tests.worker.small_models import MODELS, dequantized, pass_request, relative, write_model, write_tokens
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from workbench.errors import UserError
from workbench.worker.calibration import layout
from workbench.worker.calibration import run as calibrate
from workbench.worker.calibration.weights import open_weights
from workbench.worker.ggml import grams, imatrix
from workbench.worker.ggml.names import tensor_names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def quiet(done: float, total: float, text: str) -> None:
    assert 0 <= done <= total * 1.001


def run(*args: Any, **more: Any) -> dict[str, Any]:
    return calibrate.run(pass_request(*args, **more), quiet)


VARIANTS = {
    "awq": ("awq", {"group_size": 32}),
    "awq-compensated": ("awq", {"group_size": 32, "rounding": "compensated"}),
    "gptq": ("gptq", {"group_size": 32}),
    "gptq-8": ("gptq", {"group_size": -1, "bits": 8}),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_architecture(kind: str, tmp_path: Path) -> None:
    """The forward pass is the model's own, and every variant computes nearly what the base does."""
    base = write_model(tmp_path / "base", kind)
    made = run(base, tmp_path / "work", VARIANTS, grams_out=str(tmp_path / "grams"))
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
    importance = imatrix.load(tmp_path / "work/imatrix.gguf")
    kept = grams.read(tmp_path / "grams")
    weights = open_weights(base)
    linears = weights.structures[0].linears
    named = tensor_names(weights.config, [f"model.layers.{n}.{linear}.weight" for n in (0, 1) for linear in linears])
    assert set(importance) == set(named.values())
    for layer in range(2):
        for linear in linears:
            x = inputs[f"model.layers.{layer}.{linear}"]
            torch.testing.assert_close(
                torch.from_numpy(importance[named[f"model.layers.{layer}.{linear}.weight"]]),
                (x * x).mean(0),
                rtol=2e-4,
                atol=1e-6,
            )
            matrix = kept.load(named[f"model.layers.{layer}.{linear}.weight"])
            torch.testing.assert_close(matrix, x.t() @ x / len(x), rtol=2e-4, atol=1e-5)
    # How near 4 bits come depends on the architecture; that 8 bits come much nearer shows that nothing else is off.
    shares = {}
    for name, (method, options) in VARIANTS.items():
        quantized = dequantized(base, tmp_path / "work" / name, method, options.get("bits", 4))
        with torch.no_grad():
            shares[name] = relative(quantized(windows).logits, expected)
        errors = made["variants"][name]["tensor_errors"]
        assert len(errors) == 2 * len(linears)
        assert all(0 <= value < 0.05 for value in errors.values())
    assert shares["gptq-8"] < 0.03
    assert shares["gptq"] < 0.5 and shares["awq"] < 1.4 * shares["gptq"], shares
    assert shares["awq-compensated"] < 1.2 * shares["gptq"], shares


def test_bytes_repeat_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "one", VARIANTS)
    run(base, tmp_path / "two", VARIANTS)

    real, calls = calibrate.forward, []

    def dies_in_second_layer(*args: Any) -> Any:
        calls.append(args[2])
        if args[2] == 1 and calls.count(1) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrate, "forward", dies_in_second_layer)
    request = pass_request(base, tmp_path / "three", VARIANTS)
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
    assert (tmp_path / "one/imatrix.gguf").read_bytes() == (tmp_path / "three/imatrix.gguf").read_bytes()


def test_interrupted_work_of_other_tokens_is_not_gone_on_with(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    request = pass_request(base, tmp_path / "work", {"gptq": VARIANTS["gptq"]})
    calibrate.run(request, quiet)
    first = (tmp_path / "work/gptq/model.safetensors").read_bytes()
    other = write_tokens(tmp_path / "other.json", [40] * 24, seed=5)
    calibrate.run(request | {"tokens": str(other), "tokens_digest": "u"}, quiet)
    assert (tmp_path / "work/gptq/model.safetensors").read_bytes() != first


def test_what_is_written_beside_the_weights(tmp_path: Path, tiny_llama: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens.json", [40] * 24)
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\nmodel_name: Tiny\n---\n# Tiny, a model in float32\n")
    run(base, tmp_path / "work", VARIANTS, tokens=tokens)
    for name, (method, _) in VARIANTS.items():
        out = tmp_path / "work" / name
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == method
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
        assert config["torch_dtype"] == config["dtype"] == "float16"
        assert (out / "tokenizer.json").read_bytes() == (tiny_llama / "tokenizer.json").read_bytes()
        assert (out / "quantize_config.json").exists() == (method == "gptq")
        card = (out / "README.md").read_text()
        assert card.startswith("---\nlicense: mit\nmodel_name: Tiny\n---\n") and "float32" not in card
        assert f"{method}) of Tiny, made by the Workbench" in card
        assert not list(out.glob("*.new"))


def test_shards_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "whole", {"gptq": VARIANTS["gptq"]})
    monkeypatch.setattr(layout, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(layout, "COPY_BYTES", 1_000)
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
    found = torch.from_numpy(imatrix.load(tmp_path / "work/imatrix.gguf")["blk.1.ffn_down.weight"])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-7)


def test_bfloat16_pass_is_near_the_float32_pass(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "full", {})
    run(base, tmp_path / "half", {}, precision="bfloat16")
    full, half = imatrix.load(tmp_path / "full/imatrix.gguf"), imatrix.load(tmp_path / "half/imatrix.gguf")
    for name, values in full.items():
        assert abs(half[name] / values - 1).max() < 0.03
    assert (tmp_path / "full/imatrix.gguf").read_bytes() != (tmp_path / "half/imatrix.gguf").read_bytes()


# --- bad input ----------------------------------------------------------------------------------


def test_group_size_that_does_not_divide(tmp_path: Path) -> None:
    """Said of the variant that has it; the others are made."""
    base = write_model(tmp_path / "base", "llama")
    line = "awq: model.layers.0.self_attn.q_proj (64 x 64): group_size 128 does not divide its 64 inputs; take 32 or 64"
    with pytest.raises(UserError) as caught:
        run(base, tmp_path / "alone", {"awq": ("awq", {})}, imatrix_out=None)
    assert str(caught.value) == line
    made = run(base, tmp_path / "work", {"awq": ("awq", {}), "gptq": VARIANTS["gptq"]})
    assert made["refused"] == {"awq": line} and set(made["variants"]) == {"gptq"}
    assert (tmp_path / "work/gptq/config.json").exists() and not list((tmp_path / "work/awq").iterdir())


def test_sizes_that_whole_words_do_not_hold(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama", intermediate_size=144)
    made = run(base, tmp_path / "work", {"gptq": ("gptq", {"group_size": 16, "bits": 3})})
    assert "mlp.gate_proj (144 x 64): 3 bits are stored 32 at a time" in made["refused"]["gptq"]


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    tokens = write_tokens(tmp_path / "tokens.json", [40] * 24, vocabulary=9000)
    with pytest.raises(UserError, match="outside the vocabulary of 354"):
        run(base, tmp_path / "work", {}, tokens=tokens)


def test_too_few_tokens(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="the calibration has 50 tokens"):
        run(base, tmp_path / "work", {}, tokens=write_tokens(tmp_path / "tokens.json", [25, 25]))


@pytest.mark.parametrize(
    ("lengths", "line"),
    [
        ([], "the calibration has 0 tokens; at least 128 are needed.*raise `calibration.windows`"),
        ([100, 0, 100], "calibration window 1 is empty"),
        ([100, 300], "a calibration window has 300 tokens and the model's context 256: lower `calibration.window`"),
    ],
)
def test_windows_that_cannot_be_run(lengths: list[int], line: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    with pytest.raises(UserError, match=line):
        run(base, tmp_path / "work", {}, tokens=write_tokens(tmp_path / "tokens.json", lengths))


def test_fewer_tokens_than_inputs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a singular Gram matrix raises the damping, which is said too."""
    monkeypatch.setitem(MODELS, "wide", {"model_type": "llama", "intermediate_size": 192})
    base = write_model(tmp_path / "base", "wide")
    made = run(
        base,
        tmp_path / "work",
        {"gptq": ("gptq", {"group_size": 32, "damping": 0.0})},
        tokens=write_tokens(tmp_path / "tokens.json", [64, 66]),
    )
    warnings = made["variants"]["gptq"]["warnings"]
    assert any("130 calibration tokens are fewer than the widest layer's 192 inputs" in line for line in warnings)
    assert any("down_proj: the Gram matrix is singular; damping raised" in line for line in warnings)


@pytest.mark.parametrize("lengths", [[40] * 24, [40, 30, 20, 50, 40, 60]])
def test_activations_that_are_not_finite(lengths: list[int], tmp_path: Path) -> None:
    """The sample is counted as in the file, whatever order the windows are run in."""
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tokens = write_tokens(tmp_path / "tokens.json", lengths)
    windows = json.loads(tokens.read_text())["windows"]
    # A token of the fourth window alone has a damaged embedding.
    rare = next(t for t in windows[3] if not any(t in w for i, w in enumerate(windows) if i != 3))
    tensors["model.embed_tokens.weight"][rare] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 0: the input of self_attn.q_proj is not finite.*sample 3: "):
        run(base, tmp_path / "work", {}, tokens=tokens)


def test_activations_that_overflow_further_in_name_their_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] = 3e38
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer 1: the input of mlp.down_proj is not finite, first in .* sample 0: "):
        run(base, tmp_path / "work", {})


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


def out_of_range(folder: Path, change: str) -> Path:
    """A bfloat16 model of which a part is far smaller than float16 goes, and what reads it as much larger."""
    base = write_model(folder, "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attention, mlp, norm = (
        getattr(model.model.layers[1], name) for name in ("self_attn", "mlp", "post_attention_layernorm")
    )
    with torch.no_grad():
        if change == "norm":
            norm.weight[:4] *= 3e-8
            mlp.gate_proj.weight[:, :4] /= 3e-8
            mlp.up_proj.weight[:, :4] /= 3e-8
        elif change == "heads":
            attention.v_proj.weight *= 1e-7
            attention.o_proj.weight *= 1e7
        elif change == "scores":
            attention.q_proj.weight *= 1e7
            attention.k_proj.weight *= 1e-7
        else:
            part = slice(None, None, 2) if change == "rows" else slice(None)
            (mlp.gate_proj if change == "gate" else mlp.up_proj).weight[part] *= 1e-7
            mlp.down_proj.weight[:, part] *= 1e7
    model.to(torch.bfloat16).save_pretrained(base)
    return base


@pytest.mark.parametrize("change", ["matrix", "rows", "norm", "heads", "scores", "gate"])
def test_a_layer_that_float16_does_not_hold_is_brought_into_its_range_or_said_to_be_lost(
    change: str, tmp_path: Path
) -> None:
    base = out_of_range(tmp_path / "base", change)
    made = run(base, tmp_path / "work", VARIANTS)
    for name, found in made["variants"].items():
        told = [text for text in found["warnings"] if "of their output" in text]
        if change == "gate":  # Between it and what reads it lies a function that no factor passes through.
            assert found["tensor_errors"]["model.layers.1.mlp.gate_proj.weight"] == pytest.approx(1)
            assert ": model.layers.1.mlp.gate_proj (100%" in told[0], name
        else:
            assert max(found["tensor_errors"].values()) < 0.02 and not told, name
            model = dequantized(base, tmp_path / "work" / name, *VARIANTS[name][:1], VARIANTS[name][1].get("bits", 4))
            ids = torch.arange(3, 43)[None]
            with torch.no_grad():
                expected = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
                assert relative(model(ids).logits, expected) < (0.05 if name == "gptq-8" else 0.5), name


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
    real = layout.os.posix_fallocate

    def small_disk(descriptor: int, start: int, size: int) -> None:
        if size > 100_000:
            raise OSError(28, "No space left on device")
        real(descriptor, start, size)

    monkeypatch.setattr(layout.os, "posix_fallocate", small_disk)
    with pytest.raises(UserError, match="the disk is full"):
        run(base, tmp_path / "work", {"gptq": VARIANTS["gptq"]})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_disk_that_fills_half_way_keeps_the_finished_layers(tmp_path: Path) -> None:
    """A real ENOSPC in the second layer; with room again, the run ends with the bytes of one that had room."""
    base = write_model(tmp_path / "base", "llama")
    variants = {"gptq": VARIANTS["gptq"]}
    run(base, tmp_path / "roomy", variants)
    request = pass_request(base, tmp_path / "tight", variants)
    file = tmp_path / "tight/gptq/model.safetensors"
    aside = file.with_name("aside")

    def fills(done: float, total: float, text: str) -> None:
        if text.startswith("layer 2") and not file.is_symlink():
            file.rename(aside)
            file.symlink_to("/dev/full")

    with pytest.raises(UserError, match=r"the disk is full .*The finished layers are kept\.$") as caught:
        calibrate.run(request, fills)
    assert "\n" not in str(caught.value)
    file.unlink()
    aside.rename(file)
    words = set()
    calibrate.run(request, lambda done, total, text: words.add(text))
    assert not any(text.startswith("layer 1 ") for text in words), "the first layer was there"
    assert file.read_bytes() == (tmp_path / "roomy/gptq/model.safetensors").read_bytes()


def test_a_layer_that_the_device_does_not_hold_is_quantized_in_host_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes on a CPU, where both memories are one, and a warning that names the layer."""
    from workbench.worker.methods import gptq

    base = write_model(tmp_path / "base", "llama")
    variants = {"gptq": VARIANTS["gptq"]}
    plain = run(base, tmp_path / "plain", variants)
    real, calls = gptq.quantize, []

    def full(layer: Any, options: Any) -> Any:
        calls.append(layer.index)
        if calls == [0, 1]:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(layer, options)

    monkeypatch.setattr(gptq, "quantize", full)
    moved = run(base, tmp_path / "moved", variants)
    assert calls == [0, 1, 1] and plain["variants"]["gptq"]["warnings"] == []
    (warning,) = moved["variants"]["gptq"]["warnings"]
    assert warning.startswith("layer 1 was quantized in host memory")
    name = "gptq/model.safetensors"
    assert (tmp_path / "moved" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_forward_pass_that_the_device_does_not_hold_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base", "llama")

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibrate, "forward", full)
    with pytest.raises(UserError, match="layer 0 and its Gram matrices do not fit .*CUDA_VISIBLE_DEVICES"):
        run(base, tmp_path / "work", {})


def test_unknown_device_and_method(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    with pytest.raises(UserError, match="unknown device 'cdua'. Did you mean 'cuda'"):
        run(base, tmp_path / "work", {}, device="cdua")
    with pytest.raises(UserError, match="unknown device 'mps'. Known: auto, cpu, cuda"):
        run(base, tmp_path / "work", {}, device="mps")
    with pytest.raises(UserError, match="unknown precision 'float16'. Did you mean 'bfloat16'"):
        run(base, tmp_path / "work", {}, precision="float16")
    external = ("gptq", {"engine": "gptqmodel", "group_size": 32})
    with pytest.raises(UserError, match="`engine: gptqmodel` does not take part"):
        run(base, tmp_path / "work", {"x": external}, imatrix_out=None)
    with pytest.raises(UserError, match="unknown method"):
        run(base, tmp_path / "work", {"x": ("gguf", {})}, imatrix_out=None)


@pytest.mark.slow
def test_one_variant_that_does_not_fit_leaves_the_others_of_a_recipe(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = {
        "base": {"path": str(tiny_llama)},
        "variants": [{"gptq": {"group_size": 32}}, {"awq": {"group_size": 48}}],
        "calibration": {"source": {"text": string.printable[:-2] * 40}, "window": 64, "windows": 4},
        "backends": ["transformers"],
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    answer = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "quantize", "r.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WORKBENCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 1, answer.stderr
    assert "group_size 48 does not divide its 64 inputs; take 32 or 64" in " ".join(answer.stderr.split())
    made = [json.loads(path.read_text()) for path in (tmp_path / "home" / "artifacts").glob("*/artifact.json")]
    assert {record["variant"] for record in made} == {"gptq-4bit-g32"}
    assert not list((tmp_path / "home" / "artifacts").glob("*.partial"))


# --- real readers -------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_loads_what_other_options_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the defaults write, of every architecture and in every engine: `test_architectures.py`."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "4")
    pytest.importorskip("gptqmodel")
    base = write_model(tmp_path / "base", "llama-biases")
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "awq": VARIANTS["awq"],
        "gptq-asymmetric": ("gptq", {"group_size": 32, "sym": False}),
        "awq-symmetric": ("awq", {"group_size": 32, "zero_point": False}),
        "gptq-act-order": ("gptq", {"group_size": 32, "desc_act": True}),
    }
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
    """Float32 on both, also where something has asked torch for TF32, which would show as 1e-3."""
    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "cpu", VARIANTS)
    torch.set_float32_matmul_precision("high")
    run(base, tmp_path / "cuda", VARIANTS, device="cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    full, half = imatrix.load(tmp_path / "cpu/imatrix.gguf"), imatrix.load(tmp_path / "cuda/imatrix.gguf")
    for name, values in full.items():
        assert abs(half[name] / values - 1).max() < 1e-4
    windows = torch.tensor(json.loads((tmp_path / "cpu/tokens.json").read_text())["windows"])
    for name, (method, options) in VARIANTS.items():
        models = [
            dequantized(base, tmp_path / where / name, method, options.get("bits", 4)) for where in ("cpu", "cuda")
        ]
        with torch.no_grad():
            # A weight on the boundary between two codes may fall to either side.
            assert relative(models[1](windows).logits, models[0](windows).logits) < 0.1


@pytest.mark.gpu
def test_cuda_pass_gives_the_same_bytes_twice_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base", "gemma2")
    run(base, tmp_path / "one", VARIANTS, device="cuda", precision="auto")
    assert torch.cuda.max_memory_allocated() > 0
    request = pass_request(base, tmp_path / "two", VARIANTS, device="cuda", precision="auto")
    real = calibrate.forward

    def stops(*args: Any) -> Any:
        if args[2] == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(calibrate, "forward", stops)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run(request, quiet)
    monkeypatch.setattr(calibrate, "forward", real)
    calibrate.run(request, quiet)
    for name in VARIANTS:
        content = (tmp_path / "one" / name / "model.safetensors").read_bytes()
        assert content == (tmp_path / "two" / name / "model.safetensors").read_bytes(), name


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
            assert torch.equal(dequantize_gptq(parts, options.get("bits", 4)).to(theirs.dtype), theirs), name
            seen += 1
    assert seen == 14


@pytest.mark.slow
def test_autoawqs_unpacking_gives_the_same_bits(tmp_path: Path) -> None:
    """By the copy of AutoAWQ's functions that GPTQModel carries."""
    packing = pytest.importorskip("gptqmodel.quantization.awq.utils.packing_utils")
    from safetensors.torch import load_file

    base = write_model(tmp_path / "base", "llama")
    run(base, tmp_path / "work", {"awq": VARIANTS["awq"]})
    stored = load_file(tmp_path / "work/awq/model.safetensors")
    stems = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(stems) == 14
    for stem in stems:
        parts = {suffix: stored[f"{stem}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")}
        theirs = packing.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32)
        assert torch.equal(dequantize_awq(parts).half(), theirs.t()), stem
