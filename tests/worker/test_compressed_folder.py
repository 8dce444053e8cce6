"""AWQ and GPTQ as compressed-tensors: what the library's own reader finds, and what has no place there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import pass_request, write_model
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from tests.worker.written import read_compressed
from workbench.errors import UserError
from workbench.plan.tensors import shape_of
from workbench.worker import compressed_folder
from workbench.worker.base.headers import read
from workbench.worker.calibration import run as calibrate
from workbench.worker.methods import grouped, method_named

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq", {"group_size": 32}),
    "awq-but": ("awq", {"group_size": 32, "modules_to_not_convert": ("down_proj",)}),
    "gptq-4": ("gptq", {"group_size": 64}),
    "gptq-4-row": ("gptq", {"group_size": -1}),
    "gptq-4-asym": ("gptq", {"group_size": 32, "sym": False}),
    "gptq-8": ("gptq", {"group_size": 32, "bits": 8}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptq-3": ("gptq", {"group_size": 32, "bits": 3}, "engines read 4 or 8 bits of it, not 3"),
    "act-order": ("gptq", {"group_size": 32, "desc_act": True}, "groups are not runs of inputs"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    variants = {name: (method, options) for name, (method, options, *_) in (VARIANTS | REFUSED).items()}
    base = write_model(folder / "base", "llama")
    request = pass_request(base, folder, variants, imatrix_out=None, precision="auto")
    assert calibrate.run(request, lambda *_: None)["refused"] == {}
    return folder


def carried(source: Path) -> Any:
    request = {"base": "", "source": str(source), "out": f"{source}-compressed-tensors", "options": {}}
    return compressed_folder.carry(request, lambda *_: None)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weights_are_the_checkpoints(name: str, folder: Path) -> None:
    """Each matrix as compressed-tensors unpacks it against our own unpacking, which is in tests alone; the other
    tensors as they were; and as many bytes as a plan says."""
    from safetensors.torch import load_file

    method, options = VARIANTS[name]
    made, out = carried(folder / name), Path(f"{folder / name}-compressed-tensors")
    ours, theirs = load_file(folder / name / "model.safetensors"), read_compressed(out)
    stems = [key.removesuffix(".qweight") for key in ours if key.endswith(".qweight")]
    assert {f"{stem}.weight" for stem in stems} == set(theirs) and len(stems) == (12 if name == "awq-but" else 14)
    for stem in stems:
        parts = {key.removeprefix(f"{stem}."): each for key, each in ours.items() if key.startswith(f"{stem}.")}
        weight = dequantize_awq(parts) if method == "awq" else dequantize_gptq(parts, options.get("bits", 4))
        # The library multiplies in the scales' own float16.
        torch.testing.assert_close(theirs[f"{stem}.weight"], weight, rtol=2**-10, atol=1e-6)
    written: dict[str, Any] = {}
    for file in out.glob("*.safetensors"):
        written |= load_file(file)
    for key in ours:
        if key.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(written[key], ours[key])
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["config_groups"]["group_0"]["weights"]["symmetric"] is (method == "gptq" and options.get("sym", True))
    expected = ["lm_head"] + [f"model.layers.{i}.mlp.down_proj" for i in range(2)] * (name == "awq-but")
    assert said["ignore"] == expected
    assert made["tensor_types"]["model.layers.0.self_attn.q_proj.weight"].startswith(f"I{options.get('bits', 4)}-")
    shape = shape_of(read({"source": {"path": str(folder / "base")}}, lambda *_: None), "here")
    how = method_named(method)
    planned = grouped.compressed_sizes(shape, how.Options(**options), how.quantizes)  # type: ignore[attr-defined]
    assert planned.disk_bytes == sum(each.nbytes for each in written.values())


@pytest.mark.parametrize("name", ["awq", "gptq-8"])
def test_transformers_computes_what_the_codes_mean(name: str, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.worker.small_models import dequantized, relative

    source = folder / name
    request = {"base": "", "source": str(source), "out": str(tmp_path / "out"), "options": {}}
    compressed_folder.carry(request, lambda *_: None)
    method, options = VARIANTS[name]
    ids = torch.tensor([[7 * i % 300 + 3 for i in range(24)]])
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits
        meant = dequantized(folder / "base", source, method, options.get("bits", 4))(ids).logits
    assert relative(found, meant) < 2e-3, "float16's rounding of a weight, no more"


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_there(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be carried to compressed-tensors: .*{REFUSED[name][2]}"):
        carried(folder / name)
    assert not Path(f"{folder / name}-compressed-tensors").exists()
