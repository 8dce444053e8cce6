"""llama.cpp's model of a GGUF file, ready for a job: with the rope factors that its windows want."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

from workbench.records import Job
from workbench.worker.scoring import longrope

CONTEXT_STEP = 256
"""A sequence's context is rounded up to this."""
ENDLESS = 1 << 30
"""Tokens that no context has."""


def context_of(tokens: int) -> int:
    """The context that llama.cpp makes of a sequence of so many tokens."""
    return -(-tokens // CONTEXT_STEP) * CONTEXT_STEP


def load(api: Any, job: Job, params: Any, heard: list[str]) -> tuple[Any, int]:
    """The model that a job's artifact is, and its original context (`scoring/longrope.py`).

    `params`: llama.cpp's own; `heard`: what it says of the model that is returned. Raises `RuntimeError` with that.
    """
    model = _load(api, job, params, heard)
    key, original = longrope.original_of_header(partial(_entry, api, model))
    if longrope.takes_short(job, original):
        # By its context, rounded up, it would take the long ones; it does not where the original one has no end.
        api.llama_model_free(model)
        heard.clear()
        overrides = (api.llama_model_kv_override * 2)()  # The last one, empty, ends them.
        overrides[0].tag, overrides[0].key = api.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
        overrides[0].value.val_i64 = ENDLESS
        params.kv_overrides = overrides
        model = _load(api, job, params, heard)
    return model, original


def warnings(api: Any, model: Any, job: Job, original: int) -> list[str]:
    """What llama.cpp leaves out of a job's model, or runs otherwise than it is."""
    found = longrope.warnings(job, original)
    if 0 < job.sliding_window < job.longest_window and not api.llama_model_n_swa(model):
        found.append(
            f"llama.cpp leaves out the sliding window of {job.sliding_window:,} tokens that this model has: windows of "
            f"{job.longest_window:,} are another model's here"
        )
    return found


def _load(api: Any, job: Job, params: Any, heard: list[str]) -> Any:
    model = api.llama_model_load_from_file(job.artifact.path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp could not load {job.artifact.path}{last_words(heard)}")
    return model


def last_words(heard: list[str]) -> str:
    """What llama.cpp said of a failure."""
    words = [line for line in heard if "error" in line.lower() or "fail" in line.lower()]
    return f": {words[0]}" if words else ""


def _entry(api: Any, model: Any, key: str) -> str:
    """An entry of the file's metadata; empty where there is none."""
    text = ctypes.create_string_buffer(128)
    found = api.llama_model_meta_val_str(model, key.encode(), text, len(text))
    return text.value.decode(errors="replace") if found >= 0 else ""
