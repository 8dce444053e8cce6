"""What scoring everything costs beside perplexity alone, on each engine; and vLLM against its own prompt_logprobs.

Everything is divergence, agreement, change of probability and their lists, against the base's compact record. Each
engine is loaded once and then scores the same windows in every way in turn, round by round, so that what else the
machine does falls on all of them alike. Prints the ratio of the fastest rounds, since what else a machine does only
adds, and that of the medians. Run from the repository root on an idle machine:

    python -P benchmarks/scoring_cost.py BASE EVALUATION OUT [--gguf FILE] [--engines transformers vllm llamacpp]

BASE is a Hugging Face directory, EVALUATION a token file as `worker/tokens/windows.py` writes it. llama.cpp scores
FILE, or the base as it converts it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from quantize_vs_gptqmodel import call  # noqa: E402

from workbench.records import Artifact, Evaluation, Job, Workload, from_json, to_json  # noqa: E402

COST_LIMIT, SPEED_LIMIT = 1.15, 0.8
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def timed(payload: dict[str, Any], progress: Any) -> dict[str, list[float]]:
    """Worker: seconds of every round of every way to score, `{"warm-up": ..., "perplexity": [...], ...}`."""
    import importlib

    from workbench.worker.backends import BACKENDS
    from workbench.worker.scoring.reducer import Scoring
    from workbench.worker.tokens.file import read_tokens

    job: Job = from_json(Job, payload["job"])
    (evaluation,) = job.evaluations.values()
    module = importlib.import_module(BACKENDS[job.backend])
    engine = module.Engine(job)
    asked = Scoring(read_tokens(evaluation.path), base=job.base_digest)
    plain, compared = replace(asked, per_token=False), replace(asked, reference=payload["reference"])

    def peers() -> None:
        """vLLM's own scoring: every prompt token's log-probability, as it hands them out."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        for _, ids, _ in asked.windows:
            engine._llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)

    ways = {
        "perplexity": lambda: engine.score(plain, lambda _: None),
        "everything": lambda: engine.score(compared, lambda _: None),
    }
    if job.backend == "vllm":
        ways["prompt_logprobs"] = peers
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(payload["rounds"] + 1):
        # In turn, and the other way round every second time: a drift favours none.
        for name in list(ways) if round_ % 2 else reversed(list(ways)):
            started = time.perf_counter()
            ways[name]()
            if round_:
                seconds[name].append(time.perf_counter() - started)
            progress(round_, payload["rounds"], name)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("out", type=Path, help="a folder for what is made")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm", "llamacpp"])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--dtype", default="auto", help="of transformers and vLLM")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    base, out = arguments.base.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    stored = json.loads(arguments.evaluation.read_text(encoding="utf-8"))
    kept = stored["windows"][: arguments.windows]
    evaluation = {
        "windows": kept,
        "score_from": stored.get("score_from", [len(ids) // 2 for ids in kept])[: len(kept)],
        "vocab_size": stored.get("vocab_size", config["vocab_size"]),
    }
    file = out / "evaluation.json"
    file.write_text(json.dumps(evaluation), encoding="utf-8")
    tokens = sum(map(len, kept))

    def job(backend: str) -> dict[str, Any]:
        path, form = base, "safetensors"
        if backend == "llamacpp":
            path, form = arguments.gguf or out / "base.gguf", "gguf"
        options = {} if backend == "llamacpp" else {"dtype": arguments.dtype}
        described = Job(
            base="base",
            artifact=Artifact("base", "base", form, str(path), "0", 0, 0),
            backend=backend,
            options=options,
            workload=Workload(repeats=0),
            base_digest="benchmark",
            evaluations={
                "evaluation": Evaluation("evaluation", str(file), "0", max(map(len, kept)), "second-half", len(kept), 0)
            },
        )
        return dict(to_json(described))

    if "llamacpp" in arguments.engines and not arguments.gguf and not (out / "base.gguf").exists():
        payload = {"base": str(base), "out": str(out / "base.gguf"), "dtype": config.get("dtype"), "name": "base"}
        call("workbench.worker.methods.gguf:convert", payload, out / "work")
    reference = out / "reference.safetensors"
    call("workbench.worker.measure.job:refer", {"job": job("transformers"), "out": str(reference)}, out / "work")
    good = True
    print(f"{len(kept)} windows, {tokens} tokens, {arguments.rounds} rounds")
    for backend in arguments.engines:
        payload = {"job": job(backend), "reference": str(reference), "rounds": arguments.rounds}
        seconds, _ = call("scoring_cost:timed", payload, out / "work")
        fastest = {name: min(values) for name, values in seconds.items()}
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = fastest["everything"] / fastest["perplexity"]
        speeds = ", ".join(f"{name} {tokens / value:.0f} tok/s" for name, value in fastest.items())
        good &= ratio <= COST_LIMIT
        print(f"\n{backend}: {speeds}")
        print(
            f"  everything / perplexity alone: {ratio:.3f} of the time (goal {COST_LIMIT})"
            f"{'' if ratio <= COST_LIMIT else '  MISSED'}; medians {middle['everything'] / middle['perplexity']:.3f}",
            flush=True,
        )
        if "prompt_logprobs" in middle:
            share = fastest["prompt_logprobs"] / fastest["everything"]
            good &= share >= SPEED_LIMIT
            print(
                f"  everything / its own prompt_logprobs: {share:.3f} of the speed (goal {SPEED_LIMIT})"
                f"{'' if share >= SPEED_LIMIT else '  MISSED'}; "
                f"medians {middle['prompt_logprobs'] / middle['everything']:.3f}"
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
