"""Peak memory of the passes: a model of Llama-3.2-1B's shape, random weights, on the CPU; the calibration pass under
4 GiB, and the sensitivity pass, which prices types, at most 1.2 of that.

    python -P benchmarks/calibration_memory.py OUT [--layers 2 16] [--windows 32]

Makes AWQ (nearest and compensated), GPTQ and the importance matrix in one pass for each number of layers, so that the
second figure also shows whether the peak grows with the layers. The peak is the process tree's resident size as the
workbench samples it, memory-mapped pages of the base included. Run from the repository root; 16 layers with 32
windows of 512 tokens take about an hour on two cores, and fewer `--windows` lower the time but hardly the peak.
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

from quantize_vs_gptqmodel import call, pass_request  # noqa: E402

from workbench.machine.monitor import Monitor  # noqa: E402

LIMIT_BYTES = 4 * 2**30
MORE = 1.2
"""Of the calibration pass's memory, what the sensitivity pass may take."""
SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
METHODS = {"awq": ("awq", {}), "awq-compensated": ("awq", {"rounding": "compensated"}), "gptq": ("gptq", {})}


def worked(function: str, payload: dict[str, Any], workdir: Path) -> tuple[dict[str, Any], int, float]:
    """A worker's answer, its tree's peak in bytes, and its seconds."""
    monitor = Monitor()
    made, taken_s = call(function, payload, workdir, monitor)
    return made, monitor.memory()["peak_rss"], taken_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for what is made")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--windows", type=int, default=32)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    tokens = out / "calibration.json"
    windows = [[chance.randrange(SHAPE["vocab_size"]) for _ in range(512)] for _ in range(arguments.windows)]
    tokens.write_text(json.dumps({"windows": windows}))
    good = True
    for layers in arguments.layers:
        base = out / f"base-{layers}"
        shutil.rmtree(base, ignore_errors=True)
        source = {"config": SHAPE | {"num_hidden_layers": layers}, "init": "random"}
        worked("workbench.worker.base.prepare:prepare", {"source": source, "out": str(base)}, out / "work")
        payload = pass_request(base, tokens, out / f"made-{layers}", METHODS, "auto")
        made, peak_bytes, taken_s = worked("workbench.worker.calibration.run:run", payload, out / "work")
        asked = {name: payload[name] for name in ("base", "tokens", "tokens_digest", "device", "threads", "seed")}
        asked |= {"imatrix": payload["imatrix_out"], "state": str(out / "prices")}
        shutil.rmtree(out / "prices", ignore_errors=True)
        priced, more_bytes, more_s = worked("workbench.worker.calibration.sensitivity:run", asked, out / "work")
        good &= peak_bytes <= LIMIT_BYTES and more_bytes <= MORE * peak_bytes
        phases = ", ".join(f"{name} {value:.0f}" for name, value in made["seconds"].items())
        print(
            f"{layers} layers, {arguments.windows} windows of 512: peak {peak_bytes / 2**30:.2f} GiB "
            f"(goal {LIMIT_BYTES / 2**30:.0f}), {taken_s:.0f} s ({phases})",
            flush=True,
        )
        phases = ", ".join(f"{name} {value:.0f}" for name, value in priced["seconds"].items())
        print(
            f"  sensitivity: peak {more_bytes / 2**30:.2f} GiB ({more_bytes / peak_bytes:.2f} of that, goal {MORE}), "
            f"{more_s:.0f} s ({phases})",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
