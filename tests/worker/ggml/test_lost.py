"""What a quantizer left of a tensor, looked at in a few of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.worker.ggml import lost

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")


def write(path: Path, kinds: dict[str, str]) -> str:
    """Tensors of the same random weights, `small` of 1e-9, each in a type."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    chance = np.random.default_rng(0)
    for name, kind in kinds.items():
        weights = chance.standard_normal((40, 64)).astype(np.float32) * (1e-9 if name == "small" else 1)
        of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(weights, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_tensor_whose_scales_are_below_float16_is_named(tmp_path: Path) -> None:
    """As llama.cpp's quantizer does, the gguf package's rounds such a scale to zero."""
    source = write(tmp_path / "a.gguf", {"norm": "F32", "large": "BF16", "small": "F32"})
    made = write(tmp_path / "b.gguf", {"norm": "F32", "large": "Q4_0", "small": "Q8_0"})
    (told,) = lost.warnings(source, made)
    assert told.startswith("1 of 2 tensors lose more than 50% of their weights: small.")
    assert lost.warnings(source, source) == []
