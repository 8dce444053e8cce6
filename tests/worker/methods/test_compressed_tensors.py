"""compressed-tensors of 8 bits made in the pass, and what others wrote, each against the library's own reader."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.layers import layer_of
from tests.worker.others import configure
from tests.worker.small_models import pass_request
from tests.worker.written import read_compressed, write_compressed
from workbench.errors import UserError
from workbench.plan.tensors import shape_of
from workbench.recipe.load import parse
from workbench.records import Artifact, Job, Workload, to_json
from workbench.worker.backends import transformers as backend
from workbench.worker.base.headers import read
from workbench.worker.calibration import run as calibrate
from workbench.worker.methods import compressed_tensors as method
from workbench.worker.methods.checkpoint import adopt, headers

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")
SCHEMES = ("W8A8", "FP8_DYNAMIC")
IDS = [[7 * i % 300 + 3 for i in range(24)]]


def silent(*_: object) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both schemes of the small model, by the pass."""
    folder = tmp_path_factory.mktemp("made")
    variants = {scheme: ("compressed-tensors", {"scheme": scheme}) for scheme in SCHEMES}
    request = pass_request(tiny_llama, folder, variants, imatrix_out=None, precision="auto")
    answer: Any = calibrate.run(request, silent)
    assert answer["refused"] == {}
    for scheme in SCHEMES:
        errors = answer["variants"][scheme]["tensor_errors"]
        assert len(errors) == 14 and max(errors.values()) < (1e-3 if scheme == "W8A8" else 3e-3)
    return folder


def loaded(folder: Path) -> Any:
    """The engine's model."""
    artifact = Artifact("v", "m", "compressed-tensors", str(folder), "", 1, 1)
    return backend.Engine(Job("b", artifact, "transformers", {"device": "cpu", "threads": 1}, Workload()))


