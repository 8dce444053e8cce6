"""Every GGUF type of the recipe's vocabulary is made by llama.cpp's quantizer and read back twice: by the `gguf`
package (which tensor got which type, how many bytes) and by llama.cpp itself (it loads and answers with numbers).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from tests.places import ROOT
from tests.worker.others import convert
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.errors import UserError
from workbench.worker.methods import gguf as method

TYPES = get_args(method.TypeName)
PROMISED = (
    "F16",
    "BF16",
    "Q2_K",
    "Q2_K_S",
    "Q3_K_S",
    "Q3_K_M",
    "Q3_K_L",
    "Q4_0",
    "Q4_1",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_0",
    "Q5_1",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
    "IQ4_NL",
    "IQ4_XS",
)
MAIN = {
    "IQ1_S": "IQ1_S",
    "IQ1_M": "IQ1_M",
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_XS": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "IQ4_XS": "IQ4_XS",
    "IQ4_NL": "IQ4_NL",
}
"""The type of most tensors in a mixture, where its name does not say so (llama.cpp, `llama_ftype_get_default_type`)."""
IDS = [50, 236, 146, 260, 141, 341, 30, 298]
VOCABULARY = 384


def main_type(name: str) -> str:
    return MAIN.get(name) or re.sub(r"_[SML]$", "", name)


# --- what the parent reads without an engine ----------------------------------------------------


def test_all_promised_types_and_the_lower_iq_ones_are_offered() -> None:
    assert set(PROMISED) <= set(TYPES)
    assert {name for name in TYPES if name.startswith(("IQ1", "IQ2", "IQ3"))} == set(TYPES) - set(PROMISED)


@pytest.mark.parametrize("name", TYPES)
def test_check_refuses_what_the_quantizer_would(name: str) -> None:
    if name in method.NEEDS_IMATRIX:
        with pytest.raises(UserError, match=rf"type {name} cannot be made without an importance matrix: write `gguf: "):
            method.check(method.Options(type=name))
    else:
        method.check(method.Options(type=name))
    method.check(method.Options(type=name, imatrix=True))


def test_names() -> None:
    assert method.default_name(method.Options("Q4_K_M")) == "gguf-Q4_K_M"
    assert method.default_name(method.Options("IQ2_M", imatrix=True)) == "gguf-IQ2_M-imatrix"
    assert method.making(method.Options("Q4_K_M"), cuda=False).calibration == ""
    assert method.making(method.Options("Q4_K_M", imatrix=True), cuda=False).calibration == "imatrix"


# --- the real thing -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, make_llama: Any) -> Path:
    """A random Llama of 256 channels, so that no K-quant falls back, with a small but real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "Small"
    make_llama(folder, hidden=256, intermediate=512, vocab_size=VOCABULARY, tied=True)
    return write_sentencepiece(folder)


@pytest.fixture(scope="module")
def converted(model: Path, call: Any) -> dict[str, Any]:
    out = model.parent / "Small-F32.gguf"
    made = call(
        "workbench.worker.methods.gguf:convert",
        {"base": str(model), "out": str(out), "dtype": "float32", "name": "Small"},
    )
    return {**made, "path": str(out)}


@pytest.fixture(scope="module")
def matrix(converted: dict[str, Any]) -> Path:
    """An importance matrix of the right shape; what it says does not matter here."""
    import gguf
    import numpy as np

    from workbench.worker.ggml import imatrix

    chance = np.random.default_rng(0)
    means = {
        tensor.name: chance.uniform(0.1, 2.0, int(tensor.shape[0])).astype(np.float32)
        for tensor in gguf.GGUFReader(converted["path"]).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    path = Path(converted["path"]).with_name("Small.imatrix.gguf")
    imatrix.write(path, means, tokens=1024, windows=2, window=512, dataset="random numbers")
    return path


@pytest.fixture(scope="module")
def reference(converted: dict[str, Any], call: Any) -> list[float]:
    return call("tests.worker.engine_logits:llama_logits", {"path": converted["path"], "ids": IDS})["logits"]


def read_back(path: str, made: dict[str, Any], name: str) -> dict[str, str]:
    """Hold a worker's answer against the file as the `gguf` package reads it; its tensors' types."""
    import gguf

    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    size_bytes = 0
    for tensor in reader.tensors:
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        count = 1
        for length in tensor.shape:
            count *= int(length)
        size_bytes += count // block * block_bytes
    assert made["tensor_types"] == types
    assert made["disk_bytes"] == size_bytes < Path(path).stat().st_size
    field = reader.get_field("general.file_type")
    wanted = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
    assert field is not None and gguf.LlamaFileType(int(field.contents())).name == wanted
    return types


def distance(found: list[float], wanted: list[float]) -> float:
    """Relative root mean square difference."""
    return (sum((a - b) ** 2 for a, b in zip(found, wanted, strict=True)) / sum(b * b for b in wanted)) ** 0.5


def bits_of(kind: str) -> float:
    """Bits a weight of a tensor type, scales included."""
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return block_bytes * 8 / block


def weight_errors(source: str, quantized: str) -> dict[str, float]:
    """By tensor type, the largest relative root mean square error of a layer's matrix, de-quantized by `gguf`."""
    import gguf
    import numpy as np

    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(source).tensors}
    errors: dict[str, float] = {}
    for tensor in gguf.GGUFReader(quantized).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            wanted = exact[tensor.name].astype(np.float64)
            found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
            error = float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))
            kind = tensor.tensor_type.name
            errors[kind] = max(error, errors.get(kind, 0.0))
    return errors


