"""Codes chosen anew: what is left of e G e^T, in files that others read, and by the pass's own matrices."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.worker.ggml import compensate, grams
from workbench.worker.ggml.index import library

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf.quants import dequantize  # noqa: E402

COLUMNS = 512


def by_llama_cpp(kind: str, weight: Any, importance: Any) -> Any:
    """Its quantizer's blocks, uint8 [out, bytes of a row]."""
    quantize = library().ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    number = gguf.GGMLQuantizationType[kind]
    count, size = gguf.GGML_QUANT_SIZES[number]
    blocks = torch.zeros(len(weight), weight.shape[1] // count * size, dtype=torch.uint8)
    assert weight.is_contiguous()
    quantize(int(number), weight.data_ptr(), blocks.data_ptr(), 0, *weight.shape, importance.data_ptr())
    return blocks


def case() -> tuple[Any, Any, Any]:
    """A weight, and G of correlated inputs of many sizes, of which one never fires, on two samples."""
    chance = torch.Generator().manual_seed(0)
    weight = torch.randn(24, COLUMNS, generator=chance) * 0.02
    mix = torch.randn(COLUMNS, COLUMNS, generator=chance) * torch.rand(COLUMNS, generator=chance).pow(4)
    mix[:, 77] = 0
    x, other = (torch.randn(4000, COLUMNS, generator=chance) @ mix for _ in range(2))
    return weight, x.t() @ x / 4000, other.t() @ other / 4000


def left(weight: Any, kind: str, blocks: Any, gram: Any) -> float:
    """tr(E G E^T) by gguf's de-quantization."""
    error = weight - torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize("kind", sorted(compensate.TYPES))
def test_less_of_the_output_is_lost(kind: str) -> None:
    """A third less at least, on inputs that it has not seen; the same bytes each time; blocks as gguf reads them."""
    weight, gram, other = case()
    blocks = by_llama_cpp(kind, weight, gram.diagonal().contiguous())
    given = compensate.input_of(gram, "here")
    made = compensate.compensated(kind, blocks, weight, given)
    assert made.shape == blocks.shape and made.dtype == torch.uint8
    for seen in (gram, other):
        assert left(weight, kind, made, seen) < 0.67 * left(weight, kind, blocks, seen)
    assert torch.equal(made, compensate.compensated(kind, blocks, weight, given))
    # What never fires is rounded to the nearest that its scale allows.
    found = torch.from_numpy(dequantize(made.numpy(), gguf.GGMLQuantizationType[kind]))
    spread = (weight - found)[:, 70:90].abs().amax(1)
    assert bool(((weight - found)[:, 77].abs() <= 2 * spread).all())


def test_rows_are_chosen_alone() -> None:
    """So that prices may look at some of them, memory holds a slab, and tensors with one input are one matrix."""
    weight, gram, _ = case()
    blocks = by_llama_cpp("Q4_K", weight, gram.diagonal().contiguous())
    given = compensate.input_of(gram, "here")
    whole = compensate.compensated("Q4_K", blocks, weight, given)
    pieces = [
        compensate.compensated("Q4_K", *part, given) for part in zip(blocks.split(5), weight.split(5), strict=True)
    ]
    # A sum in another order may tip a code; that is all.
    assert float((whole != torch.cat(pieces)).float().mean()) < 0.01


def test_tensors_with_one_input_are_worked_on_together_a_slab_at_once() -> None:
    def tensor(name: str, rows: int) -> Any:
        return SimpleNamespace(name=name, rows=np.zeros((rows, 1), np.uint8))

    gate, up = (tensor("gate", 3), tensor("gate'", 3)), (tensor("up", 7), tensor("up'", 7))
    slabs = compensate._slabs([gate, up], 4)
    assert [[(made.name, some.start, some.stop) for _, made, some in pieces] for pieces in slabs] == [
        [("gate'", 0, 3), ("up'", 0, 1)],
        [("up'", 1, 5)],
        [("up'", 5, 7)],
    ]


def test_a_row_may_be_one_block() -> None:
    weight, gram, _ = case()
    weight, gram = weight[:, :256].contiguous(), gram[:256, :256]
    blocks = by_llama_cpp("Q5_K", weight, gram.diagonal().contiguous())
    made = compensate.compensated("Q5_K", blocks, weight, compensate.input_of(gram, "here"))
    assert left(weight, "Q5_K", made, gram) < 0.9 * left(weight, "Q5_K", blocks, gram)


def test_each_step_after_the_feedback_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, _ = case()
    blocks = by_llama_cpp("Q2_K", weight, gram.diagonal().contiguous())
    given = compensate.input_of(gram, "here")
    rows = compensate._Rows("Q2_K", blocks, weight, given)

    def now() -> float:
        return float(((rows.error.t() @ given.gram) * rows.error.t()).sum())

    rows._feed_back()
    errors = [now()]
    for step in (rows._sweep, rows._search_scales, rows._sweep, rows._search_scales, rows._sweep):
        step()
        errors.append(now())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    # The error that is carried along is that of the bytes.
    found = dequantize(rows._packed().numpy(), gguf.GGMLQuantizationType.Q2_K)
    torch.testing.assert_close(weight - torch.from_numpy(found), rows.error.t(), rtol=1e-3, atol=1e-6)


def test_a_matrix_that_cannot_be_factored_is_named() -> None:
    tight = torch.eye(8) + 9 * (torch.ones(8, 8) - torch.eye(8))
    with pytest.raises(UserError, match="^blk.3.ffn_down.weight: the Gram matrix cannot be factored"):
        compensate.input_of(tight, "blk.3.ffn_down.weight")


def test_types_are_priced_by_what_is_left(tmp_path: Path) -> None:
    """Of tensors with a matrix, and of types whose codes are chosen; every such type has its share."""
    assert set(compensate.LEFT) == compensate.TYPES and all(0 < left < 1 for left in compensate.LEFT.values())
    grams.write(tmp_path, 0, {("a",): torch.eye(4)})
    prices = {"a": {"Q4_K": 10.0, "IQ2_S": 20.0}, "b": {"Q4_K": 10.0}}
    left = compensate.LEFT["Q4_K"] * 10
    assert compensate.repriced(prices, tmp_path) == {"a": {"Q4_K": left, "IQ2_S": 20.0}, "b": {"Q4_K": 10.0}}


def test_without_matrices_nothing_is_chosen(tmp_path: Path) -> None:
    assert compensate.told(None, str(tmp_path / "x.gguf"), None, lambda *_: None) == {}


def test_progress_is_by_the_work_that_is_left(tmp_path: Path) -> None:
    """A matrix of twice the columns takes more than twice as long, and quantizing before it next to nothing."""
    source, made = tmp_path / "base.gguf", tmp_path / "made.gguf"
    plain, quantized = (gguf.GGUFWriter(file, "llama") for file in (source, made))
    for name, columns in (("a", COLUMNS), ("b", 2 * COLUMNS)):
        weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
        plain.add_tensor(name, weight.numpy())
        blocks = by_llama_cpp("Q4_K", weight, torch.ones(columns)).numpy()
        quantized.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        grams.write(tmp_path, columns, {(name,): torch.eye(columns)})
    for writer in (plain, quantized):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    told = list[tuple[float, float, str]]()
    telling = compensate.first_step(str(tmp_path), lambda *step: told.append(step))
    telling(290, 290, "Q4_K_M")
    assert told.pop() == (0, 1, "Q4_K_M") and not told
    assert compensate.write(source, made, grams.read(tmp_path), lambda *step: told.append(step)) == 2
    shares = [done / total for done, total, _ in told]
    assert [words for *_, words in told] == ["codes of a", "codes of a", "codes of b", "codes of b"]
    assert shares[0] == 0 and shares[1] == shares[2] < 1 / 3 and shares[3] == pytest.approx(1)
