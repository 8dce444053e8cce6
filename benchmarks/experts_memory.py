"""Peak memory of the calibration pass over 64 experts beside that over the dense layer of the same size.

    python -P benchmarks/experts_memory.py OUT [--windows 8]

Two shapes of two layers with random weights, as Qwen3-MoE has them (experts far narrower than their input, eight a
token) and as Mixtral has (wider for their input, two a token), each beside a dense model of the same attention whose
MLP has as many weights as all experts together.
Makes AWQ, GPTQ and the importance matrix in one pass; the peak is the process tree's resident size as the workbench
samples it. What an interpreter with torch takes by itself is measured by a pass over a model of next to nothing, and
the ratio is of what is above that. Run from the repository root; about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from quantize_vs_gptqmodel import ours  # noqa: E402

from workbench.machine.monitor import Monitor  # noqa: E402

GOAL = 1.5
"""Times the dense layer's memory that experts may take."""
EXPERTS = 64
WINDOW = 256
PLAIN: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
QWEN: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 8}
SHAPES: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "Qwen3-MoE": ("qwen3_moe", "qwen3", 1024, 64, QWEN),
    "Mixtral": ("mixtral", "llama", 256, 128, {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
}
"""Name -> its type, the dense one's, channels, an expert's width, more of its configuration."""


def write(folder: Path, kind: str, hidden: int, inner: int, **more: Any) -> Path:
    """A random model of a shape."""
    import torch
    import transformers

    sizes = PLAIN | {"hidden_size": hidden, "intermediate_size": inner} | more
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder)
    return folder


def peak(base: Path, tokens: Path, out: Path) -> tuple[int, float, dict[str, list[int]]]:
    """Of a pass over a base: bytes, seconds, and how many tokens each expert saw."""
    variants = {method: (method, {"group_size": 64}) for method in ("awq", "gptq")}
    monitor = Monitor()
    made, taken_s = ours(base, tokens, out, variants, "auto", monitor)
    return monitor.memory()["peak_rss"], taken_s, made["experts"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for what is made, emptied before")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    chance = random.Random(0)
    windows = [[chance.randrange(PLAIN["vocab_size"]) for _ in range(WINDOW)] for _ in range(arguments.windows)]
    tokens = out / "calibration.json"
    tokens.write_text(json.dumps({"windows": windows}))
    floor, _, _ = peak(write(out / "least", "llama", 64, 64, head_dim=8), tokens, out / "least-made")
    print(f"an interpreter with a model of next to nothing: {floor / 2**20:.0f} MiB", flush=True)
    good = True
    for name, (kind, dense, hidden, inner, more) in SHAPES.items():
        sparse = write(out / kind, kind, hidden, inner, moe_intermediate_size=inner, **more)
        whole = write(out / dense, dense, hidden, inner * EXPERTS)
        routed_bytes, routed_s, counts = peak(sparse, tokens, out / f"{kind}-made")
        dense_bytes, dense_s, _ = peak(whole, tokens, out / f"{dense}-made")
        ratio = (routed_bytes - floor) / (dense_bytes - floor)
        seen = [count for each in counts.values() for count in each]
        good &= ratio <= GOAL
        print(
            f"{name}, {EXPERTS} experts of {hidden} x {inner}: {(routed_bytes - floor) / 2**20:.0f} MiB above that, "
            f"{routed_s:.0f} s; dense {hidden} x {inner * EXPERTS}: {(dense_bytes - floor) / 2**20:.0f} MiB, "
            f"{dense_s:.0f} s; ratio {ratio:.2f} (goal {GOAL}); tokens an expert {min(seen)} to {max(seen)}",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