def logits_of(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits[0].log_softmax(-1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_librarys_own_reader_finds_the_weights(scheme: str, made: Path, tiny_llama: Path) -> None:
    """Within half a step of the base's: of an integer's step, or of float8's three bits behind the first."""
    from safetensors.torch import load_file

    base = load_file(tiny_llama / "model.safetensors")
    for name, weight in read_compressed(made / scheme).items():
        largest = base[name].abs().amax(1, keepdim=True)
        if scheme == "FP8_DYNAMIC":
            assert ((weight - base[name]).abs() <= base[name].abs() / 16 + largest / 448 / 2**9).all()
        else:
            # Error feedback moves some weights on.
            assert (weight - base[name]).abs().max() < largest.max() / 20
            assert (weight - base[name]).norm() < 0.01 * base[name].norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_with_them(scheme: str, made: Path, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    engine = loaded(made / scheme)
    for name, weight in read_compressed(made / scheme).items():
        assert torch.equal(engine._model.get_parameter(name).float(), weight)
    base = logits_of(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32))
    found = logits_of(engine._model)
    divergence = float((base.exp() * (base - found)).sum(-1).mean())
    assert 0 < divergence < 1e-2
    assert "de-quantized to float32 at load" in engine.settings()["warnings"][0]


def test_error_feedback_is_worth_it() -> None:
    """Of integers: less of the output is lost than by rounding to the same scales."""
    layer = layer_of()
    _, errors, _ = method.quantize(layer, method.Options("W8A8"))
    for name, error in errors.items():
        weight = layer.tensors[name]
        gram = layer.grams[
            next(g.linears[0] for g in layer.structure.groups if name.removesuffix(".weight") in g.linears)
        ]
        scale = weight.abs().amax(1, keepdim=True) / 127
        lost = weight - (weight / scale).round() * scale
        plain = ((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum()
        assert error < float(plain)


def test_sizes_are_the_bytes(made: Path, tiny_llama: Path) -> None:
    from safetensors.torch import load_file

    shape = shape_of(read({"source": {"path": str(tiny_llama)}}, silent), "here")  # type: ignore[arg-type]
    for scheme in SCHEMES:
        size = sum(each.nbytes for each in load_file(made / scheme / "model.safetensors").values())
        assert method.sizes(shape, method.Options(scheme), "compressed-tensors").disk_bytes == size  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_DYNAMIC"])
def test_what_the_library_wrote_is_measured_as_it_reads_it(scheme: str, tiny_llama: Path, tmp_path: Path) -> None:
    theirs = write_compressed(tiny_llama, tmp_path / "X", scheme)
    request = {"base": str(tiny_llama), "out": str(tmp_path / "out"), "options": {"path": str(theirs)}}
    answer: Any = adopt(request, silent)
    kind = {"W4": "int4-g32", "W8": "I8", "FP": "F8_E4M3"}[scheme[:2]]
    types = answer["tensor_types"]
    assert answer["format"] == "compressed-tensors" and len(types) == 21
    assert types["model.layers.1.mlp.down_proj.weight"] == kind and types["lm_head.weight"] == "F32"
    assert set(answer["provenance"]["limits"]) == {"llamacpp", "mlx"}
    engine = loaded(tmp_path / "out")
    for name, weight in read_compressed(theirs).items():
        assert torch.equal(engine._model.get_parameter(name).float(), weight)
    shape = shape_of(read({"source": {"path": str(tiny_llama)}}, silent), "here")  # type: ignore[arg-type]
    planned: Any = headers({"options": {"path": str(theirs)}, "shape": to_json(shape)}, silent)
    assert planned["compressed-tensors"]["disk_bytes"] > 0 and "no other format" in planned["gguf"]["refused"]


def _packed(said: dict[str, Any], **entries: Any) -> dict[str, Any]:
    (group,) = said["config_groups"].values()
    return {**said, "config_groups": {"group_0": {**group, **entries}}}


def test_what_is_not_read_is_told_in_one_line(tiny_llama: Path, tmp_path: Path) -> None:
    theirs = write_compressed(tiny_llama, tmp_path / "X", "W4A16")
    said = json.loads((theirs / "config.json").read_text())["quantization_config"]
    weights = said["config_groups"]["group_0"]["weights"]
    for changed, why in (
        (_packed(said, format="nvfp4-pack-quantized"), "packed as nvfp4-pack-quantized: what is read"),
        (_packed(said, weights={**weights, "num_bits": 3}), "has 3 bits of type int, not 4 or 8"),
        ({**said, "config_groups": {}}, "names no `config_groups` with weights"),
    ):
        configure(theirs, quantization_config=changed)
        assert why in refusal(tiny_llama, theirs, tmp_path)
    configure(theirs, quantization_config=said)
    from safetensors.torch import load_file, save_file

    file = theirs / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    for tensors, why in (
        ({key: each for key, each in whole.items() if key != f"{name}_scale"}, "up_proj.weight_scale is missing"),
        ({**whole, f"{name}_packed": whole[f"{name}_packed"][:, :4].contiguous()}, "is 128 x 32, in the base 128 x 64"),
        ({key: each for key, each in whole.items() if "_scale" not in key and "_packed" not in key}, "has a scale"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        assert why in refusal(tiny_llama, theirs, tmp_path)


def refusal(base: Path, folder: Path, place: Path) -> str:
    shutil.rmtree(place / "out", ignore_errors=True)
    with pytest.raises(UserError) as caught:
        adopt({"base": str(base), "out": str(place / "out"), "options": {"path": str(folder)}}, silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_names_in_a_recipe() -> None:
    asked = {"base": {"path": "b"}, "calibration": {"source": {"text": "x"}}}
    variants: list[dict[str, dict[str, Any]]] = [{"compressed-tensors": {"scheme": [*SCHEMES]}}, {"gptq": {}}]
    variants.append({"compressed-tensors": {"from": "gptq-4bit-g128"}})
    names = [each.name for each in parse({**asked, "variants": variants}, Path("r.yaml")).variants]
    assert names[1:3] == ["compressed-tensors-W8A8", "compressed-tensors-FP8_DYNAMIC"]
    assert names[4] == "compressed-tensors-gptq-4bit-g128"
    with pytest.raises(UserError, match="unknown value 'W4A16'. Known: FP8_DYNAMIC, W8A8"):
        parse({**asked, "variants": [{"compressed-tensors": "W4A16"}]}, Path("r.yaml"))
