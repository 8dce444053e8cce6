"""What transformers quantizes as it loads the base: near the base, as small as planned, refused where it is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench import Bench
from tests.rows import a_row
from workbench.errors import UserError
from workbench.hub.push import push
from workbench.plan.tensors import shape_of
from workbench.recipe.load import parse
from workbench.records import Artifact, Job, Workload
from workbench.worker.backends import transformers as backend
from workbench.worker.base.headers import read
from workbench.worker.methods import bitsandbytes, method_named, torchao
from workbench.worker.methods.loading import ON_LOAD

torch = pytest.importorskip("torch")

CASES: list[tuple[str, dict[str, Any], float]] = [
    ("bitsandbytes", {"type": "nf4"}, 0.05),
    ("bitsandbytes", {"type": "fp4"}, 0.1),
    ("bitsandbytes", {"type": "int8"}, 1e-2),
    ("torchao", {"type": "int8"}, 1e-3),
    ("torchao", {"type": "int4", "group_size": 32}, 0.05),
]


@pytest.mark.parametrize(("word", "options", "most"), CASES)
def test_a_base_that_is_quantized_as_it_loads(
    word: str, options: dict[str, Any], most: float, tiny_llama: Path
) -> None:
    pytest.importorskip(word)
    from transformers import AutoModelForCausalLM

    artifact = Artifact("v", word, word, str(tiny_llama), "", 1, 1, provenance={"options": options})
    engine: Any = backend.Engine(Job("b", artifact, "transformers", {"device": "cpu", "threads": 1}, Workload()))
    ids = torch.tensor([[7 * i % 300 + 3 for i in range(24)]])
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)(ids).logits.log_softmax(-1)
        found = engine._model(ids).logits.float().log_softmax(-1)
    divergence = float((base.exp() * (base - found)).sum(-1).mean())
    assert 1e-7 < divergence < most
    method = method_named(word)
    shape = shape_of(read({"source": {"path": str(tiny_llama)}}, lambda *_: None), "here")
    planned = method.sizes(shape, method.Options(**options), word).disk_bytes
    # Rotations' frequencies beside it; bitsandbytes halves its scales for processors with bfloat16.
    assert 0.98 * planned < engine.memory()["weights"] < planned + 200
    settings = engine.settings()
    assert settings["dtype"] == "bfloat16" and f"quantized by {word} as the base is loaded" in settings["warnings"][0]


def test_names_and_refusals() -> None:
    entries = [{"bitsandbytes": {"type": ["nf4", "int8"]}}, {"torchao": "int8"}, {"torchao": {"type": "int4"}}]
    recipe = parse({"base": {"path": "base"}, "variants": entries}, Path("r.yaml"))
    names = [each.name for each in recipe.variants[1:]]
    assert names == ["bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8", "torchao-int4-g128"]
    for entry in ({"bitsandbytes": "nf5"}, {"torchao": {"type": "int8", "group_size": 32}}):
        with pytest.raises(Exception, match="nf4|leave `group_size` out"):
            parse({"base": {"path": "base"}, "variants": [entry]}, Path("r.yaml"))


def test_nothing_of_it_is_copied_uploaded_or_served(tmp_path: Path, bench: Bench) -> None:
    """It is the base's own files: a copy of them, or a server of them, would be another model under its name."""
    pytest.importorskip("torchao")
    answer = bench("quantize", bench.recipe(variants=[{"torchao": "int8"}]), "-o", str(tmp_path / "copies"))
    assert answer.returncode == 0, answer.stderr
    assert "torchao-int8" in answer.stdout and not (tmp_path / "copies").exists()
    artifact = replace(a_row().artifact, variant="torchao-int8", format="torchao", provenance={"loaded": True})
    row = replace(a_row(), artifact=artifact)
    assert backend.serving_command("base", row) is None
    with pytest.raises(UserError, match="not pushed: torchao-int8 is the base's own files"):
        push([row], row, "owner/name")


def test_bytes_by_hand(tiny_llama: Path) -> None:
    """14 matrices of 2 layers: 64 channels, keys of 32, 128 inside; embedding, head and norms in 16 bits."""
    shape = shape_of(read({"source": {"path": str(tiny_llama)}}, lambda *_: None), "here")
    inside, rows = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64), 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    rest = 2 * (2 * 354 * 64 + 5 * 64)

    def sizes(method: Any, **options: Any) -> Any:
        return method.sizes(shape, method.Options(**options), "")

    assert sizes(bitsandbytes, type="nf4").disk_bytes == rest + inside // 2 + inside // 64 * 4
    assert sizes(bitsandbytes, type="int8").disk_bytes == rest + inside + 4 * rows
    assert sizes(torchao, type="int8").disk_bytes == rest + inside + 5 * rows
    assert sizes(torchao, type="int4", group_size=32).disk_bytes == rest + inside + inside // 32 * 3
    assert sizes(torchao, type="int4").refused.startswith("group_size 128 does not divide the 64 inputs of blk.0.")


@pytest.mark.slow
def test_in_the_table(bench: Bench) -> None:
    """A row each where the package is, one line about what to install where it is not; other engines say why not."""
    text = {"text": "The quick brown fox jumps over the lazy dog, and runs. " * 60}
    asked = bench.recipe(
        variants=[{"bitsandbytes": "int8"}, {"torchao": "int8"}],
        evaluation={"source": text, "windows": 2, "window": 32},
        backends={"transformers": {}, "llamacpp": {}},
    )
    answer = bench("run", asked, "--format", "json")
    rows = {(row["artifact"]["variant"], row["backend"]): row for row in bench.rows()}
    for word in ON_LOAD:
        row = rows[f"{word}-int8", "transformers"]
        if importlib.util.find_spec(word):
            assert (
                row["measurement"]["memory"]["weights"]
                < rows["base", "transformers"]["measurement"]["memory"]["weights"] / 2
            )
        else:
            assert row["error"].endswith(f"is not installed here. Install it with: pip install {word}")
            assert answer.returncode == 1
    assert "reads GGUF files only" in rows["torchao-int8", "llamacpp"]["unsupported"]
    lines = {(line["variant"], line["backend"]): line for line in json.loads(answer.stdout)}
    assert lines["torchao-int8", "transformers"]["kld_mean"] < 0.05, sys.version
