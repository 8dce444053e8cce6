"""AWQ, GPTQ and the importance matrix from one pass, against GPTQModel's GPTQ alone, on the same tokens.

Everything runs one after the other, each step in a fresh interpreter: ours with the three variants in question
(timed: AWQ nearest, GPTQ and the importance matrix together), AWQ with compensated rounding, GPTQModel, and then
every written checkpoint is scored on the same evaluation tokens. Prints losses (perplexity minus the base's) and
times as shares of GPTQModel's, and what the goals are. Run from the repository root on an idle machine:

    python -P benchmarks/quantize_vs_gptqmodel.py BASE CALIBRATION EVALUATION OUT [--engines transformers vllm]

BASE is a Hugging Face directory; the other two are token files as `worker/tokens/windows.py` writes them. GPTQModel's
time is that of its `quantize` call alone: loading before it and saving after it are not held against it, while ours
holds all from the first file read to the last one written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from workbench.machine import isolate  # noqa: E402
from workbench.records import Artifact, Evaluation, Job, Workload, to_json  # noqa: E402

GOALS = {"awq": 0.75, "awq-compensated": 0.33, "gptq": 0.6}
TIME_GOAL = 0.6


def gptqmodel_quantize(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: GPTQModel's GPTQ with its own defaults, symmetric, plain groups; `quantize_s` of its call alone."""
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = json.loads(Path(payload["tokens"]).read_text(encoding="utf-8"))["windows"]
    settings = QuantizeConfig(bits=4, group_size=128, sym=True, desc_act=False)
    model = GPTQModel.load(payload["base"], settings)
    examples = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    started = time.perf_counter()
    model.quantize(examples, batch_size=payload["batch"])
    quantize_s = time.perf_counter() - started
    model.save(payload["out"])
    return {"quantize_s": quantize_s}


