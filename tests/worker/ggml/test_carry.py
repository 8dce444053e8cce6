"""AWQ and GPTQ in llama.cpp's blocks: the blocks by hand, every width of a checkpoint, and what is refused.

Every architecture's weights: `tests/worker/test_carried_weights.py`, its logits in llama.cpp: `test_architectures.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import pass_request, write_model, write_sentencepiece
from tests.worker.unpacking import dequantize_awq, dequantize_gptq
from workbench import disk
from workbench.errors import UserError
from workbench.worker.calibration import run as calibrate
from workbench.worker.ggml import carry
from workbench.worker.methods import gptq
from workbench.worker.methods.grouped import container

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 384}
VARIANTS: dict[str, tuple[str, dict[str, object], str, int]] = {
    "awq": ("awq", {"group_size": 32}, "Q4_1", 4),
    "gptq-4": ("gptq", {"group_size": 64}, "Q4_0", 4),
    "gptq-4-row": ("gptq", {"group_size": -1}, "Q4_0", 4),
    "gptq-4-asym": ("gptq", {"group_size": 32, "sym": False}, "Q4_1", 4),
    "gptq-8": ("gptq", {"group_size": 32, "bits": 8}, "Q8_0", 8),
    "gptq-3": ("gptq", {"group_size": 32, "bits": 3}, "Q4_0", 3),
    "gptq-3-asym": ("gptq", {"group_size": 32, "bits": 3, "sym": False}, "Q4_0", 3),
    "gptq-2": ("gptq", {"group_size": 32, "bits": 2}, "Q4_0", 2),
    "act-order": ("gptq", {"group_size": 32, "desc_act": True}, "", 4),
    "gptq-8-asym": ("gptq", {"group_size": 32, "bits": 8, "sym": False}, "", 8),
    "group-16": ("gptq", {"group_size": 16}, "", 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's checkpoints: its rows of queries and keys lie in another order in a GGUF file."""
    made = tmp_path_factory.mktemp("carry")
    base = write_sentencepiece(write_model(made / "base", "llama", **WIDE))
    variants = {name: (method, options) for name, (method, options, *_) in VARIANTS.items()}
    request = pass_request(base, made, variants, imatrix_out=None, precision="auto")
    assert calibrate.run(request, lambda *_: None)["refused"] == {}
    return made


def carried(source: Path) -> Any:
    request = {"base": "", "source": str(source), "out": f"{source}.gguf", "options": {}}
    return carry.carry(request, lambda *_: None)


def test_a_block_of_each_type_by_hand() -> None:
    """ggml's layout: a float16 scale (and minimum), then codes, the first half of a block in the low nibbles."""
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    scales = np.array([[0.5]], np.float16)
    made = carry.blocks("Q4_0", codes, np.array([[8]], np.uint8), scales)[0]
    assert made[:2].view(np.float16)[0] == 0.5
    assert made[2:].tolist() == [i | i << 4 for i in range(16)]
    made = carry.blocks("Q4_1", codes, np.array([[3]], np.uint8), scales)[0]
    assert made[:4].view(np.float16).tolist() == [0.5, -1.5]
    made = carry.blocks("Q8_0", np.array([[255] * 32], np.uint8), np.array([[128]], np.uint8), scales)[0]
    assert made[2:].view(np.int8).tolist() == [127] * 32


def test_a_group_of_several_blocks_has_its_scale_in_each() -> None:
    rows = carry.blocks("Q4_0", np.full((1, 128), 9, np.uint8), np.full((1, 2), 8, np.uint8), np.array([[1, 2]], "f2"))
    assert gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_0)[0].tolist() == [1.0] * 64 + [2.0] * 64


@pytest.mark.parametrize(
    ("bits", "zeros", "kind"),
    [
        (4, (8, 8), "Q4_0"),
        (4, (7, 8), "Q4_1"),
        (4, (0, 15), "Q4_1"),
        (3, (0, 7), "Q4_0"),
        (2, (0, 3), "Q4_0"),
        (8, (128, 128), "Q8_0"),
        (8, (127, 128), None),
    ],
)
def test_the_type_is_the_smallest_that_holds_every_difference(
    bits: int, zeros: tuple[int, int], kind: str | None
) -> None:
    assert container(bits, *zeros) == kind


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_is_the_inverse_of_pack(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (96, 5), dtype=torch.uint8)
    assert torch.equal(gptq.unpack(gptq.pack(codes, bits), bits), codes)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, _, kind, _) in VARIANTS.items() if kind])
