"""Perplexity of artifacts with packed weights (`kernel: workbench`) and with the same weights de-quantized.

Prints both, their ratio (goal: within 0.05 %), bytes of weights and tokens a second of scoring, for each artifact.
Run from the repository root:

    python -P benchmarks/packed_equals_dequantized.py TOKENS ARTIFACT... [--windows 2]

TOKENS is a file of evaluation windows as `worker/tokens/windows.py` writes them; an ARTIFACT is a GGUF file or an AWQ
or GPTQ directory, as `workbench quantize` makes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LIMIT = 5e-4


def dequantized(path: Path, format: str) -> Any:
    """The artifact's model in float32, without kernels: a GGUF by transformers, the others by the methods' modules."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from workbench_kernels import awq, gptq

    if format == "gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(path)
    bits = config.quantization_config["bits"]
    del config.quantization_config
    tensors = {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}
    state = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            parts = [tensors[f"{stem}.{s}"] for s in ("qweight", "qzeros", "scales")]
            if format == "awq":
                state[f"{stem}.weight"] = awq.reference(*parts)
            else:
                state[f"{stem}.weight"] = gptq.reference(*parts, tensors[f"{stem}.g_idx"], bits)
        elif suffix not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, extra = model.load_state_dict(state, strict=False, assign=True)
    if extra or set(missing) - {"lm_head.weight"}:
        sys.exit(f"{path}: {missing} missing, {extra} too many")
    model.tie_weights()
    return model.eval()


def perplexity(model: Any, windows: list[list[int]]) -> tuple[float, float]:
    """Over the second half of each window; and tokens a second."""
    import torch

    total, count, started = 0.0, 0, time.perf_counter()
    with torch.inference_mode():
        for ids in windows:
            scores = torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0].float(), -1)
            half = len(ids) // 2
            taken = scores[half - 1 : -1].gather(-1, torch.tensor(ids[half:])[:, None])
            total, count = total - float(taken.double().sum()), count + len(ids) - half
    return math.exp(total / count), sum(map(len, windows)) / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokens", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=2)
    arguments = parser.parse_args()

    from workbench.worker.backends import packed
    from workbench.worker.base.checkpoint import read_json

    windows = json.loads(arguments.tokens.read_text(encoding="utf-8"))["windows"][: arguments.windows]
    far = 0
    for path in arguments.artifacts:
        format = (
            "gguf" if path.suffix == ".gguf" else read_json(path / "config.json")["quantization_config"]["quant_method"]
        )
        rows = []
        for way in ("de-quantized", "packed"):
            if way == "packed":
                model = packed.load(path, format, dtype="float32", device="cpu").model
            else:
                model = dequantized(path, format)
            rows.append((way, model.get_memory_footprint(), *perplexity(model, windows)))
            del model
            gc.collect()
        (_, _, expected, _), (_, _, found, _) = rows
        print(path.name)
        for way, size_bytes, value, speed in rows:
            print(f"  {way:13} perplexity {value:.6f}   weights {size_bytes / 2**20:7.1f} MiB   {speed:6.0f} tokens/s")
        print(f"  packed / de-quantized - 1 = {found / expected - 1:+.1e} (goal: within {LIMIT:.0e})", flush=True)
        far += abs(found / expected - 1) > LIMIT
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
