"""GGUF files in vLLM, which has read none since 0.24: de-quantized while it loads them, by a model loader of ours.

vLLM gets the configuration that the file itself states and each weight under the name that a checkpoint has it by, so
its own code places them. What it makes of them is compared with llama.cpp's logits of the file.

Rejected: `vllm-gguf-plugin` 0.0.5. Its operations are built for GPUs only, and it leaves rows of Llama's queries and
keys in GGUF's order, which vLLM no longer undoes: perplexity 408 instead of 17.6 (SmolLM2-135M, Q4_K_M, vLLM 0.32).
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.records import Job
from workbench.worker import proof
from workbench.worker.base.checkpoint import read_json
from workbench.worker.base.config_json import text_config
from workbench.worker.base.gguf_config import read_gguf
from workbench.worker.base.gguf_weights import weights_of
from workbench.worker.base.saving import for_both_readers, write_json
from workbench.worker.tokens.file import read_tokens

LOAD_FORMAT = "workbench-gguf"
_read = lru_cache(1)(read_gguf)
"""Once for the configuration and the weights; not held longer, since the file is mapped while it is."""
NOTE = "GGUF de-quantized to {dtype} at load: size in memory and speed are those of {dtype}"


def register() -> None:
    """Make the loader known to vLLM, once in each of its processes."""
    import torch
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    if LOAD_FORMAT in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        return

    @model_loader.register_model_loader(LOAD_FORMAT)
    class Loader(BaseModelLoader):  # type: ignore[misc,unused-ignore]
        """`model_loader_extra_config` names the `file`."""

        def download_model(self, model_config: Any) -> None:
            """It is there."""

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            """Hand over every weight; `UserError` if a parameter got none."""
            path = Path(self.load_config.model_loader_extra_config["file"])
            loaded = model.load_weights(weights_of(path, _read(path)))  # type: ignore[operator]
            _read.cache_clear()
            missing = sorted({name for name, _ in model.named_parameters()} - set(loaded)) if loaded else []
            if missing:
                raise UserError(f"{path}: vLLM's {type(model).__name__} got no {missing[0]} from it")


def write_config(path: Path, folder: Path) -> None:
    """Write the configuration that a GGUF file states as a `config.json`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _read(path).config
    with torch.device("meta"):
        config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
    write_json(folder / "config.json", for_both_readers(config.to_dict() | {"dtype": "float32"}))


def probe(job: Job, folder: Path) -> list[int]:
    """Ids to compare logits on, as many as a window or a prompt may have.

    Text where there is an evaluation: both sides round (vLLM to 16 bits, llama.cpp to 8), and on ids without sense that
    alone was 0.05 nats of SmolLM2-135M.
    """
    count = min(proof.TOKENS, max(job.longest_window, *job.workload.prompt_tokens))
    for evaluation in job.evaluations.values():
        if evaluation.path:
            return read_tokens(evaluation.path).windows[0][:count]
    return proof.ids_over(int(text_config(read_json(folder / "config.json"))["vocab_size"]), count)


def prove(path: Path, ids: list[int], logits: Any) -> str | None:
    """Compare vLLM's `logits` of a file with llama.cpp's, [ids or one less, vocabulary]; or why that cannot be.

    Raises `UserError` if they are of another model.
    """
    from workbench.worker.ggml.logits import logits_of

    try:
        expected = logits_of(path, ids)
    except ImportError:
        expected = None
    if expected is None:
        return (
            f"not proven that {path.name} is the model here that it is in llama.cpp, which cannot load it beside vLLM"
        )
    found = proof.compare(expected[: len(logits)], logits, proof.COARSE_NATS)
    if not found.same:
        raise UserError(f"{path}: vLLM makes another model of it than llama.cpp {found.words}")
    return None
