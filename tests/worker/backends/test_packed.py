"""Artifacts loaded packed compute what their de-quantized weights compute, and hold what their files hold."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import (
    dequantized,
    pass_request,
    relative,
    write_model,
    write_sentencepiece,
    write_tokens,
)
from workbench.errors import UserError
from workbench.machine import isolate
from workbench.records import Artifact, Job, Workload, to_json
from workbench.worker.backends import packed
from workbench.worker.backends import transformers as backend
from workbench.worker.base.gguf_file import open_gguf, parsed_once
from workbench.worker.calibration import run as calibrate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

IDS = torch.arange(3, 83)[None]
LIMIT = 5e-4
"""Of a perplexity, relative: the issue's 0.05 %."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq", {"group_size": 32}),
    "gptq": ("gptq", {"group_size": 32}),
    "gptq-8-asym": ("gptq", {"group_size": -1, "bits": 8, "sym": False}),
    "gptq-act-order": ("gptq", {"group_size": 32, "desc_act": True}),
    "gptq-2": ("gptq", {"group_size": 16, "bits": 2}),
    "gptq-3": ("gptq", {"group_size": 32, "bits": 3}),
}


def quiet(done: float, total: float, text: str) -> None:
    pass


def artifact(path: Path, format: str) -> Artifact:
    return Artifact(variant="v", method=format, format=format, path=str(path), digest="", disk_bytes=1, parameters=1)


def engine(path: Path, format: str, **options: Any) -> Any:
    """The backend with one artifact loaded."""
    job = Job("b", artifact(path, format), "transformers", {"device": "cpu"} | options, Workload())
    return backend.Engine(job)


def logits(model: Any, ids: Any = IDS) -> Any:
    with torch.inference_mode():
        return model(ids).logits


