"""What a variant's checkpoint says of itself, by the rules of those who read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.worker.small_models import pass_request, write_model
from workbench.worker.calibration import run as calibrate

pytest.importorskip("torch")
pytest.importorskip("transformers")

LINEARS = [
    f"model.layers.{index}.{name}"
    for index in range(2)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    + ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (("self_attn",), LINEARS[0:4] + LINEARS[7:11]),
        (("mlp.",), LINEARS[4:7] + LINEARS[11:14]),
        (("k_proj", "up"), [LINEARS[i] for i in (1, 5, 8, 12)]),
        (("layers.1.",), LINEARS[7:14]),
        ((".1.mlp",), LINEARS[11:14]),
        (("model.layers.0.mlp.down_proj",), [LINEARS[6]]),
        # A part of no name, though a regular expression of all.
        ((".*",), []),
    ],
)
def test_parts_of_names_mean_one_thing_to_all_readers(words: tuple[str, ...], left: list[str], tmp_path: Path) -> None:
    """transformers draws weights at random that it takes for packed and are not: it knows beginnings, endings and
    regular expressions; vLLM knows parts of names."""
    from safetensors import safe_open
    from transformers.quantizers.quantizers_utils import should_convert_module

    base = write_model(tmp_path / "base", "llama")
    options = {"group_size": 32, "modules_to_not_convert": words}
    calibrate.run(pass_request(base, tmp_path / "work", {"awq": ("awq", options)}), lambda *_: None)
    with safe_open(tmp_path / "work" / "awq" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert [name for name in LINEARS if f"{name}.weight" in names] == left
    config = json.loads((tmp_path / "work" / "awq" / "config.json").read_text())
    said = config["quantization_config"]["modules_to_not_convert"]
    assert [name for name in LINEARS if not should_convert_module(name, said)] == left
    assert [name for name in LINEARS if any(each in name for each in said or ())] == left
