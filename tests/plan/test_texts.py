"""What a plan says of a recipe's texts, tasks, threads and base, before anything is made."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.command import command
from tests.places import ROOT
from workbench.machine.identity import has_cuda

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "float16",
}
CUDA = ("--memory", "24GiB", "--device", "cuda")


class Planner:
    """`workbench plan` of recipes in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, *words: str, env: dict[str, str] | None = None, **parts: Any) -> tuple[int, str, str]:
        whole = {
            "base": {"config": CONFIG, "init": "random", "tokenizer": "a/b"},
            "variants": [{"gguf": "Q4_K_M"}],
            **parts,
        }
        (self.folder / "r.yaml").write_text(yaml.safe_dump(whole))
        own = {"WORKBENCH_HOME": str(self.folder / "home"), "HF_HOME": str(self.folder / "hf"), "COLUMNS": "200"}
        answer = command("plan", str(self.folder / "r.yaml"), *words, environment={**os.environ, **own, **(env or {})})
        return answer.returncode, answer.stdout, answer.stderr


@pytest.fixture
def plan(tmp_path: Path) -> Planner:
    return Planner(tmp_path)


def text(**more: Any) -> dict[str, Any]:
    return {"source": {"file": "mine.txt"}, "window": 64, "windows": 2, **more}


def test_a_text_that_is_not_there_is_refused_by_the_plan_too(plan: Planner) -> None:
    code, _, said = plan(evaluation=text())
    assert code == 2 and f"text file {plan.folder}/mine.txt does not exist" in said


@pytest.mark.parametrize(
    ("part", "more", "need"),
    [("evaluation", {}, 128), ("evaluation", {"score": "strided", "stride": 16}, 80), ("calibration", {}, 128)],
)
def test_a_text_with_fewer_bytes_than_tokens_asked_for(plan: Planner, part: str, more: Any, need: int) -> None:
    (plan.folder / "mine.txt").write_text("x" * (need - 2))
    code, _, said = plan(**{part: text(**more)})
    assert code == 2
    assert f"mine.txt' has {need - 2} bytes, and 2 windows of 64 take {need} tokens: ask for fewer" in said
    (plan.folder / "mine.txt").write_text("x" * need)
    assert plan(*CUDA, **{part: text(**more)})[0] == 0


def test_tokens_are_counted_where_the_tokenizer_is_at_hand(plan: Planner, tiny_llama: Path) -> None:
    shutil.copytree(tiny_llama, plan.folder / "Model")
    by_word = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    by_word.save(str(plan.folder / "Model" / "tokenizer.json"))
    (plan.folder / "mine.txt").write_text("word " * 100)

    def asked(windows: int, **more: Any) -> tuple[int, str, str]:
        load, evaluation = {"prompt_tokens": 8, "new_tokens": 4}, text(window=16, windows=windows)
        return plan(*CUDA, base={"path": "Model"}, evaluation=evaluation, workload=load, **more)

    assert asked(6)[0] == 0
    code, _, said = asked(7)
    assert code == 2 and "mine.txt' has 100 tokens, and 7 windows of 16 take 112 tokens: ask for fewer" in said
    code, _, said = asked(6, calibration=text(window=8, windows=2))
    assert code == 2 and "2 windows of 8 take 16 tokens beside the evaluation's 96: ask for fewer" in said


def test_without_a_tokenizer_a_run_cuts_no_windows_and_a_plan_asks_for_none(plan: Planner) -> None:
    assert plan(*CUDA, base={"config": CONFIG, "init": "random"}, evaluation=text())[0] == 0


def test_a_tasks_file_is_read_by_the_plan_too(plan: Planner) -> None:
    (plan.folder / "t.yaml").write_text("- {prompt: hello, exat: there}\n")
    code, _, said = plan(tasks={"mine": {"file": "t.yaml"}})
    assert code == 2 and "t.yaml: entry 1: unknown key 'exat'. Did you mean 'exact'?" in said