@pytest.fixture(scope="module", params=["llama-biases", "gemma3_text"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AWQ and GPTQ checkpoints of a small model, by the calibration pass."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_model(folder / "base", request.param)
    tokens = write_tokens(folder / "tokens.json", [40] * 12)
    calibrate.run(pass_request(base, folder, VARIANTS, tokens=tokens), quiet)
    return folder


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gptq-3"])
def test_checkpoints_compute_what_their_weights_do(made: Path, name: str) -> None:
    method, options = VARIANTS[name]
    path = made / name
    loaded = packed.load(path, method, dtype="float32", device="cpu")
    expected = logits(dequantized(made / "base", path, method, options.get("bits", 4)))
    assert relative(logits(loaded.model), expected) < 1e-5
    assert loaded.packed == 14 and loaded.dense == len({id(p) for p in loaded.model.parameters() if p.ndim == 2})
    bits = {module.weight.dtype for module in loaded.model.modules() if type(module) is torch.nn.Linear}
    assert bits <= {torch.float32}, "nothing but the head is a plain linear layer"


def test_bits_that_have_no_kernel_are_refused(made: Path) -> None:
    with pytest.raises(UserError, match=r"gptq-3: model\.layers.*qweight has 3 bits; supported: 2, 4, 8\. Leave"):
        packed.load(made / "gptq-3", "gptq", dtype="float32", device="cpu")


def test_memory_holds_the_file(made: Path) -> None:
    """Packed layers are as large as in the file; what is not packed takes the dtype's bytes."""
    run = engine(made / "awq", "awq", kernel="workbench", dtype="float16")
    stored = sum(tensor.size_bytes for tensor in packed.checked_weights(made / "awq").values())
    buffers = sum(b.nbytes for n, b in run._model.named_buffers() if "inv_freq" in n or "embed_scale" in n)
    # The pass may store what is not quantized in 16 bits, and so does the model here.
    assert run.memory()["weights"] - buffers == pytest.approx(stored, rel=1e-3)
    assert run.settings()["kernel"] == "workbench" and run.settings()["packed"] == 14


def test_generating_with_packed_weights(made: Path) -> None:
    run = engine(made / "gptq", "gptq", kernel="workbench")
    assert list(run.generate([[5, 6, 7]], 3)) == [[1], [1], [1]]
    settings = run.settings()
    assert settings["dtype"] == "float32" and "plain reference" in settings["warnings"][0]


@pytest.mark.slow
@pytest.mark.parametrize("made", ["llama-biases"], indirect=True)
def test_a_worker_of_its_own_measures_packed_weights(made: Path, tmp_path: Path) -> None:
    """As the pipeline runs it: another process, which must find the kernels, and a row that says what ran."""
    workload = Workload(prompt_tokens=[8], new_tokens=3, repeats=1)
    job = Job("b", artifact(made / "awq", "awq"), "transformers", {"device": "cpu", "kernel": "workbench"}, workload)
    reply = isolate.call("workbench.worker.measure.job:measure", to_json(job), workdir=tmp_path, time_limit_s=120)
    assert reply.error is None, f"{reply.error}\n{reply.log}"
    assert reply.value["settings"]["kernel"] == "workbench" and len(reply.value["speeds"][0]["step_s"][0]) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(version="gemv"), "version"),
        (lambda c: c.update(zero_point=False), "zero_point false; supported is true"),
        (lambda c: c.update(bits=8), "supported are awq"),
        (lambda c: c.update(quant_method="gptq", checkpoint_format="gptq_v2"), "gptq_v2"),
    ],
)
def test_other_layouts_are_refused(made: Path, tmp_path: Path, change: Any, words: str) -> None:
    copy = Path(shutil.copytree(made / "awq", tmp_path / "awq"))
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        packed.load(copy, "awq", dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.scales"),
            r"tensor model\.layers\.1\.mlp\.up_proj\.scales is missing",
        ),
        (lambda t: t.pop("model.norm.weight"), r"tensor model\.norm\.weight missing"),
        (lambda t: t.update({"model.strange": torch.ones(2)}), r"tensor model\.strange has no place in transformers'"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.scales": t["model.layers.0.mlp.up_proj.scales"].float()}),
            r"model\.layers\.0\.mlp\.up_proj: scales is float32; supported: float16",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight is \(3,\), the configuration says",
        ),
    ],
)
def test_broken_checkpoints_name_the_tensor(made: Path, tmp_path: Path, change: Any, words: str) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(made / "awq", tmp_path / "awq"))
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words) as caught:
        packed.load(copy, "awq", dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


# --- GGUF ---------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
KINDS = ("gemma3_text", "llama-tied")


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("work")

    def run(function: str, payload: dict[str, Any]) -> Any:
        reply = isolate.call(f"workbench.worker.methods.gguf:{function}", payload, workdir=folder, time_limit_s=300)
        assert reply.error is None, f"{reply.error}\n{reply.log}"
        return reply.value

    return run


@pytest.fixture(scope="module", params=KINDS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, call: Any) -> Path:
    """A small model as a float32 GGUF file."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp(request.param)
    base = write_sentencepiece(write_model(folder / "base", request.param, **WIDE))
    out = folder / "Small-F32.gguf"
    call("convert", {"base": str(base), "out": str(out), "dtype": "float32", "name": "Small"})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K_M"])
def test_a_gguf_computes_what_transformers_de_quantizes(converted: Path, call: Any, name: str) -> None:
    """Names, rows of heads and norms are mapped back for each architecture."""
    out = converted.with_name(f"Small-{name}.gguf")
    call("quantize", {"source": str(converted), "out": str(out), "type": name, "threads": 1})
    run = engine(out, "gguf", kernel="workbench")
    plain = engine(out, "gguf")
    assert (
        torch.equal(logits(run._model), logits(plain._model))
        or relative(logits(run._model), logits(plain._model)) < 1e-5
    )
    assert run.settings()["packed"] >= 14 and run.settings()["kernel"] == "workbench"
    assert plain.settings()["kernel"] == "none, de-quantized"
    assert run.memory()["weights"] < 0.3 * plain.memory()["weights"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, call: Any) -> Path:
    """Another, for other types and for what is broken."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("llama")
    base = write_sentencepiece(write_model(folder / "base", "llama", **WIDE))
    out = folder / "Small-F32.gguf"
    call("convert", {"base": str(base), "out": str(out), "dtype": "float32", "name": "Small"})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q5_K_M", "Q3_K_M", "IQ4_XS", "Q5_0"])
def test_mixtures_of_other_types(small: Path, call: Any, name: str) -> None:
    out = small.with_name(f"Small-{name}.gguf")
    call("quantize", {"source": str(small), "out": str(out), "type": name, "threads": 1})
    loaded = packed.load(out, "gguf", dtype="float32", device="cpu")
    plain = engine(out, "gguf")
    assert relative(logits(loaded.model), logits(plain._model)) < 1e-5
    assert loaded.packed == 16 and loaded.dense == 0
    stored = [int(tensor.n_bytes) for tensor in open_gguf(out).tensors if len(tensor.shape) == 2]
    held = [planes.nbytes for name, planes in loaded.model.named_buffers() if name.endswith("planes")]
    assert sorted(held) == sorted(stored), "memory holds what the file holds, to the byte"


@pytest.mark.slow
def test_a_float_gguf_is_loaded_as_it_is(small: Path) -> None:
    loaded = packed.load(small, "gguf", dtype="float32", device="cpu")
    assert loaded.packed == 0 and torch.isfinite(logits(loaded.model)).all()


@pytest.mark.slow
def test_a_truncated_gguf_names_the_tensor(small: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(small.read_bytes()[: int(small.stat().st_size * 0.6)])
    with pytest.raises(UserError, match=r"truncated .* first tensor beyond its end is blk\.\d\.") as caught:
        packed.load(cut, "gguf", dtype="float32", device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_type_without_kernels_names_the_tensor(small: Path, tmp_path: Path) -> None:
    """One tensor of a made file given a type that has none: its number, its size, and where those behind it begin."""
    import gguf

    strange = tmp_path / "strange.gguf"
    strange.write_bytes(small.read_bytes())
    reader = gguf.GGUFReader(strange, "r+")
    place = next(i for i, tensor in enumerate(reader.tensors) if tensor.name == "blk.1.ffn_up.weight")
    tensor = reader.tensors[place]
    end = int(tensor.data_offset) + int(tensor.n_bytes)
    saved = int(tensor.n_bytes) - int(tensor.n_elements) // 256 * 66
    tensor.field.parts[4][0] = int(gguf.GGMLQuantizationType.TQ2_0)
    for later in reader.tensors[place + 1 :]:
        later.field.parts[5][0] -= saved
    reader.data.flush()
    data = strange.read_bytes()
    strange.write_bytes(data[: end - saved] + data[end:])
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has type TQ2_0; supported: Q8_0.*Leave"):
        packed.load(strange, "gguf", dtype="float32", device="cpu")


# --- the real model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_converted(real_base: Path, tmp_path_factory: pytest.TempPathFactory, call: Any) -> Path:
    out = tmp_path_factory.mktemp("real") / "base.gguf"
    call("convert", {"base": str(real_base), "out": str(out), "dtype": "float32", "name": "b"})
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awq", "gptq", "Q4_K_M", "Q8_0"])
def test_perplexity_of_the_tiny_recipes_base(
    name: str, real_base: Path, real_converted: Path, tmp_path: Path, call: Any
) -> None:
    """Packed equals de-quantized within 0.05 %: AWQ and GPTQ rounded to nearest, GGUF by llama.cpp."""
    ids = real_text(real_base)
    with ExitStack() as stack:
        if name in ("awq", "gptq"):
            plain = round_to_nearest(real_base, tmp_path / name, name)
            path, format = tmp_path / name, name
        else:
            path, format = tmp_path / f"{name}.gguf", "gguf"
            call("quantize", {"source": str(real_converted), "out": str(path), "type": name, "threads": 2})
            stack.enter_context(parsed_once(path, open_gguf(path)))
            plain = engine(path, "gguf")._model
        expected = perplexity(plain, ids)
        del plain
        run = engine(path, format, kernel="workbench")
    found = perplexity(run._model, ids)
    assert 2 < expected < 200
    assert found == pytest.approx(expected, rel=LIMIT)
    assert run.settings()["packed"] >= 210


def real_text(base: Path) -> Any:
    """Two windows of 64 tokens of English."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))[20_000:40_000]
    found = transformers.AutoTokenizer.from_pretrained(base)(text)["input_ids"]
    return torch.tensor(found[:128]).view(2, 64)


def perplexity(model: Any, ids: Any) -> float:
    scores = torch.log_softmax(logits(model, ids).double(), -1)
    taken = scores[:, :-1].gather(-1, ids[:, 1:, None])
    return math.exp(-float(taken[:, 32:].mean()))


def round_to_nearest(base: Path, out: Path, method: str) -> Any:
    """Write the base in one of the two layouts, groups of 64, without calibration; returns it de-quantized."""
    from safetensors.torch import load_file, save_file

    from workbench.worker.methods import awq, gptq, rounding

    tensors = load_file(base / "model.safetensors")
    made: dict[str, Any] = {}
    plain = dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            made[name] = weight
            continue
        stem = name.removesuffix(".weight")
        groups = weight.float().t().reshape(weight.shape[1] // 64, 64, -1)
        low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
        scale = rounding.as_half((high - low) / 15)
        zero = (-low / scale).round().clamp(1, 15)
        codes = (groups / scale[:, None] + zero[:, None]).round().clamp(0, 15)
        plain[name] = ((codes - zero[:, None]) * scale[:, None]).reshape(weight.shape[1], -1).t().contiguous()
        codes = codes.reshape(weight.shape[1], -1).to(torch.uint8)
        made[f"{stem}.scales"] = scale.half()
        if method == "awq":
            made[f"{stem}.qweight"], made[f"{stem}.qzeros"] = awq.pack(codes), awq.pack(zero.to(torch.uint8))
        else:
            made[f"{stem}.qweight"] = gptq.pack(codes, 4)
            made[f"{stem}.qzeros"] = gptq.pack((zero - 1).to(torch.uint8).t(), 4).t().contiguous()
            made[f"{stem}.g_idx"] = (torch.arange(weight.shape[1]) // 64).int()
    out.mkdir()
    save_file(made, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    module = {"awq": awq, "gptq": gptq}[method]
    config["quantization_config"] = module.quantization_config(module.Options(group_size=64))
    (out / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _, extra = model.load_state_dict(plain, strict=False)
    assert not extra
    return model.eval()
