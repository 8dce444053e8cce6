"""The language model of a multimodal checkpoint: it computes what the whole one does of text, and is a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.worker.base.bases import logits, refusal, run
from tests.worker.wrappers import WRAPPERS, write_whole
from workbench.plan.tensors import shape_of
from workbench.worker.base import headers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", WRAPPERS)
def test_it_computes_what_the_whole_one_does_of_text(kind: str, tmp_path: Path) -> None:
    whole = write_whole(tmp_path / "whole", kind)
    made = run({"path": str(tmp_path / "whole")}, tmp_path / "o")
    assert made["architecture"] == WRAPPERS[kind][1] and made["vocab_size"] == 160
    assert made["warnings"][0].startswith(
        f"of a {type(whole).__name__} its text model alone, a {made['architecture']}: "
    )
    with torch.no_grad():
        expected = whole(input_ids=torch.arange(3, 99)[None]).logits[0].double()
    torch.testing.assert_close(logits(made["path"]), expected, rtol=1e-5, atol=1e-5)
    planned = headers.read({"source": {"path": str(tmp_path / "whole")}}, lambda *_: None)
    assert shape_of(planned, "here").parameters == made["parameters"]


def test_sizes_that_are_its_classs_defaults(tmp_path: Path) -> None:
    """As Gemma 3's on the hub: its configuration does not even say how large the vocabulary is."""
    write_whole(tmp_path / "whole", "llava")
    file = tmp_path / "whole" / "config.json"
    config = json.loads(file.read_text())
    del config["text_config"]["rms_norm_eps"], config["text_config"]["hidden_act"]
    file.write_text(json.dumps(config))
    assert run({"path": str(tmp_path / "whole")}, tmp_path / "o")["architecture"] == "LlamaForCausalLM"
    del config["text_config"]["vocab_size"]
    file.write_text(json.dumps(config))
    said = refusal({"path": str(tmp_path / "whole")}, tmp_path / "p")
    assert "have another shape than config.json says" in said, "32,000 is the class's"


def test_a_wrapper_without_a_text_part(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_whole(tmp_path / "whole", "llava")
    file = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if "language_model" not in k}, file, metadata={"format": "pt"})
    said = refusal({"path": str(tmp_path / "whole")}, tmp_path / "o")
    assert "none of its tensors is named as a language model's" in said
    cut = {k: t for k, t in tensors.items() if "layers.1.mlp" not in k}
    save_file(cut, file, metadata={"format": "pt"})
    assert "3 tensors of the LlamaForCausalLM" in refusal({"path": str(tmp_path / "whole")}, tmp_path / "p")