def call(
    function: str, payload: dict[str, Any], workdir: Path, on_sample: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], float]:
    """A worker in a fresh interpreter: its answer and its wall-clock seconds; exits with its log if it fails."""
    here = str(Path(__file__).resolve().parent)
    environment = {"GPTQMODEL_CPU_WORKERS": "4", "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)])}
    reply = isolate.call(function, payload, workdir=workdir, environment=environment, on_sample=on_sample)
    if reply.value is None:
        sys.exit(f"{function} failed: {reply.error}\n{(workdir / 'log.txt').read_text(errors='replace')[-3000:]}")
    return reply.value, reply.duration_s


def perplexity(path: Path, form: str, backend: str, evaluation: Path, workdir: Path) -> float:
    """Of a checkpoint in an engine, by the workbench's own scoring."""
    content = json.loads(evaluation.read_text(encoding="utf-8"))
    if "score_from" not in content:
        # A bare token file: the second half of each window is scored.
        content["score_from"] = [len(window) // 2 for window in content["windows"]]
    if "vocab_size" not in content:
        content["vocab_size"] = json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    whole = workdir / "evaluation.json"
    workdir.mkdir(parents=True, exist_ok=True)
    whole.write_text(json.dumps(content), encoding="utf-8")
    job = Job(
        base=path.name,
        artifact=Artifact(path.name, "base" if form == "safetensors" else form, form, str(path), "0", 0, 0),
        backend=backend,
        # Compiling takes vLLM a minute and changes no logit that matters here.
        options={"enforce_eager": True} if backend == "vllm" else {},
        workload=Workload(repeats=0),
        evaluations={
            "evaluation": Evaluation(
                "evaluation",
                str(whole),
                "0",
                max(map(len, content["windows"])),
                "second-half",
                len(content["windows"]),
                0,
            )
        },
    )
    found, _ = call("workbench.worker.measure.job:measure", to_json(job), workdir)
    windows = found["qualities"]["evaluation"]["windows"]
    return math.exp(sum(w["nll_sum"] for w in windows) / sum(w["count"] for w in windows))


def pass_request(
    base: Path, tokens: Path, out: Path, variants: Mapping[str, tuple[str, dict[str, Any]]], precision: str
) -> dict[str, Any]:
    """What one calibration pass with these variants is asked: a `CalibrationRequest`. Each goes into `out/NAME`, and
    the importance matrix and unfinished work beside them; what is there is removed."""
    for name in (*variants, "state"):
        shutil.rmtree(out / name, ignore_errors=True)
    entries = []
    for name, (method, options) in variants.items():
        (out / name).mkdir(parents=True)
        entries.append({"name": name, "method": method, "options": options, "out": str(out / name)})
    return {
        "base": str(base),
        "tokens": str(tokens),
        "tokens_digest": "benchmark",
        "variants": entries,
        "imatrix_out": str(out / "imatrix.gguf"),
        "state": str(out / "state"),
        "device": "cpu",
        "threads": None,
        "seed": 0,
        "precision": precision,
    }


def ours(
    base: Path,
    tokens: Path,
    out: Path,
    variants: Mapping[str, tuple[str, dict[str, Any]]],
    precision: str = "float32",
    on_sample: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], float]:
    """One calibration pass with these variants, into `out/NAME`; float32 as recipes with an importance matrix do."""
    request = pass_request(base, tokens, out, variants, precision)
    return call("workbench.worker.calibration.run:run", request, out / "work", on_sample)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("out", type=Path, help="a folder for the checkpoints")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--batch", type=int, default=1, help="GPTQModel's batch size")
    arguments = parser.parse_args()
    base, tokens, out = arguments.base.resolve(), arguments.calibration.resolve(), arguments.out.resolve()

    made, ours_s = ours(base, tokens, out, {"awq": ("awq", {}), "gptq": ("gptq", {})})
    phases = ", ".join(f"{name} {value:.1f}" for name, value in made["seconds"].items())
    print(f"ours: {ours_s:.1f} s in all, in float32")
    print(f"  seconds by phase: {phases}", flush=True)
    first = {name: (out / name / "model.safetensors").read_bytes() for name in ("awq", "gptq")}
    again, _ = ours(
        base,
        tokens,
        out,
        {"awq": ("awq", {}), "gptq": ("gptq", {}), "awq-compensated": ("awq", {"rounding": "compensated"})},
    )
    same = all((out / name / "model.safetensors").read_bytes() == first[name] for name in first)
    print(
        f"  made again, the same bytes: {'yes' if same else 'NO'}; "
        f"compensated AWQ took {again['seconds']['awq-compensated']:.1f} s"
    )
    peer_out = out / "gptqmodel"
    shutil.rmtree(peer_out, ignore_errors=True)
    peer, _ = call(
        "quantize_vs_gptqmodel:gptqmodel_quantize",
        {"base": str(base), "tokens": str(tokens), "out": str(peer_out), "batch": arguments.batch},
        out / "work",
    )
    print(f"GPTQModel: {peer['quantize_s']:.1f} s\n", flush=True)

    print(
        f"time of calibration + AWQ + GPTQ + importance matrix: {ours_s / peer['quantize_s']:.2f} "
        f"of GPTQModel's GPTQ alone (goal {TIME_GOAL})"
    )
    print(f"  the forward pass alone: {made['seconds']['forward'] / peer['quantize_s']:.2f}")
    good = same and ours_s / peer["quantize_s"] <= TIME_GOAL
    scores: dict[str, list[float]] = {}
    for engine in arguments.engines:
        found = {"base": perplexity(base, "safetensors", engine, arguments.evaluation, out / "work")}
        for name, form in (("gptqmodel", "gptq"), ("awq", "awq"), ("awq-compensated", "awq"), ("gptq", "gptq")):
            found[name] = perplexity(out / name, form, engine, arguments.evaluation, out / "work")
        loss = found["gptqmodel"] - found["base"]
        print(
            f"\n{engine}: base {found['base']:.4f}, GPTQModel's GPTQ {found['gptqmodel']:.3f} (loss {loss:.3f})",
            flush=True,
        )
        for name, goal in GOALS.items():
            share = (found[name] - found["base"]) / loss
            good &= share <= goal
            print(f"  {name:16} {found[name]:.3f}  loss {share:.2f} of GPTQModel's (goal {goal})", flush=True)
        for name, value in found.items():
            scores.setdefault(name, []).append(value)
    if len(arguments.engines) > 1:
        spread = max(max(values) / min(values) - 1 for values in scores.values())
        print(f"\nthe engines differ by {100 * spread:.2f} % at most (goal 0.2 %)")
        good &= spread <= 0.002
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
