"""The importance matrix as a file and as the C array that llama.cpp's quantizer takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from workbench.errors import UserError
from workbench.worker.ggml import imatrix

np = pytest.importorskip("numpy")
pytest.importorskip("gguf")


def matrix(seed: int = 0):
    chance = np.random.default_rng(seed)
    return {
        "blk.0.attn_q.weight": chance.random(64, dtype=np.float32),
        "blk.0.ffn_down.weight": chance.random(128, dtype=np.float32),
    }


def test_file_round_trip(tmp_path: Path) -> None:
    means = matrix()
    imatrix.write(tmp_path / "i.gguf", means, tokens=1000, windows=10, window=100, dataset="d")
    back = imatrix.load(tmp_path / "i.gguf")
    assert set(back) == {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    for name, values in means.items():
        np.testing.assert_allclose(back[name], values, rtol=1e-6)


def test_file_has_what_llama_quantize_asks_for(tmp_path: Path) -> None:
    import gguf

    imatrix.write(tmp_path / "i.gguf", matrix(), tokens=1000, windows=10, window=100, dataset="some text")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["imatrix.chunk_count"].contents() == 10
    assert reader.fields["imatrix.chunk_size"].contents() == 100
    assert reader.fields["imatrix.datasets"].contents() == ["some text"]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == [128, 1]
    assert shapes["blk.0.ffn_down.weight.counts"] == [1, 1]


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"hello world, this is no gguf file at all")
    with pytest.raises(UserError, match="x.gguf"):
        imatrix.load(tmp_path / "x.gguf")


def test_quantize_pointer_ends_with_an_empty_entry(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    means = matrix()
    made = imatrix.as_quantize_pointer(means)
    assert made.entries == 2
    seen = {}
    place = 0
    while made.pointer[place].name is not None:
        entry = made.pointer[place]
        seen[entry.name.decode()] = np.ctypeslib.as_array(entry.data, (entry.size,)).copy()
        place += 1
    assert place == 2
    for name, values in means.items():
        np.testing.assert_array_equal(seen[name], values)
