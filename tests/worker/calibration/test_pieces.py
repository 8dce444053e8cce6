"""The pass's pieces by themselves, with arrays instead of models: Grams, batches, layout, what a stopped run leaves."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.records import CalibrationRequest, CheckpointRequest
from workbench.worker.architectures import SEPARATE, sizes_of
from workbench.worker.base.checkpoint import StoredTensor
from workbench.worker.calibration import gram, layout, resume, run, skeleton, variants, walk
from workbench.worker.calibration.discover import structures_of
from workbench.worker.calibration.gram import Grams
from workbench.worker.calibration.weights import Weights
from workbench.worker.calibration.windows import Windows, read_windows
from workbench.worker.methods import awq, gptq

torch = pytest.importorskip("torch")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
CPU = torch.device("cpu")


def weights_of(folder: Path, tied: bool = False, layers: int = 12) -> Weights:
    """A base of so many layers as its headers would say."""
    config = CONFIG | {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    axes = sizes_of(config).axes
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (64,), "lm_head.weight": (50, 64)}
    for index in range(layers):
        shapes[f"model.layers.{index}.input_layernorm.weight"] = (64,)
        for name, linear in SEPARATE.items():
            shapes[f"model.layers.{index}.{name}.weight"] = (axes[linear.rows], axes[linear.columns])
            shapes[f"model.layers.{index}.{name}.bias"] = (axes[linear.rows],)
    shapes["model.embed_tokens.weight"] = (50, 64)
    file = folder / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"weights")
    return Weights(
        folder,
        config,
        structures_of(config),
        {name: StoredTensor(file, "F32", each, 4) for name, each in shapes.items()},
    )


def windows_of(lengths: list[int], numbers: list[int] | None = None) -> Windows:
    return Windows(torch.zeros(sum(lengths), dtype=torch.int64), lengths, numbers or list(range(len(lengths))))


@pytest.mark.parametrize("size", [8, 64, 129, 700])
def test_a_gram_is_the_mean_of_the_products(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "GRAM_BLOCK", 64)
    chance = torch.Generator().manual_seed(size)
    pieces = [torch.randn(1, rows, size, generator=chance) for rows in (7, 12)]
    grams = Grams(3, CPU, windows_of([10, 9]))
    for piece in pieces:
        grams._add("q", piece)
    found = grams.finish()["q"]
    x = torch.cat(pieces, 1)[0].double()
    torch.testing.assert_close(found.double(), x.t() @ x / 19, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.t())


def test_an_input_that_is_not_finite_names_its_sample() -> None:
    for bad, sample in ((0, 7), (4, 7), (5, 2), (9, 4), (11, 4)):
        grams = Grams(3, CPU, windows_of([5, 3, 4], [7, 2, 4]))
        x = torch.zeros(1, 12, 8)
        x[0, bad, 3] = torch.inf
        with pytest.raises(
            UserError, match=f"^layer 3: the input of q is not finite, first in calibration sample {sample}:"
        ):
            grams._add("q", x)
    later = Grams(3, CPU, windows_of([5, 3, 4], [7, 2, 4]), start=5)
    with pytest.raises(UserError, match="sample 4:"):
        later._add("q", torch.cat([torch.zeros(3, 8), torch.full((1, 8), torch.nan)])[None])
    # The sum overflows though each value is a number: said of the first sample of the batch.
    with pytest.raises(UserError, match="sample 2:"):
        Grams(3, CPU, windows_of([5, 3, 4], [7, 2, 4]), start=5)._add("q", torch.full((1, 3, 8), 3e38))


def test_tokens_are_numbered_by_their_windows() -> None:
    windows = windows_of([3, 1, 4], [5, 0, 2])
    assert [windows.number_at(token) for token in range(8)] == [5, 5, 5, 0, 2, 2, 2, 2]
    assert windows.number_at(8) == 2 and windows.tokens == 8


@pytest.mark.parametrize(
    ("lengths", "token", "refused"),
    [
        ([64, 64], 49, ""),
        ([64, 63], 0, "the calibration has 127 tokens; at least 128 are needed and 16384 are usual"),
        ([64, 64], 50, "calibration window 0 holds token 50, outside the vocabulary of 50"),
        ([80, 100], 1, ""),
        ([80, 101], 1, "a calibration window has 101 tokens and the model's context 100"),
    ],
)
def test_the_ends_of_what_can_be_run(tmp_path: Path, lengths: list[int], token: int, refused: str) -> None:
    weights = weights_of(tmp_path)
    weights = replace(weights, config={**weights.config, "max_position_embeddings": 100})
    (tmp_path / "t.json").write_text(json.dumps({"windows": [[token] * length for length in lengths]}))
    if refused:
        with pytest.raises(UserError, match=refused):
            read_windows(tmp_path / "t.json", weights)
        return
    found = read_windows(tmp_path / "t.json", weights)
    assert (found.tokens, found.lengths, found.numbers) == (sum(lengths), lengths, [0, 1])


def test_batches_are_the_largest_of_equal_windows_that_keep_activations_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "ACTIVATIONS", 1000)
    chance = random.Random(3)
    for _ in range(50):
        lengths = sorted(chance.choice([3, 7, 50]) for _ in range(chance.randint(1, 12)))
        width = chance.choice([10, 40])
        found, place, start = walk.batches(lengths, width), 0, 0
        for at, (first, count, length) in enumerate(found):
            assert first == start and lengths[place : place + count] == [length] * count
            most = max(1, 1000 // (width * length))
            assert 1 <= count <= most
            following = found[at + 1] if at + 1 < len(found) else None
            assert following is None or following[2] != length or count == most
            place, start = place + count, start + count * length
        assert place == len(lengths)


def test_what_a_layer_is_called_with_is_moved_whole() -> None:
    inside = {"a": (torch.zeros(2), [torch.ones(1), None]), "b": {"c": torch.zeros(1)}, "d": 5}
    moved = skeleton._moved(inside, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and moved["b"]["c"].is_meta
    assert moved["a"][1][1] is None and moved["d"] == 5 and isinstance(moved["a"], tuple)


# --- a checkpoint ---------------------------------------------------------------------------------

LAYOUT: layout.Layout = {"a": ("F16", (5, 3)), "b": ("I32", (2, 2)), "c": ("BF16", (7,)), "d": ("F32", ())}


def test_tensors_come_to_their_places_in_any_order_and_by_rows(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = layout.Checkpoint(tmp_path / "out", LAYOUT)
    assert not checkpoint.laid_out()
    checkpoint.lay_out()
    assert checkpoint.laid_out()
    values = {
        "a": torch.arange(15.0).view(5, 3),
        "b": torch.tensor([[1, -2], [3, 2**31 - 1]]),
        "c": torch.arange(7.0),
        "d": torch.tensor(2.5),
    }
    checkpoint.write("d", values["d"])
    checkpoint.write("a", values["a"][3:], 3)
    checkpoint.write("c", values["c"])
    checkpoint.write("a", values["a"][:3])
    checkpoint.write("b", values["b"])
    found = load_file(tmp_path / "out/model.safetensors")
    for name, value in values.items():
        assert torch.equal(found[name].to(value.dtype), value), name
    assert checkpoint.laid_out(), "what is written leaves the layout alone"


def test_files_of_another_layout_are_not_gone_on_with(tmp_path: Path) -> None:
    checkpoint = layout.Checkpoint(tmp_path, LAYOUT)
    checkpoint.lay_out()
    (file,) = checkpoint.heads
    whole = file.read_bytes()
    for spoiled in (whole[:-1], whole + b"x", whole.replace(b'"c"', b'"e"'), None):
        file.unlink() if spoiled is None else file.write_bytes(spoiled)
        assert not checkpoint.laid_out()
    file.write_bytes(whole)
    assert checkpoint.laid_out()


def test_what_a_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    checkpoint = layout.Checkpoint(tmp_path, LAYOUT)
    checkpoint.lay_out()
    checkpoint.write("a", torch.full((5, 3), 65504.0))
    with pytest.raises(UserError, match=r"tensor 'a' does not fit F16 \(its largest entry is 7e\+04\)"):
        checkpoint.write("a", torch.full((5, 3), -70000.0))
    checkpoint.write("c", torch.full((7,), 70000.0))
    with pytest.raises(AssertionError, match=r"a came out as \(5, 4\), planned \(5, 3\)"):
        checkpoint.write("a", torch.zeros(5, 4))


def test_the_layout_is_the_embedding_then_layers_by_number_then_the_rest(tmp_path: Path) -> None:
    made, types = layout.layout_of(weights_of(tmp_path), awq, awq.Options(group_size=32))  # type: ignore[arg-type]
    order = [name.split(".")[2] if "layers" in name else name for name in made]
    assert list(dict.fromkeys(order)) == [
        "model.embed_tokens.weight",
        *map(str, range(12)),
        "lm_head.weight",
        "model.norm.weight",
    ]
    prefix = "model.layers.3.self_attn.q_proj"
    assert {name.removeprefix(prefix + "."): entry for name, entry in made.items() if name.startswith(prefix)} == {
        "qweight": ("I32", (64, 8)),
        "qzeros": ("I32", (2, 8)),
        "scales": ("F16", (2, 64)),
        "bias": ("F16", (64,)),
    }
    assert types[f"{prefix}.weight"] == "I4-g32" and types[f"{prefix}.bias"] == types["lm_head.weight"] == "F16"
    assert types["model.layers.3.input_layernorm.weight"] == "F16"
    tied, _ = layout.layout_of(weights_of(tmp_path, tied=True), gptq, gptq.Options(group_size=32))  # type: ignore[arg-type]
    assert "lm_head.weight" not in tied and {"model.layers.0.mlp.up_proj.g_idx", "model.norm.weight"} <= set(tied)
    kept = awq.Options(group_size=32, modules_to_not_convert=("q_proj",))
    plain, kinds = layout.layout_of(weights_of(tmp_path), awq, kept)  # type: ignore[arg-type]
    assert plain[f"{prefix}.weight"] == ("F16", (64, 64)) and kinds[f"{prefix}.weight"] == "F16"


def test_only_what_is_quantized_must_divide(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    with pytest.raises(UserError, match=r"^v: model.layers.0.mlp.down_proj \(64 x 96\): group_size 64 .* take 32$"):
        layout.check_shapes(weights, "v", awq, awq.Options(group_size=64))  # type: ignore[arg-type]
    layout.check_shapes(weights, "v", awq, awq.Options(group_size=64, modules_to_not_convert=("down_proj",)))  # type: ignore[arg-type]


def test_a_base_as_the_pass_sees_it(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    assert (weights.layers, weights.widest, weights.tied) == (12, 96, False)
    assert weights_of(tmp_path, tied=True).tied
    headless = {name: tensor for name, tensor in weights.tensors.items() if name != "lm_head.weight"}
    assert replace(weights, tensors=headless).tied


# --- what a stopped run leaves --------------------------------------------------------------------


def work_in(folder: Path, key: str = "k", tokens: int = 6) -> resume.Work:
    checkpoints = {"v": layout.Checkpoint(folder / "out", LAYOUT)}
    return resume.open_work(folder / "deep" / "state", key, windows_of([tokens]), weights_of(folder), checkpoints)


def test_work_goes_on_where_everything_is_there_and_begins_anew_otherwise(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    assert (work.note.layer, work.note.errors, work.note.warnings) == (0, {"v": {}}, {"v": []})
    state = work.folder
    files = [state / "hidden-0.bin", state / "hidden-1.bin"]
    assert [file.stat().st_size for file in files] == [6 * 64 * 4] * 2
    work.hidden(0)[2] = 5.0
    work.note.errors["v"]["x"] = 0.5
    work.finished(3)
    again = work_in(tmp_path)
    assert again.note.layer == 4 and again.note.errors == {"v": {"x": 0.5}}
    # The input of even layers lies in one file, that of odd ones in the other.
    assert again.hidden(4)[2].tolist() == [5.0] * 64 and not again.hidden(5).any()
    assert again.hidden(4) is again.hidden(2)
    note = (state / "progress.json").read_text()

    def layer_after(change: Any, **more: Any) -> int:
        work_in(tmp_path)  # whole again
        (state / "progress.json").write_text(note)
        change()
        return work_in(tmp_path, **more).note.layer

    assert layer_after(lambda: None) == 4
    assert layer_after(lambda: None, key="other") == 0
    assert layer_after(lambda: None, tokens=7) == 0
    for file in files:
        assert layer_after(file.unlink) == 0
        assert layer_after(lambda file=file: file.write_bytes(b"short")) == 0
    assert layer_after((tmp_path / "out/model.safetensors").unlink) == 0
    assert layer_after(lambda: (state / "progress.json").write_text('{"key": "k"}')) == 0
    assert layer_after(lambda: (state / "progress.json").write_text("half")) == 0
    assert layer_after((state / "progress.json").unlink) == 0
    assert work_in(tmp_path).note.layer == 0 and [file.stat().st_size for file in files] == [6 * 64 * 4] * 2


def test_the_diagonals_of_a_layer_come_back(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    matrix = torch.arange(9.0).view(3, 3)
    work.keep_importance(7, {"q": matrix.diagonal().clone(), "o": 2 * matrix.diagonal()})
    assert {name: values.tolist() for name, values in work.importance(7).items()} == {"q": [0, 4, 8], "o": [0, 8, 16]}


def test_the_key_has_all_that_the_bytes_depend_on(tmp_path: Path) -> None:
    variant = CheckpointRequest(name="v", method="awq", options={}, out="o")
    asked = CalibrationRequest(
        base="b", tokens="t", tokens_digest="d", variants=[variant], imatrix_out=None, state="s", device="cpu",
        threads=1, seed=0, precision="float32",
    )  # fmt: skip
    weights = weights_of(tmp_path)

    def key(
        request: CalibrationRequest = asked, of: Weights = weights, precision: str = "float32", processes: int = 1
    ) -> str:
        return resume.key_of(request, of, [CPU] * processes, precision)

    plain = key()
    assert plain == key(replace(asked, state="elsewhere", base="moved"))
    others = {
        key(replace(asked, tokens_digest="e")),
        key(replace(asked, imatrix_out="i.gguf")),
        key(replace(asked, variants=[replace(variant, options={"group_size": 32})])),
        key(replace(asked, variants=[])),
        key(precision="bfloat16"),
        key(processes=2),
        key(processes=4),
        key(of=replace(weights, config={**weights.config, "rope_theta": 5})),
    }
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    others.add(key())
    assert len(others | {plain}) == 10


def test_progress_is_told_in_forward_passes() -> None:
    told: list[tuple[float, float, str]] = []
    made: list[Any] = [
        variants.Variant("a", awq, options, None, {})  # type: ignore[arg-type]
        for options in (awq.Options(), awq.Options(rounding="compensated"), gptq.Options())
    ]
    assert [variant.cost for variant in made] == [0.5, 0.8, 0.5]
    bar = run._Bar(lambda *words: told.append(words), 4, made, 1)
    bar.text("here")
    bar.step(1.0)
    bar.step(0.5)
    assert told == [(pytest.approx(done), pytest.approx(11.2), "here") for done in (2.8, 3.8, 4.3)]


def test_fewer_tokens_than_the_widest_layers_inputs_are_told(tmp_path: Path) -> None:
    weights = weights_of(tmp_path)
    assert windows_of([50, 46]).warnings(weights) == []
    (line,) = windows_of([50, 45]).warnings(weights)
    assert line.startswith("95 calibration tokens are fewer than the widest layer's 96 inputs")


def test_seconds_are_added_up_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(moments))
    seconds: dict[str, float] = {}
    for _ in range(2):
        with run._timed(seconds, "read"):
            pass
    assert seconds == {"read": 2.5}


def test_the_note_is_what_it_was(tmp_path: Path) -> None:
    work = work_in(tmp_path)
    work.finished(0)
    assert json.loads((work.folder / "progress.json").read_text()) == {
        "key": "k",
        "errors": {"v": {}},
        "warnings": {"v": []},
        "seconds": {},
        "experts": {},
        "layer": 1,
    }
