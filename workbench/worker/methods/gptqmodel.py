"""`engine: gptqmodel`: AWQ or GPTQ by GPTQModel, for architectures that the workbench's own pass does not cover.

It calibrates on the same tokens and writes the same formats, but runs its own pass for every variant, wants a GPU
for AWQ, and reports no error a tensor. Its lines are passed on as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError, importing
from workbench.records import MadeVariant, from_json, to_json
from workbench.worker import Progress
from workbench.worker.tokens.file import read_tokens


@dataclass(frozen=True)
class Request:
    """What is needed here of a `VariantRequest`, and the arguments of a `Making`."""

    base: str
    out: str
    tokens: str
    method: str
    """`awq` or `gptq`."""
    options: dict[str, Any]
    allow_remote_code: bool = False


def gptqmodel(payload: object, progress: Progress) -> object:
    """Worker for a `Request`: one checkpoint by GPTQModel. Returns `MadeVariant`, without errors of tensors. Raises
    `UserError` in GPTQModel's own words where it refuses."""
    with importing("GPTQModel", "pip install gptqmodel optimum"):
        from gptqmodel import GPTQModel, QuantizeConfig
    import torch

    request: Request = from_json(Request, payload)
    options = request.options
    if request.method == "awq":
        settings = {"method": "awq", "format": "gemm", "sym": not options["zero_point"]}
    else:
        settings = {"sym": options["sym"], "desc_act": options["desc_act"], "damp_percent": options["damping"]}
    windows = read_tokens(request.tokens).windows
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    progress(0, 1, "GPTQModel")
    try:
        config = QuantizeConfig(bits=options["bits"], group_size=options["group_size"], **settings)
        model = GPTQModel.load(request.base, config, trust_remote_code=request.allow_remote_code)
        model.quantize(examples, batch_size=1 if torch.cuda.is_available() else 4)
        model.save(request.out)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"GPTQModel did not make this {request.method} variant: {error}") from error
    return to_json(MadeVariant(_types(Path(request.out), f"I{options['bits']}-g{options['group_size']}")))


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
