"""One job, measured: what is done in which order; the clocks are in `timing.py`.

Load, score, warm up, time. Scoring first makes the engine run every kernel it has before anything is timed. The
repeats come in rounds, between which other jobs work: a machine drifts within seconds, and repeats made in one go
agree with each other, not with tomorrow's. All engines get the same ids. Raw samples are returned, one a repeat,
and beside them what the machine did meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from workbench.errors import importing
from workbench.records import (
    Answers,
    Job,
    Measurement,
    Quality,
    Reference,
    ReferRequest,
    from_json,
    to_json,
)
from workbench.worker import Progress
from workbench.worker.backends import backend_named, elsewhere
from workbench.worker.backends.served import NotScored
from workbench.worker.measure import answers, over_http, resident, timing
from workbench.worker.measure.energy import Meter
from workbench.worker.scoring.reducer import Scoring, compact
from workbench.worker.tokens.file import TokenFile, read_tokens
from workbench.worker.tokens.spelling import check_spelling


def measure(payload: object, progress: Any) -> object:
    """Worker for a `Job`; returns a `Measurement`."""
    job: Job = from_json(Job, payload)
    sets = {name: read_tokens(test.path) for name, test in job.evaluations.items()}
    first = next(iter(sets), "")
    windows = sets[first].windows if sets else []
    text = [token for ids in windows for token in ids]
    workload = job.workload
    timed_points = len(workload.points) + (len(workload.batches) if workload.requests else 0)
    steps = len(windows) + timed_points * workload.repeats + 1
    progress(0, steps, "loading")
    start = timing.now()
    module = _engine(job)
    import_s = timing.now() - start
    start = timing.now()
    if hasattr(module, "compile_for"):
        module.compile_for(job)
    compile_s = timing.now() - start
    memory = {"runtime": resident.resident_bytes()}
    cached = resident.cached_fraction(job.artifact.path)

    start = timing.now()
    engine = module.Engine(job)
    load_s = timing.now() - start
    memory["peak_load"] = resident.peak_bytes()
    on_gpu = engine.settings().get("device") == "cuda"
    scored = _scored(job, engine, sets, on_gpu, progress, steps)
    if getattr(module, "SERVER", False):
        served_row = over_http.measure(job, engine, text, load_s, progress, on_gpu)
        return to_json(
            replace(
                served_row,
                qualities=scored.qualities,
                tasks=scored.answered,
                warnings=[*served_row.warnings, *scored.warnings],
                settings=served_row.settings | ({"score_s": scored.seconds} if scored.seconds else {}),
            )
        )
    done = len(windows)

    figures, repeats_s = _figures(scored.qualities.get(first)), list[list[float]]()

    def stepped(began: float, ended: float) -> None:
        nonlocal done
        done += 1
        repeats_s.append([began, ended])
        progress(done, steps, figures)

    if hasattr(engine, "forget_peak"):
        engine.forget_peak()
    peak = resident.Peak()
    meter, speeds, served, probes = Meter(), [], [], list[float]()
    for share in timing.shares(workload.repeats, job.rounds):
        if share.start:
            progress.pause()
        timed, probed = timing.speeds(
            engine, workload, text, stepped, meter=meter, probe=timing.work_probe, share=share, whole=on_gpu
        )
        speeds.append(timed)
        served.append(timing.served(engine, workload, text, stepped, share=share, whole=on_gpu))
        probes += probed
    memory["peak_timing"] = peak.most()
    settings = engine.settings()
    warnings = [*settings.pop("warnings", []), *scored.warnings]
    settings |= {"import_s": import_s, "compile_s": compile_s, "score_s": scored.seconds}
    if meter.counted:
        settings["energy_of"] = " and ".join(meter.counted)
    measurement = Measurement(
        device=settings.pop("device_name", settings.pop("device", "cpu")),
        load_s=load_s,
        speeds=timing.joined(speeds),
        served=timing.joined(served),
        qualities=scored.qualities,
        tasks=scored.answered,
        memory=_memory(engine.memory(), memory, peak.grown()),
        conditions={"page_cache_before": cached, "probe_s": probes, "repeats_s": repeats_s},
        settings=settings,
        warnings=warnings,
    )
    return to_json(measurement)


@dataclass
class _Scored:
    """What an engine says of texts and tasks, and what is to be known of that."""

    qualities: dict[str, Quality] = field(default_factory=dict)
    answered: dict[str, Answers] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float | None = None
    """Of the first set."""


def _scored(job: Job, engine: Any, sets: dict[str, TokenFile], on_gpu: bool, progress: Progress, steps: int) -> _Scored:
    """Every evaluation set and every task. Raises `ValueError` where no scored position has finite logits."""
    found, first = _Scored(), next(iter(sets), "")
    most = len(sets[first].windows) if sets else 0
    for name, tokens in sets.items():
        if name == first:
            check_spelling(tokens.spelling, engine.spell, job.artifact.variant)
        what = "scoring" if name == first else f"scoring {name}"
        asked = Scoring(tokens, job.references.get(name), base=job.base_digest)
        try:
            if on_gpu and name == first:
                # Kernels are compiled and tuned in the first forward; that is no part of how long scoring takes.
                one = replace(tokens, windows=tokens.windows[:1], score_from=tokens.score_from[:1])
                engine.score(Scoring(one, base=job.base_digest), lambda _: None)
            start = timing.now()
            quality = engine.score(asked, _told(progress, most, steps, what))
        except NotScored as reason:
            found.warnings.append(f"no quality{'' if name == first else f' of {name}'}: {reason}")
            continue
        found.seconds = found.seconds or timing.now() - start
        found.warnings += _doubts(quality, "" if name == first else f" of {name}")
        found.qualities[name] = compact(quality, job.artifact.method == "base")
    found.warnings += engine.doubts() if hasattr(engine, "doubts") else []
    for name, task in job.tasks.items():
        progress(1, steps, f"task {name}")
        try:
            answered = answers.answer(engine, task)
        except NotScored as reason:
            found.warnings.append(f"task {name} is left out: {reason}")
            continue
        found.warnings += [f"task {name}: {text}" for text in answered.pop("warnings", [])]
        found.answered[name] = answered
    return found


def _doubts(quality: Quality, where: str) -> list[str]:
    """What makes a set's figures doubtful. Raises `ValueError` where there are none."""
    told = []
    bad = sum(window["nonfinite"] for window in quality["windows"])
    total = bad + sum(window["count"] for window in quality["windows"])
    if bad == total:
        raise ValueError(f"all {total} scored positions{where} have NaN or infinite logits")
    if bad:
        told.append(f"{bad} of {total} scored positions{where} have NaN or infinite logits; left out")
    nats = sum(window["nll_sum"] for window in quality["windows"]) / (total - bad)
    guess = math.log(quality["vocab_size"])
    if nats > guess:
        told.append(
            f"{nats:.2f} nats a token{where}, where guessing among all {quality['vocab_size']:,} tokens costs "
            f"{guess:.2f}: the model is broken, was never trained, or knows nothing of such text"
        )
    return told


