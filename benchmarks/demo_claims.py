"""What the tables of the demo and of the full recipe must show, checked on rows.

    make demo && .venv/bin/python benchmarks/demo_claims.py
    .venv/bin/python benchmarks/demo_claims.py --results results/amd-epyc-2-cores-24-gib --cells 42

The base agrees across engines, no K-quant fell back, quality falls with the bits, every format ran in every engine, and
the same weights in another engine have the same quality. Exit code 1 if a claim does not hold.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

ENGINES = ("transformers", "vllm", "llamacpp")
CHECKPOINTS = ("awq-4bit-g128", "awq-4bit-g128-compensated", "gptq-4bit-g128")
CARRIED_NATS = 0.003
"""Between AWQ's or GPTQ's divergence in transformers and in llama.cpp, which rounds what meets packed weights."""
ROUNDED_NATS = 0.001
"""Between a GGUF file's divergence in transformers, which computes in float32, and in vLLM, beyond vLLM's floor."""
LADDER = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
AGREEMENT = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", help="rows of this folder, whatever their recipe; default: the demo's")
    parser.add_argument("--cells", type=int, default=0, help="how many pairs of variant and engine were measured")
    asked = parser.parse_args()
    where = ["--results", asked.results] if asked.results else ["--recipe", "smollm2-135m"]
    command = [sys.executable, "-m", "workbench.cli", "table", *where, "--format", "json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    pairs = {(row["variant"], row["backend"]): row for row in rows}
    held = True

    def claim(text: str, holds: bool) -> None:
        nonlocal held
        held &= holds
        print(f"{'holds ' if holds else 'FAILS '} {text}")

    base = {backend: pairs["base", backend]["perplexity"] for backend in ENGINES}
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
    ran = {(row["method"], row["backend"]) for row in rows if row["perplexity"]}
    lacks = [f"{method} in {engine}" for method in ("base", "awq", "gptq", "gguf") for engine in ENGINES]
    lacks = [text for text in lacks if tuple(text.split(" in ")) not in ran]
    claim(f"every format ran in every engine: {', '.join(lacks) or 'nothing lacks'}", not lacks)
    cells = [row for row in rows if row["perplexity"] and row["decode_tok_s"]]
    claim(f"at least {asked.cells} pairs were measured: {len(cells)}", len(cells) >= asked.cells)
    for row in rows:
        name, engine = row["variant"], row["backend"]
        own, other = row["kld_mean"], pairs.get((name, "transformers"), {}).get("kld_mean")
        if own is None or other is None or name == "base":
            continue
        if engine == "llamacpp" and name in CHECKPOINTS:
            text = f"{name}: KLD {own:.4f} in llama.cpp as {row['container']}, {other:.4f} in transformers"
            claim(text, abs(own - other) <= CARRIED_NATS)
        if engine == "vllm" and row["format"] == "gguf":
            floor = row["noise_floor"]["kld"]["vllm"]
            text = f"{name}: KLD {own:.4f} in vLLM, {row['weights_held']}, {other:.4f} in transformers"
            claim(f"{text}; vLLM's floor {floor:.4f}", abs(own - other) <= floor + ROUNDED_NATS)
    speeds = {engine: pairs["gptq-4bit-g128", engine] for engine in ENGINES}
    told = "; ".join(
        f"{engine} {row['decode_tok_s']:.1f} ({row['decode_tok_s_ci'][0]:.1f} to {row['decode_tok_s_ci'][1]:.1f})"
        for engine, row in speeds.items()
    )
    carried = speeds.pop("llamacpp")["decode_tok_s_ci"][0]
    most = max(row["decode_tok_s_ci"][1] for row in speeds.values())
    claim(f"GPTQ decodes surely faster in llama.cpp, tokens a second: {told}", carried > most)
    for name in ("Q4_K_M", "Q2_K"):
        plain, weighted = (pairs[f"gguf-{name}{end}", "llamacpp"]["perplexity"] for end in ("", "-imatrix"))
        claim(f"{name} improves with the importance matrix: {plain:.3f} -> {weighted:.3f}", weighted < plain)
    for name in CHECKPOINTS:
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
