"""A calibration pass of the 8B shape."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_parts import Finding, Place

LIMIT_S = 80
GOAL_S = 120.0


def find(place: Place, layers: tuple[int, int] = (1, 3), of: int = 32) -> Iterator[Finding]:
    """AWQ, GPTQ and the importance matrix of a few and of some more layers of the 8B shape; what all would take is
    extrapolated from the difference, since what happens once (loading libraries, compiling, embeddings) grows with
    nothing."""
    chance, (count, length) = random.Random(0), place.calibration_windows
    tokens = place.work / "calibration.json"
    windows = [[chance.randrange(place.layer["vocab_size"]) for _ in range(length)] for _ in range(count)]
    tokens.write_text(json.dumps({"windows": windows}))
    seconds, taken_s = zip(*(calibrated(place, tokens, few) for few in layers), strict=True)
    yield finding(list(seconds), list(taken_s), layers, of, (count, length))


def calibrated(place: Place, tokens: Path, layers: int) -> tuple[dict[str, float], float]:
    """Seconds of a pass over so many layers, by phase, and of its whole process."""
    from quantize_vs_gptqmodel import call, pass_request

    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    shape |= {**place.layer, "num_hidden_layers": layers}
    work = place.work / f"layers-{layers}"
    source = {"config": shape, "init": "random"}
    call("workbench.worker.base.prepare:prepare", {"source": source, "out": str(work / "base")}, place.work / "log")
    variants: dict[str, tuple[str, dict[str, Any]]] = {"awq": ("awq", {}), "gptq": ("gptq", {})}
    payload = pass_request(work / "base", tokens, work, variants, "auto") | {"device": place.device}
    made, taken_s = call("workbench.worker.calibration.run:run", payload, place.work / "log")
    return {name: value for name, value in made["seconds"].items() if name != "total"}, taken_s


def finding(
    seconds: list[dict[str, float]],
    taken_s: list[float],
    layers: tuple[int, int],
    of: int,
    windows: tuple[int, int],
) -> Finding:
    """The time of all layers, from passes over two numbers of them."""
    more = layers[1] - layers[0]
    each_s = (taken_s[1] - taken_s[0]) / more
    all_s = taken_s[1] + each_s * (of - layers[1])
    said = ", ".join(f"{name} {(seconds[1][name] - seconds[0][name]) / more:.2f}" for name in seconds[1])
    return Finding(
        f"AWQ, GPTQ, imatrix on {windows[0]} x {windows[1]} tokens",
        f"{taken_s[1]:.0f} s for {layers[1]} of {of} layers, {each_s:.1f} s a layer ({said}); "
        f"extrapolated, not measured: {all_s:.0f} s for all",
        f"<= {GOAL_S:.0f} s",
        all_s <= GOAL_S,
        {"seconds": seconds, "taken_s": taken_s, "layers": layers, "extrapolated_s": all_s},
    )