@pytest.mark.slow
def test_the_conversion_loses_nothing(model: Path, converted: dict[str, Any]) -> None:
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    types = read_back(converted["path"], converted, "F32")
    assert set(types.values()) == {"F32"} and converted["warnings"] == []
    weights = load_file(model / "model.safetensors")
    assert converted["disk_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(converted["path"]).tensors}
    assert len(stored) == len(weights)
    assert np.array_equal(stored["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert np.array_equal(stored["blk.1.ffn_down.weight"], weights["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_every_type_is_made_and_read_back(
    converted: dict[str, Any], matrix: Path, reference: list[float], call: Any, tmp_path: Path, name: str
) -> None:
    payload = {
        "source": converted["path"],
        "out": str(tmp_path / f"Small-{name}.gguf"),
        "type": name,
        "imatrix": None,
        "threads": None,
    }
    if name in method.NEEDS_IMATRIX:
        with pytest.raises(UserError, match=f"llama.cpp did not make {name}: .*requires an imatrix") as caught:
            call("workbench.worker.methods.gguf:quantize", payload)
        assert "\n" not in str(caught.value) and not os.listdir(tmp_path)
        payload["imatrix"] = str(matrix)
    made = call("workbench.worker.methods.gguf:quantize", payload)
    types = read_back(payload["out"], made, name)
    assert made["warnings"] == []
    counts = Counter(kind for tensor, kind in types.items() if tensor.startswith("blk.") and kind != "F32")
    assert counts[main_type(name)] > 0, f"{name} holds {dict(counts)}"
    answer = call("tests.worker.engine_logits:llama_logits", {"path": payload["out"], "ids": IDS})
    assert answer["status"] == 0 and answer["size"] == VOCABULARY
    assert None not in answer["logits"], "NaN or infinite logits"
    for kind, error in weight_errors(converted["path"], payload["out"]).items():
        # A float rounds to half a unit of its last place. Of a quantizer, Shannon's bound for a Gaussian is
        # 2^-bits; a uniform grid between a block's extremes, as Q4_1's, stays within three times that.
        most = {"F16": 2**-11, "BF16": 2**-8}.get(kind, 3.5 * 2 ** -bits_of(kind))
        assert error < most, f"{kind}: relative error {error:.2g}"
    if name in ("F16", "BF16", "Q8_0"):
        assert distance(answer["logits"], reference) < (0.08 if name == "Q8_0" else 0.02)


@pytest.mark.slow
def test_the_matrix_changes_what_is_made(converted: dict[str, Any], matrix: Path, call: Any, tmp_path: Path) -> None:
    files = []
    for weighted in (None, str(matrix)):
        files.append(tmp_path / f"{bool(weighted)}.gguf")
        payload = {
            "source": converted["path"],
            "out": str(files[-1]),
            "type": "Q4_K_M",
            "imatrix": weighted,
            "threads": 1,
        }
        call("workbench.worker.methods.gguf:quantize", payload)
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.slow
def test_compensated_codes_are_the_same_file_with_less_lost(
    converted: dict[str, Any], matrix: Path, call: Any, tmp_path: Path
) -> None:
    """Types, sizes and metadata are the quantizer's; what has no Gram matrix keeps its bytes; llama.cpp loads it."""
    import gguf
    import numpy as np
    import torch

    from workbench.worker.ggml import grams

    chance = np.random.default_rng(1)
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(converted["path"]).tensors}
    inputs = {}
    for width in (256, 512):
        x = chance.normal(size=(2000, width)) @ (chance.normal(size=(width, width)) * chance.random(width) ** 3)
        inputs[width] = (x.T @ x / 2000).astype(np.float32)
    layers = [name for name in exact if name.startswith("blk.") and name.endswith("weight") and exact[name].ndim == 2]
    for layer in range(2):
        mine = {(name,): torch.tensor(inputs[exact[name].shape[1]]) for name in layers if f"blk.{layer}." in name}
        grams.write(tmp_path / "grams", layer, mine)
    payload = {"source": converted["path"], "type": "Q4_K_M", "imatrix": str(matrix), "threads": 1}
    made = {}
    for name, more in (("nearest", {}), ("codes", {"grams": str(tmp_path / "grams")})):
        for turn in (1, 2):
            out = str(tmp_path / f"{name}-{turn}.gguf")
            made[name] = call("workbench.worker.methods.gguf:quantize", payload | {"out": out} | more)
        read_back(out, made[name], "Q4_K_M")
        assert Path(out).read_bytes() == (tmp_path / f"{name}-1.gguf").read_bytes()
    assert made["codes"]["tensor_types"] == made["nearest"]["tensor_types"]
    assert made["codes"]["provenance"]["rounding"]["compensated_tensors"] == len(layers) == 14
    files = [(tmp_path / f"{name}-1.gguf").read_bytes() for name in ("nearest", "codes")]
    readers = [gguf.GGUFReader(tmp_path / f"{name}-1.gguf") for name in ("nearest", "codes")]
    start = readers[0].data_offset
    assert len(files[0]) == len(files[1]) and files[0][:start] == files[1][:start]
    for nearest, codes in zip(readers[0].tensors, readers[1].tensors, strict=True):
        if nearest.name not in layers:
            assert np.array_equal(nearest.data, codes.data)
            continue
        wanted, gram = exact[nearest.name], inputs[exact[nearest.name].shape[1]]
        errors = [
            wanted - gguf.dequantize(each.data, each.tensor_type).reshape(wanted.shape) for each in (nearest, codes)
        ]
        powers = [float(((error @ gram) * error).sum()) for error in errors]
        assert powers[1] < 0.7 * powers[0], nearest.name
    answer = call("tests.worker.engine_logits:llama_logits", {"path": str(tmp_path / "codes-1.gguf"), "ids": IDS})
    assert answer["status"] == 0 and None not in answer["logits"]


@pytest.mark.slow
def test_a_source_that_is_no_gguf(call: Any, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("not a model")
    source, out = str(tmp_path / "x.gguf"), str(tmp_path / "y.gguf")
    payload = {"source": source, "out": out, "type": "Q8_0", "imatrix": None, "threads": 1}
    with pytest.raises(UserError, match="llama.cpp did not make Q8_0: .*magic"):
        call("workbench.worker.methods.gguf:quantize", payload)
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.slow
def test_a_fallback_reaches_the_artifact_as_a_warning(tmp_path: Path, make_llama: Any, make_tokenizer: Any) -> None:
    """Rows of 192 hold no whole super-block of 256; llama.cpp then takes another type without a word."""
    make_tokenizer(make_llama(tmp_path / "Odd", hidden=192, intermediate=512))
    recipe = {
        "base": {"path": str(tmp_path / "Odd")},
        "variants": [{"gguf": "Q4_K_M"}, {"gguf": "Q8_0"}],
        "backends": ["llamacpp"],
        "workload": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    answer = subprocess.run(
        [sys.executable, "-m", "workbench.cli", "run", "r.yaml", "--format", "json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WORKBENCH_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert answer.returncode == 0, answer.stderr
    lines = {line["variant"]: line for line in json.loads(answer.stdout)}
    # What the rows say of a busy machine is another matter.
    said = {
        name: [text for text in line["warnings"] if not text.startswith(("the machine was", "the processor"))]
        for name, line in lines.items()
    }
    assert said["base"] == said["gguf-Q8_0"] == []
    (warning,) = said["gguf-Q4_K_M"]
    assert re.fullmatch(
        r"\d+ of 21 tensors are Q5_0, Q8_0 instead of Q4_K_M: their rows are no multiple of 256", warning
    ), warning
    (record,) = [
        json.loads(path.read_text())
        for path in (tmp_path / "home" / "artifacts").glob("*/artifact.json")
        if json.loads(path.read_text())["variant"] == "gguf-Q4_K_M"
    ]
    types = record["tensor_types"]
    # Q4_K falls back to Q5_0 and Q6_K to Q8_0, where rows have 192 channels; ffn_down's have 512.
    assert types["blk.0.attn_q.weight"] == "Q5_0" and types["blk.0.ffn_down.weight"] in ("Q4_K", "Q6_K")
    assert lines["gguf-Q4_K_M"]["bits_per_weight"] > 5, "and the table says what it really costs"


@pytest.mark.slow
def test_a_base_without_a_vocabulary_leaves_the_next_one_its_own(tmp_path: Path) -> None:
    reader = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    bare, whole = (write_model(tmp_path / name, "llama") for name in ("bare", "whole"))
    write_sentencepiece(whole)
    found = []
    for base in (bare, whole):
        fields = reader.GGUFReader(convert(base, base.with_suffix(".gguf"))).fields
        found.append("tokenizer.ggml.tokens" in fields)
    assert found == [False, True]
