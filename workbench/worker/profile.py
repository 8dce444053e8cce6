"""One job, measured. The only file of the program with a clock.

Order: load, score, warm up, time. Scoring first makes the engine run every kernel it has before anything is
timed. Prompts are fresh in every repeat, so that no prefix cache can answer from memory; all engines get the
same ids. Raw samples are returned, one a repeat.
"""

from __future__ import annotations

import importlib
import json
import random
import time
from typing import Any

from workbench.errors import UserError, install_with
from workbench.records import Job, Measurement, Speed, Workload, from_json, to_json
from workbench.worker.backends import BACKENDS
from workbench.worker.quality import compact

WARMUP_NEW_TOKENS = 8


def measure(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: payload `{"job": Job}`; returns a `Measurement` as JSON."""
    job: Job = from_json(Job, payload["job"])
    windows = _windows(job)
    workload = job.workload
    steps = len(windows) + (workload.repeats + workload.warmup) * workload.new_tokens + 1
    progress(0, steps, "loading")
    start = time.perf_counter()
    module = _engine(job)
    import_s = time.perf_counter() - start

    start = time.perf_counter()
    engine = module.Backend(job)
    load_s = time.perf_counter() - start

    quality, score_s = None, None
    if job.evaluation is not None:
        spec = {"windows": job.evaluation.path, "reference": job.reference, "base": job.base_digest}
        progress(1, steps, "scoring")
        start = time.perf_counter()
        found = engine.score(_watched(windows, progress, steps), spec)
        score_s = time.perf_counter() - start
        quality = compact(found, job.artifact.method == "base")
    speed = None
    if workload.repeats:
        done = len(windows)

        def stepped(text: str) -> None:
            nonlocal done
            done += 1
            progress(done, steps, text)

        prompts = _prompts(workload, windows)
        for repeat in range(workload.warmup):
            _run(engine, prompts[repeat], min(workload.new_tokens, WARMUP_NEW_TOKENS))
        samples = []
        for repeat in range(workload.repeats):
            samples.append(_run(engine, prompts[workload.warmup + repeat], workload.new_tokens))
            stepped("timing")
        speed = Speed(
            prompt_tokens=workload.prompt_tokens,
            new_tokens=workload.new_tokens,
            batch=workload.batch,
            first_token_s=[sample[0] for sample in samples],
            step_s=[sample[1] for sample in samples],
            step_tokens=[sample[2] for sample in samples],
        )
    settings = engine.settings()
    warnings = settings.pop("warnings", [])
    if quality is not None:
        bad = sum(window["nonfinite"] for window in quality["windows"])
        total = bad + sum(window["count"] for window in quality["windows"])
        if bad == total:
            raise ValueError(f"all {total} scored positions have NaN or infinite logits")
        if bad:
            warnings.append(f"{bad} of {total} scored positions have NaN or infinite logits; left out")
    settings |= {"import_s": import_s, "score_s": score_s}
    measurement = Measurement(
        device=settings.pop("device_name", settings.pop("device", "cpu")),
        load_s=load_s,
        speeds=[speed] if speed else [],
        quality=quality,
        memory=engine.memory(),
        settings=settings,
        warnings=warnings,
    )
    return to_json(measurement)


def refer(payload: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Worker: payload `{"job": Job, "out": path}`; scores the job's artifact, the base, once and writes the
    reference that every other job is compared with (`quality.Reducer`, `make_reference`).

    Nothing is timed. Returns its content's `digest`, and `settings`: dtype and device it was made with. Raises
    `ValueError` if no scored position has finite logits: nothing could be compared with that.
    """
    job: Job = from_json(Job, payload["job"])
    assert job.evaluation is not None
    windows = _windows(job)
    progress(0, len(windows), "loading")
    engine = _engine(job).Backend(job)
    spec = {
        "windows": job.evaluation.path, "make_reference": payload["out"], "base": job.base_digest, "per_token": False,
    }  # fmt: skip
    made = engine.score(_watched(windows, progress, len(windows)), spec)
    if not any(window["count"] for window in made["windows"]):
        raise ValueError("the base gives NaN or infinite logits at every scored position")
    return {"digest": made["made_reference_digest"], "settings": engine.settings()}


def _engine(job: Job) -> Any:
    """The job's backend module, its engine imported."""
    module = importlib.import_module(BACKENDS[job.backend])
    try:
        module.load_engine()
    except ModuleNotFoundError as error:
        raise install_with(f"{job.backend} (module '{error.name}')", module.INSTALL) from None
    return module


def _windows(job: Job) -> list[tuple[int, list[int], int]]:
    """(index, ids, first scored position) of every evaluation window."""
    if job.evaluation is None:
        return []
    with open(job.evaluation.path) as file:
        stored = json.load(file)
    return [(i, ids, first) for i, (ids, first) in enumerate(zip(stored["windows"], stored["score_from"], strict=True))]


class _watched(list):  # type: ignore[type-arg]
    """The windows, reporting progress as an engine walks over them."""

    def __init__(self, windows: list[Any], progress: Any, steps: int) -> None:
        super().__init__(windows)
        self._progress, self._steps = progress, steps

    def __iter__(self) -> Any:
        for i, window in enumerate(super().__iter__()):
            self._progress(i, self._steps, "scoring")
            yield window


def _prompts(workload: Workload, windows: list[tuple[int, list[int], int]]) -> list[list[list[int]]]:
    """Fresh prompts for every repeat: [repeat][sequence][id], cut from the evaluation text by the seed."""
    chance = random.Random(workload.seed)
    text = [token for _, ids, _ in windows for token in ids]
    if len(text) < 2:
        # No evaluation (a base without weights, say): any ids will do, small ones exist in every vocabulary.
        text = [chance.randrange(10, 250) for _ in range(4 * workload.prompt_tokens)]
    while len(text) < 2 * workload.prompt_tokens:
        text = text + text
    rounds = workload.warmup + workload.repeats
    starts = [
        [chance.randrange(len(text) - workload.prompt_tokens) for _ in range(workload.batch)] for _ in range(rounds)
    ]
    return [[text[s : s + workload.prompt_tokens] for s in row] for row in starts]


def _run(engine: Any, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[float], list[int]]:
    """Seconds to the first token of all sequences, then seconds and tokens of each later step."""
    started = time.perf_counter()
    waiting = len(prompts)
    seen = [0] * len(prompts)
    first_s = 0.0
    step_s: list[float] = []
    step_tokens: list[int] = []
    last = started
    for gained in engine.generate(prompts, new_tokens):
        now = time.perf_counter()
        if waiting:
            seen = [a + b for a, b in zip(seen, gained, strict=True)]
            waiting = seen.count(0)
            first_s = now - started
        else:
            step_s.append(now - last)
            step_tokens.append(sum(gained))
        last = now
    if waiting:
        raise UserError("the engine stopped before every sequence had its first token")
    return first_s, step_s, step_tokens
