"""What a child process runs for `test_architectures.py`: whole logits of small models, by the program's own backends.

One process for all models of an engine, one after another: to start vLLM takes longer than all of them together.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

TOKENS_LIMIT = 128


def collect(payload: dict[str, Any], progress: Any) -> dict[str, str]:
    """Logits of every position but the last, [tokens - 1, vocabulary] float32, into one safetensors file.

    Payload: `backend`, `models` (name -> `path`, `format`, `options` of the backend), `ids`, `out`. Returns the
    traceback's last line for each model that could not be loaded or run. The file's metadata names each one's kernel.
    """
    import gc
    import importlib

    from safetensors.torch import save_file

    from workbench.worker.backends import BACKENDS
    from workbench.worker.scoring import reducer as quality
    from workbench.worker.scoring.reducer import Scoring
    from workbench.worker.tokens.file import TokenFile

    quality.Reducer = Keeper  # type: ignore[misc,assignment]
    module = importlib.import_module(BACKENDS[payload["backend"]])
    module.load_engine()
    found, kernels, failures = {}, {}, {}
    for number, (name, model) in enumerate(payload["models"].items()):
        progress(number, len(payload["models"]), name)
        try:
            engine = module.Engine(_job(payload["backend"], model))
            engine.score(Scoring(TokenFile([payload["ids"]], [0])), lambda _: None)
            found[name] = Keeper.rows(len(payload["ids"]) - 1)
            kernels[name] = str(engine.settings().get("kernel"))
            del engine
            # vLLM collects garbage several times a start, each time through all that was ever imported.
            gc.freeze()
        except Exception as error:
            traceback.print_exc()
            failures[name] = f"{type(error).__name__}: {error}"
    save_file(found, payload["out"], kernels)
    return failures


class Keeper:
    """In the place of `quality.Reducer`: keeps what it is given."""

    pieces: dict[int, Any] = {}

    def __init__(self, spec: dict[str, Any]) -> None:
        Keeper.pieces = {}

    def __call__(self, window: int, first_position: int, logits: Any) -> None:
        Keeper.pieces[first_position] = logits.float().cpu().clone()

    def result(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def rows(count: int) -> Any:
        import torch

        return torch.cat([Keeper.pieces[at] for at in sorted(Keeper.pieces)])[:count].contiguous()


def _job(backend: str, model: dict[str, Any]) -> Any:
    from workbench.records import Artifact, Evaluation, Job, Workload

    artifact = Artifact(
        variant="x", method="x", format=model["format"], path=model["path"], digest="", disk_bytes=0, parameters=0
    )
    test = Evaluation("x", "", "", window=TOKENS_LIMIT, score="all", windows=1, scored_tokens=TOKENS_LIMIT)
    load = Workload(prompt_tokens=[TOKENS_LIMIT // 2], new_tokens=1, repeats=0)
    return Job("x", artifact, backend, model.get("options", {}), load, {"x": test})


def convert_and_quantize(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """GGUF forms of several bases by the program's own workers: an exact one, then each type from it.

    Payload: `models` (name -> `base`, `imatrix` or null), `types`, `folder`. Returns name -> type -> path, or
    `refused` -> why there is none.
    """
    from workbench.worker.methods import gguf

    made: dict[str, Any] = {}
    for number, (name, model) in enumerate(payload["models"].items()):
        # A number for a name: llama.cpp looks for the special tokens of Phi-3 in what is called so.
        exact = Path(payload["folder"]) / f"small-{number}-F32.gguf"
        order = {"base": model["base"], "out": str(exact), "dtype": "float32", "name": str(number)}
        try:
            gguf.convert(order, progress)
        except Exception as error:
            traceback.print_exc()
            made[name] = {"refused": f"{type(error).__name__}: {error}"}
            continue
        made[name] = {"F32": str(exact)}
        for kind in payload["types"]:
            out = exact.with_name(f"small-{number}-{kind}.gguf")
            order = {"source": str(exact), "out": str(out), "type": kind, "imatrix": model["imatrix"], "threads": 2}
            gguf.quantize(order, progress)
            made[name][kind] = str(out)
    return made


def llama_logits(payload: Any, progress: Any) -> dict[str, Any]:
    """What llama.cpp makes of a GGUF file: the logits after the last of `payload["ids"]`."""
    import ctypes

    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(payload["path"].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError("llama.cpp could not load it")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 2, 2
    context = llama_cpp.llama_init_from_model(model, params)
    ids = (llama_cpp.llama_token * len(payload["ids"]))(*payload["ids"])
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(ids)))
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * size)).contents
    return {"status": status, "logits": [value if abs(value) < 1e30 else None for value in logits[:1000]], "size": size}
