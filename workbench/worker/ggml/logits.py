"""Logits of a GGUF file as llama.cpp computes them, as exactly as it can: one thing to prove other readers by."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

LOG_WARNING = 3


def logits_of(path: Path, ids: list[int]) -> Any:
    """[ids, vocabulary] float32, on the processor, keys and values in float32; None if llama.cpp cannot load the file.

    Raises `ImportError` without llama-cpp-python.
    """
    import llama_cpp as api
    import numpy as np

    @api.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(level: int, text: bytes, user: object) -> None:
        if level >= LOG_WARNING:
            sys.stderr.write(text.decode(errors="replace"))

    api.llama_backend_init()
    api.llama_log_set(listen, ctypes.c_void_p(0))
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        return None
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids)
    settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
    settings.type_k = settings.type_v = api.GGML_TYPE_F32
    settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.offload_kqv = False
    context = api.llama_init_from_model(model, settings)
    try:
        if not context:
            return None
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = 0
        done = api.llama_decode(context, batch) == 0
        api.llama_batch_free(batch)
        if not done:
            return None
        vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        found = np.ctypeslib.as_array(
            ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float)), shape=(len(ids), vocabulary)
        )
        return found.copy()
    finally:
        if context:
            api.llama_free(context)
        api.llama_model_free(model)
        # What listens is about to go.
        api.llama_log_set(api.llama_log_callback(), ctypes.c_void_p(0))
