"""A pass over several processes: the same sums to rounding, the same bytes again, and nobody left running however it
ends."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.bench import Bench
from tests.worker.small_models import pass_request, write_model, write_tokens
from workbench.errors import UserError
from workbench.worker.calibration import device, helper, team
from workbench.worker.calibration import run as calibrate
from workbench.worker.calibration.gram import Grams
from workbench.worker.calibration.walk import FEWEST_ROUTED
from workbench.worker.calibration.windows import Windows

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "awq": ("awq", {"group_size": 32}),
    "gptq": ("gptq", {"group_size": 32}),
}
NEAR = 1e-6
"""The most by which a Gram matrix may differ, of its own norm."""


def helpers_of(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and helper.__name__ in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert helpers_of(psutil.Process()) == []


# --- how windows are dealt out ------------------------------------------------------------------


def test_every_process_has_a_run_of_windows_of_about_as_many_tokens() -> None:
    chance = random.Random(5)
    for _ in range(300):
        lengths = sorted(chance.choice([3, 40, 500]) for _ in range(chance.randint(1, 20)))
        count = chance.randint(1, len(lengths))
        shares = [*pairwise(team.cuts(lengths, count))]
        assert shares[0][0] == 0 and shares[-1][1] == len(lengths) and len(shares) == count
        assert all(first < end for first, end in shares)
        tokens = [sum(lengths[first:end]) for first, end in shares]
        if count < len(lengths) // 4:
            assert max(tokens) <= sum(lengths) / count + 2 * max(lengths)
    assert team.cuts([40] * 24, 4) == [0, 6, 12, 18, 24]
    assert team.cuts([1, 1, 1, 900], 3) == [0, 2, 3, 4]


def test_a_part_of_windows_has_their_tokens_and_numbers() -> None:
    windows = Windows(torch.arange(10), [1, 2, 3, 4], [7, 5, 6, 4])
    part = windows.part(1, 3)
    assert (part.ids.tolist(), part.lengths, part.numbers) == ([1, 2, 3, 4, 5], [2, 3], [5, 6])


def test_which_devices_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process on a processor unless more are asked for; every GPU unless fewer are, or one is named."""

    def named(name: str, count: int | None = None) -> list[str]:
        return [str(each) for each in device.choose_devices(name, count)]

    assert named("cpu") == ["cpu"] and named("cpu", 3) == ["cpu"] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert named("auto") == ["cuda", "cuda:1", "cuda:2", "cuda:3"]
    assert named("auto", 2) == ["cuda", "cuda:1"] and named("auto", 1) == ["cuda"]
    assert named("cuda:2") == ["cuda:2"] and named("cuda:2", 2) == ["cuda:2", "cuda:3"]
    with pytest.raises(UserError, match=r"^calibration\.devices: 5, and torch sees 4 CUDA devices here"):
        named("auto", 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert named("auto") == ["cpu"]


def test_what_another_process_has_is_added() -> None:
    windows = Windows(torch.zeros(4, dtype=torch.int64), [4], [0])
    grams, cpu = Grams(0, torch.device("cpu"), windows), torch.ones(2, 2)
    grams.take("q", cpu, 3)
    cpu.zero_()
    grams.take("q", torch.full((2, 2), 2.0), 1)
    assert grams.finish()["q"].tolist() == [[0.75, 0.75], [0.75, 0.75]] and grams.counts == {"q": 4}
    with pytest.raises(UserError, match="^layer 0: the input of q is not finite when it is summed up: the base's"):
        for _ in range(2):
            grams.take("q", torch.full((2, 2), 3e38), 1)


# --- sums ---------------------------------------------------------------------------------------


def passed(
    base: Path, out: Path, devices: int, monkeypatch: pytest.MonkeyPatch, tokens: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pass over so many processes: its answer, and each layer's Gram matrices."""
    real, seen = calibrate.forward, dict[str, Any]()

    def remembers(*args: Any) -> Any:
        grams, counts = real(*args)
        seen.update({f"{args[2]}.{name}": matrix.clone() for name, matrix in grams.items()})
        return grams, counts

    with monkeypatch.context() as patched:
        patched.setattr(calibrate, "forward", remembers)
        request = pass_request(base, out, VARIANTS, tokens=tokens, devices=devices, threads=devices)
        made = calibrate.run(request, lambda *_: None)
    assert torch.get_num_threads() == devices
    return dict(made), seen


def farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two passes' matrices, each of its own norm."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.slow
def test_the_sums_of_four_processes_are_those_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of another order of the same sum, of windows of several lengths."""
    base = write_model(tmp_path / "base", "llama")
    tokens = write_tokens(tmp_path / "tokens.json", [40, 17, 40, 33, 17, 5, 120, 60, 60, 60])
    one, alone = passed(base, tmp_path / "one", 1, monkeypatch, tokens)
    four, shared = passed(base, tmp_path / "four", 4, monkeypatch, tokens)
    assert len(alone) == 8 and farthest(alone, shared) < NEAR
    assert (one["devices"], four["devices"]) == (1, 4)
    for name in VARIANTS:
        ours, theirs = (each["variants"][name]["tensor_errors"] for each in (one, four))
        assert theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.slow
def test_experts_are_summed_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them are starved is known of all tokens together; some are sent none in one process."""
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "tie_word_embeddings": False}
    base = write_model(tmp_path / "base", "qwen3_moe", **sizes, num_experts=32)
    one, alone = passed(base, tmp_path / "one", 1, monkeypatch)
    four, shared = passed(base, tmp_path / "four", 4, monkeypatch)
    counts = [count for seen in one["experts"].values() for count in seen]
    assert 0 < sum(count < FEWEST_ROUTED for count in counts) < len(counts)
    assert four["experts"] == one["experts"]
    assert len(alone) == 2 * (2 + 2 * 32) and farthest(alone, shared) < NEAR


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_pass_which_is_gone_on_with(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "llama")
    whole = pass_request(base, tmp_path / "whole", VARIANTS, devices=2)
    calibrate.run(whole, lambda *_: None)
    cut = pass_request(base, tmp_path / "cut", VARIANTS, devices=2)

    def kills(done: float, total: float, text: str) -> None:
        if text == "layer 2 of 2: forward pass":
            for each in helpers_of(psutil.Process()):
                each.kill()

    line = "process 2 of 2 of the calibration pass was killed by SIGKILL .*ask for fewer `devices` in `calibration`"
    with pytest.raises(UserError, match=line):
        calibrate.run(cut, kills)
    words = set[str]()
    calibrate.run(cut, lambda done, total, text: words.add(text))
    assert not any(text.startswith("layer 1 ") for text in words), "the first layer was there"
    for name in VARIANTS:
        for file in sorted((tmp_path / "whole" / name).iterdir()):
            assert file.read_bytes() == (tmp_path / "cut" / name / file.name).read_bytes(), file.name
    assert (tmp_path / "whole/imatrix.gguf").read_bytes() == (tmp_path / "cut/imatrix.gguf").read_bytes()


@pytest.mark.slow
def test_what_another_process_finds_is_told_as_if_there_were_one(tmp_path: Path) -> None:
    """A token of the last window alone has a damaged embedding."""
    from safetensors.torch import load_file, save_file

    base = write_model(tmp_path / "base", "llama")
    tokens = write_tokens(tmp_path / "tokens.json", [60, 50, 40])
    windows = json.loads(tokens.read_text())["windows"]
    rare = next(token for token in windows[0] if token not in windows[1] + windows[2])
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][rare] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    # More processes than windows are asked for.
    request = pass_request(base, tmp_path / "work", {}, tokens=tokens, devices=9)
    line = "^layer 0: the input of self_attn.q_proj is not finite, first in calibration sample 0: "
    with pytest.raises(UserError, match=line):
        calibrate.run(request, lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["program, interrupted", "program", "worker"])
