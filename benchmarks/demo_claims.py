"""What the demo's table must show, checked on the rows it printed.

    make demo && .venv/bin/python benchmarks/demo_claims.py

The base agrees across engines, no K-quant fell back, quality falls with the bits, pairs that cannot run say why.
Exit code 1 if a claim does not hold.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
AGREEMENT = 1e-3


def main() -> int:
    command = [
        str(Path(sys.executable).with_name("workbench")),
        "table",
        "--recipe",
        "smollm2-135m",
        "--format",
        "json",
    ]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    pairs = {(row["variant"], row["backend"]): row for row in rows}
    held = True

    def claim(text: str, holds: bool) -> None:
        nonlocal held
        held &= holds
        print(f"{'holds ' if holds else 'FAILS '} {text}")

    base = {backend: pairs["base", backend]["perplexity"] for backend in ("transformers", "vllm", "llamacpp")}
    spread = max(base.values()) / min(base.values()) - 1
    values = ", ".join(f"{backend} {value:.5f}" for backend, value in base.items())
    claim(f"base agrees across engines within {AGREEMENT:.1%}: {spread:.4%} ({values})", spread <= AGREEMENT)

    types = [row for row in rows if row["method"] == "gguf" and row["backend"] == "llamacpp" and row["perplexity"]]
    claim(f"at least eight GGUF types on llama.cpp: {len(types)}", len(types) >= 8)
    fell = [row["variant"] for row in types if any("instead of" in warning for warning in row["warnings"])]
    claim(f"no K-quant fell back: {', '.join(fell) or 'none'}", not fell)
    ladder = [pairs[f"gguf-{name}", "llamacpp"]["perplexity"] for name in LADDER]
    text = ", ".join(f"{name} {value:.3f}" for name, value in zip(LADDER, ladder, strict=True))
    claim(f"quality falls with the bits: {text}", ladder == sorted(ladder))
    refused = [row for row in rows if row["method"] == "gguf" and row["backend"] == "vllm"]
    claim("GGUF on vLLM is shown with its reason", bool(refused) and all(row["unsupported"] for row in refused))
    for name in ("Q4_K_M", "Q2_K"):
        plain, weighted = (pairs[f"gguf-{name}{end}", "llamacpp"]["perplexity"] for end in ("", "-imatrix"))
        claim(f"{name} improves with the importance matrix: {plain:.3f} -> {weighted:.3f}", weighted < plain)
    for name in ("awq-4bit-g128", "awq-4bit-g128-compensated", "gptq-4bit-g128"):
        one, other = (pairs[name, backend]["perplexity"] for backend in ("transformers", "vllm"))
        claim(
            f"{name}: transformers {one:.4f}, vLLM {other:.4f}, {abs(one / other - 1):.3%}",
            abs(one / other - 1) <= 2e-3,
        )
    failed = [f"{row['variant']} on {row['backend']}" for row in rows if row["error"]]
    claim(f"nothing failed: {', '.join(failed) or 'nothing'}", not failed)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
