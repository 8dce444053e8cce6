"""AWQ and GPTQ in other engines' containers, matrix by matrix: ours and another packer's, in every architecture.

What a container holds, read back by its engine's own de-quantization (the `gguf` package, MLX), against our other
unpacking of the checkpoint, which is in tests alone. That logits are the checkpoint's too is what `carry` proves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worker.others import pack_by_gptqmodel
from tests.worker.small_models import CARRIED, WIDE, dequantized, pass_request, write_model, write_sentencepiece
from tests.worker.unpacking import from_gguf
from workbench.worker import mlx_folder
from workbench.worker.calibration import run as calibrate
from workbench.worker.ggml import carry

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

# mlx-lm's Gemma 2 has no sliding windows: past one it is another model, and a window of 16 is refused.
KINDS = CARRIED | {"gemma2": CARRIED["gemma2"] | {"sliding_window": 256}}
HELD = {("awq", 4): 5e-4, ("gptq", 4): 0.0, ("gptq", 8): 0.0}
"""Method and bits -> by how much of the largest weight of its matrix a weight may be off."""
BLOCKS = {("awq", 4): "Q4_1", ("gptq", 4): "Q4_0", ("gptq", 8): "Q8_0"}


@pytest.fixture(scope="module", params=KINDS)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A random model, and (folder, method, bits) of its checkpoints by either packer."""
    pytest.importorskip("gptqmodel")
    folder = tmp_path_factory.mktemp(request.param)
    base = write_sentencepiece(write_model(folder / "base", request.param, **(WIDE | KINDS[request.param])))
    ours = {
        f"{method}-{bits}": (method, {"group_size": 32} | ({"bits": bits} if bits != 4 else {}))
        for method, bits in HELD
    }
    asked = pass_request(base, folder, ours, imatrix_out=None, precision="auto")
    assert calibrate.run(asked, lambda *_: None)["refused"] == {}
    found = [(folder / name, *key) for name, key in zip(ours, HELD, strict=True)]
    found += [(pack_by_gptqmodel(base, folder / f"other-{m}-{bits}", m, bits), m, bits) for m, bits in HELD]
    return base, found


def in_gguf(base: Path, source: Path, method: str, bits: int) -> dict[str, Any]:
    """The matrices of a checkpoint that was carried to GGUF."""
    request = {"base": "", "source": str(source), "out": f"{source}.gguf", "options": {}}
    told: Any = carry.carry(request, lambda *_: None)
    assert set(told["tensor_types"].values()) - {"F16", "BF16"} == {BLOCKS[method, bits], "F32"}
    return dict(from_gguf(base, f"{source}.gguf").state_dict())


def in_mlx(base: Path, source: Path, method: str, bits: int) -> dict[str, Any]:
    """The matrices of a checkpoint that was carried to MLX."""
    mx = pytest.importorskip("mlx.core")
    out, stored = Path(f"{source}-mlx"), dict[str, Any]()
    mlx_folder.carry({"base": "", "source": str(source), "out": str(out), "options": {}}, lambda *_: None)
    for file in out.glob("*.safetensors"):
        stored |= mx.load(str(file))
    found = {}
    for name, value in stored.items():
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in stored:
            scales, biases = (stored[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            value = mx.dequantize(value, scales, biases, group_size=32, bits=bits)
        found[name] = torch.tensor(value.astype(mx.float32).tolist())
    return found


@pytest.mark.parametrize("container", [in_gguf, in_mlx])
def test_every_matrix_is_the_checkpoints(
    container: Callable[[Path, Path, str, int], dict[str, Any]], checkpoints: tuple[Path, list[Any]]
) -> None:
    base, packed = checkpoints
    for source, method, bits in packed:
        meant = {
            name: weight
            for name, weight in dequantized(base, source, method, bits).state_dict().items()
            if ".layers." in name and weight.dim() == 2
        }
        held = container(base, source, method, bits)
        assert len(meant) >= 8 and set(meant) <= set(held)
        off = {name: float((held[name] - weight).abs().max() / weight.abs().max()) for name, weight in meant.items()}
        print(f"{source.parent.name} {source.name} {container.__name__}: {max(off.values()):.2g} of the largest")
        assert max(off.values()) <= HELD[method, bits], source.name