def test_a_program_that_ends_leaves_no_process(whom: str, tmp_path: Path, tiny_llama: Path) -> None:
    """A pass of many windows, ended as soon as its processes are there."""
    (tmp_path / "new").mkdir()
    place = Bench(tmp_path / "new" / "home", tmp_path, tiny_llama)
    text = {"text": "The quick brown fox jumps over the lazy dog. " * 3000}
    calibration = {"source": text, "window": 512, "windows": 200, "devices": 3}
    child = place.start("quantize", place.recipe(variants=[{"awq": {"group_size": 32}}], calibration=calibration))
    try:
        place.wait_for(lambda: len(helpers_of(psutil.Process(child.pid))) == 2, child)
        if whom == "worker":
            helpers_of(psutil.Process(child.pid))[0].parent().kill()  # type: ignore[union-attr]
        else:
            os.kill(child.pid, signal.SIGINT if "interrupted" in whom else signal.SIGKILL)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == {"program, interrupted": 130, "program": -signal.SIGKILL, "worker": 1}[whom], said
    assert "Traceback" not in said and ("killed by SIGKILL" in said) == (whom == "worker")
    limit = time.monotonic() + 10
    while place.workers():
        if time.monotonic() > limit:
            raise AssertionError(f"left running: {place.workers()}")
        time.sleep(0.02)
