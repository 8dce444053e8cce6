"""MLX on small models: transformers' logits, the same greedy tokens whichever way they are asked for, its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.worker.small_models import write_model
from workbench.records import Artifact, Job, Workload
from workbench.worker.backends import mlx
from workbench.worker.scoring import reducer
from workbench.worker.scoring.reducer import Scoring
from workbench.worker.tokens.file import TokenFile

torch = pytest.importorskip("torch")
pytest.importorskip("mlx_lm")
pytestmark = pytest.mark.slow

IDS = [7 * i % 350 for i in range(24)]


def engine(path: Path, **more: Any) -> mlx.Engine:
    artifact = Artifact("base", "base", "safetensors", str(path), "", 1, 1)
    load = Workload(prompt_tokens=[8], new_tokens=4)
    return mlx.Engine(Job("m", artifact, "mlx", {}, load, **more))


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


def by_transformers(path: Path, ids: list[int]) -> Any:
    import transformers

    with torch.inference_mode():
        found = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        return found(input_ids=torch.tensor([ids])).logits[0]


def test_its_logits_are_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class Keeper:
        def __init__(self, asked: Scoring) -> None:
            """In the place of the reducer."""

        def __call__(self, window: int, first: int, logits: Any) -> None:
            given.append((first, logits))

        def result(self) -> dict[str, object]:
            return {}

    monkeypatch.setattr(reducer, "Reducer", Keeper)
    engine(model).score(Scoring(TokenFile([IDS], [3])), lambda _: None)
    ((first, logits),) = given
    assert first == 3 and logits.shape == (len(IDS) - 3, 354)
    assert torch.allclose(logits, by_transformers(model, IDS)[3:], atol=1e-4)


def test_the_same_tokens_in_every_way(model: Path) -> None:
    """One prompt, two together and several after each other; and those that transformers finds likeliest."""
    here, prompts, wanted = engine(model), [IDS[:8], IDS[8:16]], []
    for ids in prompts:
        for _ in range(4):
            ids = [*ids, int(by_transformers(model, ids)[-1].argmax())]
        wanted.append(ids[8:])
    assert here.complete(prompts, [4, 4], []) == wanted
    assert here.complete(prompts[:1], [4], [wanted[0][2]]) == [wanted[0][: wanted[0].index(wanted[0][2])]]
    cache, inputs = here._fed(prompts)
    found = []
    for _ in range(4):
        inputs = here._next(inputs, cache)
        found.append(inputs.tolist())
    assert [[step[i][0] for step in found] for i in range(2)] == wanted
    assert list(here.generate(prompts, 3)) == [[1, 1]] * 3
    assert list(here.serve([*prompts, IDS[16:]], [1, 3, 2], 2)) == [2, 1, 1, 1, 1]


def test_its_memory_and_what_it_runs_with(model: Path) -> None:
    here = engine(model)
    list(here.generate([IDS[:8]], 4))
    held = here.memory()
    # Of 256 tokens, by which the cache grows: keys and values of 2 layers, 2 heads of 16, in float32.
    assert held["kv_cache"] == 256 * 2 * 2 * 2 * 16 * 4
    tied = "tied" in str(model)
    assert held["embedding"] == (0 if tied else 354 * 64 * 4) < held["weights"] and held["workspace"] >= 0
    assert here.settings() == {"device": "cpu", "dtype": "float32", "scored_logits": "float32", "warnings": []}


def test_a_sliding_window_that_it_leaves_out_is_said(model: Path) -> None:
    (told,) = engine(model, sliding_window=10).settings()["warnings"]  # type: ignore[misc]
    assert "leaves out the sliding window of 10 tokens" in told
    assert engine(model, sliding_window=512).settings()["warnings"] == []
