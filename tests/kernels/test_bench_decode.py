"""`kernels/bench_decode.py`, as far as a machine without a GPU runs it: a token at a time in a static cache."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tests.places import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SHAPE: dict[str, float] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@pytest.fixture
def bench_decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "kernels"), *sys.path])
    import bench_decode

    return bench_decode


def test_every_repeat_decodes_after_the_same_prompt_and_fits_the_cache(
    bench_decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache counts on by itself: unless it is taken back, the second repeat writes behind its end."""
    torch.manual_seed(0)
    model = bench_decode.build("fp16", SHAPE, "cpu").float()
    tokens, seen = 6, []
    step, rewind = bench_decode.stepper(model, tokens, prompt=8)
    model.register_forward_hook(lambda *given: seen.append(given[-1].logits.clone()))
    for _ in range(3):
        rewind()
        for _ in range(tokens):
            step()
    first, *others = (torch.cat(seen[i * tokens : (i + 1) * tokens]) for i in range(3))
    assert first.shape[0] == tokens and not torch.equal(first[0], first[1])
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("layout", ["Q4_K", "awq-4", "gptq-4"])
def test_packed_layers_decode(bench_decode: Any, layout: str) -> None:
    step, rewind = bench_decode.stepper(bench_decode.build(layout, SHAPE, "cpu"), 3, prompt=4)
    rewind()
    for _ in range(3):
        step()
