"""LongRoPE: which of a model's two sets of rope factors an engine scores with.

A LongRoPE model (Phi-3, Phi-4-mini) has short factors for sequences of up to its original context, and long ones. By
its definition, and in transformers, a sequence's own length decides. vLLM and llama.cpp decide once, by the longest
context that they make room for: the speed workload would choose what is scored, 0.4 nats apart. So both are given the
factors of the evaluation's windows for all lengths. What is timed is the same work with other numbers.

Rejected: to load once for scoring and again for speed. It doubles what a job takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from workbench.records import Job
from workbench.worker.base.config_json import text_config


def original_context(config: Mapping[str, Any]) -> int:
    """Tokens up to which a model of this `config.json` takes its short factors; 0 if it has no two sets of them."""
    text = text_config(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if "long_factor" not in rope:
        return 0
    return int(rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings") or 0)


def original_of_header(entry: Callable[[str], Any]) -> tuple[str, int]:
    """The entry of a GGUF file's header for the original context, and that; 0 as above. `entry`: an entry of the header
    by its name, None for one that is not there."""
    scaling = f"{entry('general.architecture')}.rope.scaling"
    key = f"{scaling}.original_context_length"
    return key, 0 if entry(f"{scaling}.type") == "yarn" else int(entry(key) or 0)


def takes_short(job: Job, original: int) -> bool | None:
    """Whether the windows of the first evaluation set are within the original context; None if nothing is scored."""
    first = next(iter(job.evaluations.values()), None)
    return None if first is None or not original else first.window <= original


def warnings(job: Job, original: int) -> list[str]:
    """What is scored or asked beside the first evaluation set and would want the other factors."""
    short = takes_short(job, original)
    lengths = {f"evaluation '{name}'": test.window for name, test in job.evaluations.items()}
    lengths |= {f"task {name}": task.longest for name, task in job.tasks.items()}
    return [
        f"{what} has {tokens:,} tokens and is run with the {'short' if short else 'long'} rope factors all the same: "
        f"{job.backend} has one set of them a load, and the first evaluation's windows chose it"
        for what, tokens in lengths.items()
        if short is not None and (tokens <= original) != short
    ]


def with_factors(config: Any, short: bool) -> Any:
    """vLLM's configuration of a LongRoPE model, which has its short or long factors in both places."""
    rope = getattr(config, "rope_parameters", None)
    if rope:
        factors = rope["short_factor" if short else "long_factor"]
        config.rope_parameters = {**rope, "short_factor": factors, "long_factor": factors}
    return config
