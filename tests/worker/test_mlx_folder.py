"""AWQ and GPTQ as folders for MLX: weights of every width, and what is refused.

Every architecture: `tests/worker/test_carried_weights.py`.

That a folder is the checkpoint's model in MLX is what `carry` itself proves: both compute in float32, and differ by
less than 1e-5 nats. With the calibration's random models any slip is nats.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import pass_request, write_model, write_sentencepiece
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from workbench import disk
from workbench.errors import UserError
from workbench.worker import mlx_folder
from workbench.worker.calibration import run as calibrate
from workbench.worker.methods import gptq
from workbench.worker.methods.grouped import mlx_group

torch = pytest.importorskip("torch")

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 384}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "awq": ("awq", {"group_size": 32}),
    "gptq-4": ("gptq", {"group_size": 64}),
    "gptq-4-row": ("gptq", {"group_size": -1}),
    "gptq-4-asym": ("gptq", {"group_size": 32, "sym": False}),
    "gptq-8": ("gptq", {"group_size": 32, "bits": 8}),
    "gptq-8-asym": ("gptq", {"group_size": 32, "bits": 8, "sym": False}),
    "gptq-3": ("gptq", {"group_size": 32, "bits": 3}),
    "gptq-2": ("gptq", {"group_size": 32, "bits": 2}),
}
REFUSED = {
    "act-order": ("gptq", {"group_size": 32, "desc_act": True}),
    "group-16": ("gptq", {"group_size": 16}),
}


def made(folder: Path, kind: str, variants: dict[str, tuple[str, dict[str, object]]], **sizes: Any) -> Path:
    """A random model's checkpoints."""
    base = write_sentencepiece(write_model(folder / "base", kind, **(WIDE | sizes)))
    request = pass_request(base, folder, variants, imatrix_out=None, precision="auto")
    assert calibrate.run(request, lambda *_: None)["refused"] == {}
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("mlx"), "llama", VARIANTS | REFUSED)


def carried(source: Path) -> Any:
    out = Path(f"{source}-mlx")
    shutil.rmtree(out, ignore_errors=True)
    return mlx_folder.carry({"base": "", "source": str(source), "out": str(out), "options": {}}, lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_weights_are_the_checkpoints(name: str, folder: Path) -> None:
    """Each matrix as MLX de-quantizes it against our other unpacking, which is in tests alone."""
    mx = pytest.importorskip("mlx.core")
    from safetensors.torch import load_file

    method, options = VARIANTS[name]
    bits = int(str(options.get("bits", 4)))
    told = carried(folder / name)
    tensors, written = load_file(folder / name / "model.safetensors"), {}
    for file in sorted(Path(f"{folder / name}-mlx").glob("*.safetensors")):
        written |= mx.load(str(file))
    settings = json.loads(Path(f"{folder / name}-mlx", "config.json").read_text())["quantization"]
    assert settings["bits"] == bits
    for linear in ("mlp.down_proj", "self_attn.q_proj"):
        stem = f"model.layers.1.{linear}"
        parts = {part: tensors[f"{stem}.{part}"] for part in mlx_folder.PARTS if f"{stem}.{part}" in tensors}
        weight = dequantize_awq(parts) if method == "awq" else dequantize_gptq(parts, bits)
        words, scales, biases = (written[f"{stem}.{part}"] for part in ("weight", "scales", "biases"))
        size = weight.shape[1] // scales.shape[1]
        found = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=size, bits=bits)
        off = float((torch.tensor(found.tolist()) - weight).abs().max() / weight.abs().max())
        assert off <= (5e-4 if "bit for bit" not in told["warnings"][0] else 1e-6), linear
    assert ("bit for bit" in told["warnings"][0]) == (name not in ("awq", "gptq-4-asym", "gptq-8-asym"))
    assert {each.suffix for each in Path(f"{folder / name}-mlx").iterdir()} <= {".json", ".safetensors", ".model"}


@pytest.mark.slow
def test_an_architecture_that_mlx_computes_otherwise_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    made(tmp_path, "gemma2", {"awq": VARIANTS["awq"]}, query_pre_attn_scalar=32, sliding_window=16)
    with pytest.raises(UserError, match="awq cannot be carried to MLX: MLX makes another model of it"):
        carried(tmp_path / "awq")


@pytest.mark.slow
def test_what_rounding_to_float16_costs_is_no_slip(tmp_path: Path) -> None:
    """Of SmolLM2 135M it costs 1.6e-5 nats, of this model 1e-4: the proof compares with what was written."""
    pytest.importorskip("mlx_lm")
    base = write_sentencepiece(write_model(tmp_path / "base", "llama", head=2.0, **WIDE))
    request = pass_request(base, tmp_path, {"awq": VARIANTS["awq"]}, imatrix_out=None, precision="auto")
    assert calibrate.run(request, lambda *_: None)["refused"] == {}
    assert 0 < carried(tmp_path / "awq")["provenance"]["carried"]["largest_error"] < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (None, "its folder is not there any more: make the variant again"),
        (float("nan"), "its scales are no float16 numbers"),
        (1e6, "its scales are no float16 numbers"),
    ],
)
def test_a_spoiled_checkpoint_is_refused(fault: float | None, why: str, folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "spoiled"
    if fault is not None:
        shutil.copytree(folder / "awq", source)
        tensors = load_file(source / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.scales"
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = fault
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"spoiled cannot be carried to MLX: .*{why}"):
        carried(source)
    assert not Path(f"{source}-mlx").exists()


@pytest.mark.slow
def test_a_disk_too_full_for_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = disk.shutil.disk_usage
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    with pytest.raises(UserError, match=r"awq cannot be carried to MLX: .*no space left for it \("):
        carried(folder / "awq")
    assert not Path(f"{folder / 'awq'}-mlx").exists()


@pytest.mark.slow
def test_the_proof_could_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the biases of another row the folder is another model, and nothing is left of it."""
    pytest.importorskip("mlx_lm")
    in_groups = mlx_folder.in_groups

    def rolled(matrix: Any) -> Any:
        parts, error, size = in_groups(matrix)
        return parts | {"biases": parts["biases"].roll(1, 0).contiguous()}, error, size

    monkeypatch.setattr(mlx_folder, "in_groups", rolled)
    with pytest.raises(UserError, match="MLX makes another model of it"):
        carried(folder / "awq")
    assert not Path(f"{folder / 'awq'}-mlx").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"), [("act-order", "its groups are not runs of inputs"), ("group-16", "16 is no multiple of any")]
)
def test_what_no_group_holds_is_refused_by_name_and_beforehand(name: str, why: str, folder: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} cannot be carried to MLX: .*{why}"):
        carried(folder / name)
    assert not Path(f"{folder / name}-mlx").exists()
    assert "mlx" in gptq.limits(gptq.Options(**REFUSED[name][1]))  # type: ignore[arg-type]


def test_the_largest_group_that_divides() -> None:
    assert [mlx_group(size) for size in (32, 64, 96, 128, 192, 256, 4096)] == [32, 64, 32, 128, 64, 128, 128]
    with pytest.raises(UserError, match="48 is no multiple"):
        mlx_group(48)
