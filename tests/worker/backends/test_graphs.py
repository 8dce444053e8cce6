"""The decoding step as a graph, against decoding launched by Python, on a CPU.

A stand-in for CUDA's graph records the operations of a step on the tensors they were given and replays those, without
Python; and refuses, as CUDA does, what would wait for the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import MODELS, write_model
from workbench.records import Artifact, Job, Workload
from workbench.worker.backends import graphs
from workbench.worker.backends import transformers as backend

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

PROMPTS = [[5, 6, 7, 8, 9], [300, 20, 10, 4, 3]]
NEW = 8


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.item.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(step: graphs.Step, rewind: graphs.Step) -> graphs.Step:
    rewind()
    with Recorder() as recorder:
        step()
    return recorder.replay


def a_model(folder: Path, kind: str, **sizes: Any) -> Any:
    path = write_model(folder / kind, kind, **sizes)
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def launched(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Tokens by a cache that grows, [new][batch]."""
    cache, chosen = transformers.DynamicCache(config=model.config), []
    inputs = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        for _ in range(new):
            said = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            inputs = said.logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(inputs[:, 0].tolist())
    return chosen


def replayed(steps: graphs.Steps, prompts: list[list[int]], new: int) -> list[list[int]]:
    chosen = []
    with torch.inference_mode():
        steps.prefill(torch.tensor(prompts, device=steps.token.device))
        for step in range(new):
            if step:
                steps.step()
            chosen.append(steps.token[:, 0].tolist())
    return chosen


@pytest.mark.parametrize("kind", MODELS)
def test_a_replayed_step_decodes_what_a_launched_one_does(tmp_path: Path, kind: str) -> None:
    model = a_model(tmp_path, kind)
    steps = graphs.Steps(model, 2, len(PROMPTS[0]) + NEW - 1, recorded)
    expected = launched(model, PROMPTS, NEW)
    assert len({tuple(each) for each in expected}) > 2, "a model that says one thing shows nothing"
    # The second time over what the first left behind; then a shorter prompt, as a warm-up's is.
    for prompts in (PROMPTS, [ids[::-1] for ids in PROMPTS], [ids[:2] for ids in PROMPTS]):
        assert replayed(steps, prompts, NEW) == launched(model, prompts, NEW)
    assert steps.fits(2, 12) and steps.fits(2, 3) and not steps.fits(2, 13) and not steps.fits(1, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODELS)
def test_a_captured_step_decodes_what_a_launched_one_does(tmp_path: Path, kind: str) -> None:
    model = a_model(tmp_path, kind).cuda()
    steps = graphs.Steps(model, 2, len(PROMPTS[0]) + NEW - 1)
    for prompts in (PROMPTS, [ids[::-1] for ids in PROMPTS]):
        assert replayed(steps, prompts, NEW) == launched(model, prompts, NEW)


def test_a_window_shorter_than_the_text_is_left_to_python(tmp_path: Path) -> None:
    """Its count is Python's, and a graph holds still what it was."""
    model = a_model(tmp_path, "gemma3_text")
    assert graphs.Steps(model, 2, 16, recorded).size == (2, 16)
    with pytest.raises(ValueError, match="attends to fewer than 17 tokens in some layers"):
        graphs.Steps(model, 2, 17, recorded)


def test_a_graph_that_computes_something_else_is_not_believed(tmp_path: Path) -> None:
    """Here one whose place in the cache stands still."""

    def stuck(step: graphs.Step, rewind: graphs.Step) -> graphs.Step:
        return lambda: (rewind(), step())[1]

    with pytest.raises(ValueError, match="replayed, its step computes something else"):
        graphs.Steps(a_model(tmp_path, "llama"), 1, 8, stuck)


def test_a_step_that_waits_for_the_gpu_cannot_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(tmp_path, "llama")
    forward = type(model).forward

    def waits(self: Any, input_ids: Any, **named: Any) -> Any:
        assert int(input_ids.max()) >= 0
        return forward(self, input_ids=input_ids, **named)

    monkeypatch.setattr(type(model), "forward", waits)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        graphs.Steps(model, 1, 8, recorded)


def told(engine: backend.Engine) -> object:
    """What a row measured on a GPU says of decoding."""
    engine._device = "cuda"
    said = engine.settings()["decoding"]
    engine._device = "cpu"
    return said


def test_the_engine_replays_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU in the place of the GPU: `prepare`, the timed steps, and the bytes of the first point's cache."""
    path = write_model(tmp_path / "llama", "llama")
    artifact = Artifact(
        variant="v", method="base", format="safetensors", path=str(path), digest="", disk_bytes=1, parameters=1
    )
    load = Workload(prompt_tokens=[5], new_tokens=NEW, batches=[2])
    engine = backend.Engine(Job("b", artifact, "transformers", {"device": "cpu", "threads": 1}, load))
    assert list(engine.generate(PROMPTS, NEW)) == [[1, 1]] * NEW
    grown = engine.memory()["kv_cache"]
    monkeypatch.setattr(graphs, "_captured", recorded)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    engine.prepare(2, 12)
    assert engine._steps is None and "decoding" not in engine.settings(), "a CPU launches its steps"
    engine._device = "cuda"
    engine.prepare(2, 12)
    engine._device = "cpu"
    assert told(engine) == "CUDA graph over a static cache"
    count = []
    monkeypatch.setattr(engine._steps, "step", lambda step=engine._steps.step: (count.append(1), step()))
    assert list(engine.generate(PROMPTS, NEW)) == [[1, 1]] * NEW and len(count) == NEW - 1
    assert engine.memory()["kv_cache"] == grown == 2 * 2 * 2 * 2 * 12 * 16 * 4
    assert list(engine.generate(PROMPTS[:1], 3)) == [[1]] * 3 and len(count) == NEW - 1, "another batch is launched"
    monkeypatch.setattr(graphs, "_fixed_cache", lambda *_: (_ for _ in ()).throw(ValueError("why not")))
    engine._device = "cuda"
    engine.prepare(2, 20)
    assert engine._steps is None and told(engine) == "launched by Python: why not"
