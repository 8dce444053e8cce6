"""`engine: gptqmodel`: AWQ or GPTQ by GPTQModel, for architectures that the workbench's own pass does not cover.

It calibrates on the same tokens and writes the same formats, but runs its own pass for every variant, wants a GPU
for AWQ, and reports no error a tensor. Its lines are passed on as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench.errors import UserError, cannot_import
from workbench.worker.tokens.file import read_tokens


def gptqmodel(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: one checkpoint by GPTQModel.

    Payload: `base` (directory), `tokens` (JSON file with `windows`), `method` (`awq` or `gptq`), `options`, `out`
    (directory), `allow_remote_code`. Returns `tensor_types`, `tensor_errors` (none), `warnings`. Raises `UserError`
    in GPTQModel's own words where it refuses.
    """
    try:
        from gptqmodel import GPTQModel, QuantizeConfig
    except ImportError as error:
        raise cannot_import("GPTQModel", error, "pip install gptqmodel optimum") from None
    import torch

    options = payload["options"]
    settings: dict[str, Any] = {"bits": options["bits"], "group_size": options["group_size"]}
    if payload["method"] == "awq":
        settings |= {"method": "awq", "format": "gemm", "sym": not options["zero_point"]}
    else:
        settings |= {"sym": options["sym"], "desc_act": options["desc_act"], "damp_percent": options["damping"]}
    windows = read_tokens(payload["tokens"]).windows
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    progress(0, 1, "GPTQModel")
    try:
        model = GPTQModel.load(
            payload["base"], QuantizeConfig(**settings), trust_remote_code=payload["allow_remote_code"]
        )
        model.quantize(examples, batch_size=1 if torch.cuda.is_available() else 4)
        model.save(payload["out"])
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"GPTQModel did not make this {payload['method']} variant: {error}") from error
    kind = f"I{options['bits']}-g{options['group_size']}"
    return {"tensor_types": _types(Path(payload["out"]), kind), "tensor_errors": {}, "warnings": []}


def _types(folder: Path, kind: str) -> dict[str, str]:
    """The type of each of the base's tensors in a packed checkpoint."""
    from workbench.worker.base.checkpoint import read_header

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if name.endswith(".qweight"):
                found[name.removesuffix(".qweight") + ".weight"] = kind
            elif not name.endswith((".qzeros", ".scales", ".g_idx")):
                found[name] = tensor.dtype
    return found
