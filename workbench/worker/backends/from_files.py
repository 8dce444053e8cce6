"""How transformers itself loads an artifact: in which dtype, by which quantizer, whole, laid out before it is timed.

Whatever its class has and the files have not, or in another shape, transformers fills with random numbers and goes on;
it reports so, which is read here and refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.records import Artifact
from workbench.worker.base.checkpoint import is_multimodal, read_json
from workbench.worker.base.gguf_config import load_gguf
from workbench.worker.methods import method_named
from workbench.worker.methods.loading import ON_LOAD

PACKED = ("awq", "gptq")
SIXTEEN_BITS = (*PACKED, *ON_LOAD)
"""Formats that are computed in bfloat16 on a CPU: their kernels there take no float32, or cast it."""
SHOWN = 3
"""Names of tensors in a message."""
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 32 << 20
"""glibc's name for what is mapped apart, and where its own adjustment ends (mallopt(3))."""


def load(artifact: Artifact, device: str, dtype: str, attention: str | None, remote_code: bool) -> Any:
    """The model in eval mode. `dtype`: `auto` for the checkpoint's own on a GPU, and on a CPU what its kernels take."""
    import torch

    path, form = Path(artifact.path), artifact.format
    if dtype == "auto" and device == "cpu":
        dtype = "bfloat16" if form in SIXTEEN_BITS else "float32"
    arguments: dict[str, object] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": attention,
        "trust_remote_code": remote_code,
        "local_files_only": True,
        **({"device_map": "cuda"} if device == "cuda" else {}),
    }
    if form == "awq":
        _keep_bfloat16()
    if form in ON_LOAD:
        method: Any = method_named(artifact.method)
        arguments["quantization_config"] = method.quantization_config(method.Options(**artifact.provenance["options"]))
    if form == "gguf":
        # Not by its own reader alone: that leaves keys and tensors out without a word.
        return load_gguf(path, arguments).eval()
    arguments |= {"use_safetensors": True, "output_loading_info": True}
    loaded: Any = _class_for(path, remote_code).from_pretrained(str(path), **arguments)
    model, report = loaded
    check_report(report, f"{path}: transformers' {type(model).__name__}")
    if dtype != "auto" and form in PACKED:
        # What it renames of a packed checkpoint (a multimodal model's tensors) stays in the file's dtype.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(getattr(torch, dtype))
    model.eval()
    if form in ("compressed-tensors", "bitsandbytes") or (device == "cpu" and form in PACKED):
        _lay_out(model, device)
    return model


def _class_for(path: Path, remote_code: bool) -> Any:
    """The automatic class that makes a folder's model: of most multimodal ones there is none that is of text alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if is_multimodal(read_json(path / "config.json")):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=remote_code, local_files_only=True)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            return AutoModelForImageTextToText
    return AutoModelForCausalLM


def check_report(report: Mapping[str, Any], who: str) -> None:
    """Refuse a model with weights that are not the files'; `report`: transformers' `loading_info`."""
    lost = {*map(str, report["missing_keys"]), *(str(each[0]) for each in report["mismatched_keys"])}
    if lost:
        unused = sorted(map(str, report["unexpected_keys"]))
        more = f", and has no place for {len(unused)} that are there ({unused[0]})" if unused else ""
        raise UserError(
            f"{who} finds {len(lost)} of its weights not in the files, and would draw them at random: "
            f"{', '.join(sorted(lost)[:SHOWN])}{more}. Measure it in another engine"
        )


def _keep_bfloat16() -> None:
    """Where a GPU is in sight transformers casts AWQ to float16, whose range Gemma's activations leave. GPTQModel's
    kernels, which it chooses itself, compute in both."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizer_awq import AwqQuantizer

    setattr(AwqQuantizer, "update_dtype", HfQuantizer.update_dtype)  # noqa: B010 (mypy's rule against the other way)


def _lay_out(model: Any, device: str) -> None:
    """Have GPTQModel and bitsandbytes lay out every layer for their kernels now, and compressed-tensors be
    de-quantized, as part of loading.

    All do so in the first forward, and what GPTQModel unpacks there lies between what stays, so that the C library's
    heap cannot shrink again: three to six bytes a weight, for good. Blocks from mappings of their own are given back.
    """
    import ctypes

    import torch

    libc = ctypes.CDLL(None)
    tuned = hasattr(libc, "mallopt") and libc.mallopt(M_MMAP_THRESHOLD, 1 << 18)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2]], device=device), use_cache=False)
    if tuned:
        libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