def score(payload: object, progress: Any) -> object:
    """Worker for a `Job` of a server that somebody else started (`backends/elsewhere.py`): its quality alone, nothing
    is timed. Returns a `Measurement`, whose warnings say what could not be had."""
    job: Job = from_json(Job, payload)
    sets = {name: read_tokens(test.path) for name, test in job.evaluations.items()}
    engine = elsewhere.Engine(job)
    try:
        most = max((len(each.windows) for each in sets.values()), default=1)
        scored = _scored(job, engine, sets, False, progress, most)
        return to_json(
            Measurement(
                device=job.backend,
                qualities=scored.qualities,
                tasks=scored.answered,
                settings=engine.settings() | ({"score_s": scored.seconds} if scored.seconds else {}),
                warnings=scored.warnings,
            )
        )
    finally:
        engine.close()


def refer(payload: object, progress: Any) -> object:
    """Worker for a `ReferRequest`: score the job's artifact, the base, once and write the reference that every other
    job is compared with (`Reducer`, `make_reference`). Nothing is timed.

    Returns a `Reference`. Raises `ValueError` if no scored position has finite logits: nothing could be compared with
    that.
    """
    request: ReferRequest = from_json(ReferRequest, payload)
    job = request.job
    (evaluation,) = job.evaluations.values()
    tokens = read_tokens(evaluation.path)
    steps = len(tokens.windows)
    progress(0, steps, "loading")
    engine = _engine(job).Engine(job)
    asked = Scoring(tokens, make_reference=request.out, base=job.base_digest, per_token=False)
    made = engine.score(asked, _told(progress, steps, steps, "scoring"))
    if not any(window["count"] for window in made["windows"]):
        raise ValueError("the base gives NaN or infinite logits at every scored position")
    return to_json(Reference(made["made_reference_digest"] or "", engine.settings()))


def _engine(job: Job) -> Any:
    """The job's backend, its engine imported."""
    module = backend_named(job.backend)
    with importing(job.backend, module.INSTALL):
        module.load_engine()
    return module


def _told(progress: Progress, most: int, steps: int, what: str) -> Callable[[int], object]:
    """What an engine says before each window, as the parent's bar has it: at the most so many of its steps."""
    return lambda index: progress(min(index, most), steps, what)


def _figures(quality: Quality | None) -> str:
    """What is known before anything is timed, as progress tells it."""
    windows = quality["windows"] if quality else []
    if not (count := sum(window["count"] for window in windows)):
        return "timing"
    nats = sum(window["nll_sum"] for window in windows) / count
    compared = sum(window.get("kld_count", 0) for window in windows)
    kld = f", KLD {sum(window.get('kld_sum', 0) for window in windows) / compared:.4f}" if compared else ""
    return f"perplexity {math.exp(min(nats, 700)):.5g}{kld}"


def _memory(said: dict[str, int], seen: dict[str, int | None], grown: int | None) -> dict[str, int]:
    """What the engine says, the phases' peaks, and the workspace: what timing took in this process beyond the KV cache,
    for an engine that does not know better."""
    if "workspace" not in said and grown is not None:
        said = {**said, "workspace": max(0, grown - said.get("kv_cache", 0))}
    return said | {name: value for name, value in seen.items() if value is not None}
