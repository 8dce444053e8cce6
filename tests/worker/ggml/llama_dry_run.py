"""Asks llama.cpp's own quantizer what type it would give each tensor of a shape. Run in a process of its own.

    python llama_dry_run.py request.json reply.json

Request: `architecture`, `tensors` (name -> shape, rows first), `fields` (its GGUF metadata), `mixtures`. Reply: a
list, without and with an importance matrix, of mixture -> name -> type. The weights are zeros, and none is quantized.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any


def main(request: Path, reply: Path) -> None:
    import gguf
    import llama_cpp
    import numpy as np

    from workbench.worker.ggml.imatrix import as_quantize_pointer

    asked = json.loads(request.read_text())
    source = request.with_suffix(".gguf")
    writer = gguf.GGUFWriter(source, asked["architecture"])
    for key, value in asked["fields"].items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{asked['architecture']}.{key}", value)
    for name, shape in asked["tensors"].items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    types: dict[str, str] = {}
    name = ""

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, user: object) -> None:
        nonlocal name
        line = text.decode(errors="replace")
        named = re.search(r"\[\s*\d+/\s*\d+\]\s+(\S+)\s", line)
        if named:
            name = named[1]
        became = re.search(r"-> .*\((\w+)\)", line)
        if became:
            types[name] = became[1].upper()
        elif "size =" in line:
            types[name] = "UNCHANGED"

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    keep: Any = None
    found: list[dict[str, dict[str, str]]] = [{}, {}]
    for imatrix, mixture in itertools.product((False, True), asked["mixtures"]):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mixture}")
        params.dry_run = True
        if imatrix:
            keep = as_quantize_pointer({"none": [1.0]})
            params.imatrix = keep.pointer
        types.clear()
        status = llama_cpp.llama_model_quantize(str(source).encode(), b"", ctypes.byref(params))
        assert status == 0, mixture
        found[imatrix][mixture] = dict(types)
    del keep
    reply.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