def test_the_weights_are_the_checkpoints(name: str, folder: Path) -> None:
    """Each matrix read back by the `gguf` package against our other unpacking, which is in tests alone."""
    from safetensors.torch import load_file

    method, _, kind, bits = VARIANTS[name]
    made = carried(folder / name)
    assert set(made["tensor_types"].values()) == {kind, "F16", "F32"}
    tensors = load_file(folder / name / "model.safetensors")
    file = {each.name: each for each in gguf.GGUFReader(f"{folder / name}.gguf").tensors}
    short = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v", "self_attn.q_proj": "attn_q"}
    for linear, inside in short.items():
        stem = f"model.layers.1.{linear}"
        parts = {part: tensors[f"{stem}.{part}"] for part in carry.PARTS if f"{stem}.{part}" in tensors}
        weight = dequantize_awq(parts) if method == "awq" else dequantize_gptq(parts, bits)
        if inside == "attn_q":
            weight = weight.reshape(4, 2, 16, -1).swapaxes(1, 2).reshape(weight.shape)
        stored = file[f"blk.1.{inside}.weight"]
        written = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        off = float((written - weight).abs().max() / weight.abs().max())
        assert off <= (5e-4 if kind == "Q4_1" else 0.0), linear
    embedding = file["token_embd.weight"]
    assert torch.equal(torch.from_numpy(embedding.data.copy()), tensors["model.embed_tokens.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("act-order", "its groups are not runs of inputs"),
        ("gptq-8-asym", "8 bits with zero points"),
        ("group-16", "groups of 16 .* no multiple of llama.cpp's blocks of 32"),
    ],
)
def test_what_no_block_holds_is_refused_by_name_and_beforehand(name: str, why: str, folder: Path) -> None:
    with pytest.raises(UserError, match=rf"{name} cannot be carried to GGUF: model\.layers\.0.*{why}"):
        carried(folder / name)
    assert not Path(f"{folder / name}.gguf").exists()
    assert "llamacpp" in gptq.limits(gptq.Options(**VARIANTS[name][1]))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("scales", float("nan"), "no float16 numbers"),
        ("scales", 1e6, "no float16 numbers"),
        ("scales", 1.0 + 2**-13, "no float16 numbers"),
        ("qweight", None, "is missing"),
    ],
)
def test_a_spoiled_checkpoint_is_refused(
    part: str, value: float | None, why: str, folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    spoiled = shutil.copytree(folder / "gptq-4", tmp_path / "spoiled")
    tensors = load_file(spoiled / "model.safetensors")
    name = f"model.layers.1.mlp.up_proj.{part}"
    if value is None:
        del tensors["model.layers.1.mlp.up_proj.scales"]
    else:
        tensors[name] = tensors[name].float()
        tensors[name][0, 0] = value
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=why):
        carried(spoiled)
    assert [each.name for each in tmp_path.iterdir()] == ["spoiled"]


@pytest.mark.slow
def test_zero_points_off_the_grid_take_another_type_or_are_refused(folder: Path, tmp_path: Path) -> None:
    """One zero other than the rest: 4 bits become Q4_1, 8 bits cannot be held."""
    from safetensors.torch import load_file, save_file

    for name, kinds in (("gptq-4", {"Q4_0", "Q4_1"}), ("gptq-8", set[str]())):
        spoiled = shutil.copytree(folder / name, tmp_path / name)
        tensors = load_file(spoiled / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.qzeros"][0, 0] -= 1
        save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
        if kinds:
            assert kinds <= set(carried(spoiled)["tensor_types"].values())
        else:
            with pytest.raises(UserError, match="gptq-8 cannot be carried to GGUF: .*8 bits with zero points"):
                carried(spoiled)


@pytest.mark.slow
def test_a_checkpoint_that_is_gone_or_of_another_layout(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing cannot be carried to GGUF: its folder is not there any more"):
        carried(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"base cannot be carried to GGUF: .*supported are awq .* and gptq"):
        carried(folder / "base")
    other = shutil.copytree(folder / "gptq-4", tmp_path / "other")
    text = (other / "config.json").read_text().replace('"checkpoint_format": "gptq"', '"checkpoint_format": "marlin"')
    (other / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"quantization_config .*'checkpoint_format': 'marlin'.*supported are"):
        carried(other)
    assert [each.name for each in tmp_path.iterdir()] == ["other"]


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 1])
def test_a_disk_too_full_for_the_file(folder: Path, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the numbered checkpoint is written, and before the file is: told with the sizes, and nothing is left."""
    usage = disk.shutil.disk_usage

    def full(path: Path) -> Any:
        nonlocal left
        left -= 1
        return usage(path)._replace(free=1000) if left < 0 else usage(path)

    monkeypatch.setattr(disk.shutil, "disk_usage", full)
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"gptq-3 cannot be carried to GGUF: .*no space left for it \("):
        carried(folder / "gptq-3")
    assert sorted(folder.iterdir()) == [each for each in before if each.name != "gptq-3.gguf"]


@pytest.mark.slow
def test_each_matrix_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the proof computes with is read back from the file."""
    made, blocks = [], carry.blocks

    def counted(*given: Any) -> Any:
        made.append(given[1].shape)
        return blocks(*given)

    monkeypatch.setattr(carry, "blocks", counted)
    carried(folder / "gptq-4")
    assert len(made) == 2 * 7


@pytest.mark.slow
def test_rows_in_the_wrong_order_are_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof could fail: with the checkpoint's order of rows in the place of the converter's, it does."""
    place = carry._place

    def unmoved(*given: Any) -> Any:
        found = place(*given)
        return (
            found
            if found.rows is None
            else carry._Place(found.tensor, found.kind, found.rows[np.lexsort(found.rows.T)])
        )

    monkeypatch.setattr(carry, "_place", unmoved)
    with pytest.raises(UserError, match="llama.cpp makes another model of it"):
        carried(folder / "gptq-4")