def test_what_was_not_looked_at_is_said(plan: Planner) -> None:
    code, told, _ = plan(*CUDA, evaluation=text(source={"dataset": "owner/name"}))
    assert code == 0 and "note: dataset 'owner/name' was not looked at\n" in told


def test_more_threads_than_processors_are_told(plan: Planner) -> None:
    _, told, _ = plan(*CUDA, backends={"llamacpp": {"threads": 1024}})
    assert "note: llamacpp: 1024 threads, and the program may use " in told
    assert "threads" not in plan(*CUDA, backends={"llamacpp": {"threads": 1}})[1]


@pytest.mark.skipif(has_cuda(), reason="a GPU is here")
def test_memory_without_a_device_is_the_processors_where_there_is_no_gpu(plan: Planner) -> None:
    said = "note: on the processor, since there is no GPU here; --device cuda plans for one\n"
    assert said in plan("--memory", "24GiB")[1]
    assert said not in plan()[1] and said not in plan(*CUDA)[1]


def test_a_configuration_alone_is_planned_and_said(plan: Planner) -> None:
    (plan.folder / "Model").mkdir()
    (plan.folder / "Model" / "config.json").write_text(json.dumps(CONFIG))
    code, told, _ = plan(*CUDA, base={"path": "Model"}, backends=["llamacpp"])
    assert code == 0 and "Model: 8,030.3 million weights; 24.00 GiB of GPU memory\n" in told
    assert "note: no weights are at hand: their sizes follow from the base's config.json\n" in told
    assert "note" not in plan(*CUDA, backends=["llamacpp"])[1].split("disk for all")[1], "a shape has no others"
    (plan.folder / "Model" / "pytorch_model.bin").write_text("")
    assert "safetensors and GGUF only" in plan(*CUDA, base={"path": "Model"})[2]


def test_the_heading_says_what_it_is_for(plan: Planner) -> None:
    load = {"prompt_tokens": [512, 4096], "new_tokens": 128, "batch": [1, 8]}
    _, told, _ = plan(*CUDA, workload=load, backends=["llamacpp"])
    assert told.splitlines()[1] == (
        "1 sequence of 640 or 4,224 tokens; 8 of 640 tokens; each row is for what needs most"
    )
    told = plan(*CUDA, workload=load | {"batch": [1, 8, 32], "requests": 2}, backends=["llamacpp"])[1]
    assert told.splitlines()[1].startswith("1 sequence of 640, 704 or 4,224 tokens; 8 or 32 of 640 or 704 tokens; each")
    assert plan(*CUDA, "--context", "2048", "--batch", "2")[1].splitlines()[1] == "2 sequences of 2,048 tokens"


def test_the_readmes_example_is_for_the_gpu_asked_for(plan: Planner) -> None:
    (line,) = (each for each in (ROOT / "README.md").read_text().splitlines() if each.startswith("workbench plan "))
    words = line.partition("#")[0].split()[3:]
    code, told, _ = plan(*words)
    assert code == 0 and "24.00 GiB of GPU memory\n" in told


@pytest.fixture
def silent_hub() -> Iterator[tuple[str, list[int]]]:
    """A hub that hangs up on everybody; and how often it was called."""
    calls = list[int]()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    caller, _ = server.accept()
                except OSError:
                    return
                calls.append(1)
                caller.close()

        threading.Thread(target=hang_up, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)


def test_a_hub_that_does_not_answer_is_called_once(plan: Planner, silent_hub: tuple[str, list[int]]) -> None:
    """Its client would try for half a minute, before a blank screen."""
    endpoint, calls = silent_hub
    code, _, said = plan(*CUDA, base={"hub": "owner/name"}, env={"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"})
    assert code == 2 and len(calls) == 1
    first, refused = said.splitlines()
    assert first == "reading what the hub has of owner/name: its configuration and headers"
    assert "is not in the local cache, and the hub cannot be reached (" in refused and "`hf download" in refused
