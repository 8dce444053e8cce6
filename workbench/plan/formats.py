"""A plan as text and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from workbench.records import to_json
from workbench.sizes import size_text
from workbench.worker.backends import backend_named

if TYPE_CHECKING:
    from workbench.plan.need import Need, Plan
    from workbench.records import LayerKind


def objects(plan: Plan) -> list[dict[str, Any]]:
    """One flat object a variant and engine, SI units, None where a pair cannot run."""
    top = {
        "recipe": plan.recipe,
        "base": plan.model,
        "device": plan.device,
        "context_tokens": plan.context_tokens,
        "batch": plan.batch,
        "memory_bytes": plan.memory_bytes,
    }
    return [top | {name: v for name, v in to_json(asdict(need)).items() if name != "devices"} for need in plan.needs]


def json_text(plan: Plan) -> str:
    """`objects` as a JSON list."""
    return json.dumps(objects(plan), indent=2, allow_nan=False) + "\n"


def terminal(plan: Plan) -> str:
    """A table for people, with what does not fit, cannot run or falls back in footnotes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    axes = [
        axis
        for axis in dict.fromkeys(axis for need in plan.needs for axis in backend_named(need.backend).AXES)
        if any(need.options.get(axis) not in (None, "auto", _usual(need, axis)) for need in plan.needs)
    ]
    for heading in ("variant", "backend", *(axis.replace("_", " ") for axis in axes)):
        grid.add_column(heading, no_wrap=True)
    for heading in ("bpw", "disk", "weights", "KV cache", "workspace", "runtime", "need"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("fits", no_wrap=True)
    grid.add_column("note", no_wrap=True)
    footnotes: dict[str, int] = {}
    for need in plan.needs:
        words = list(need.notes)
        if need.unsupported:
            words.append(need.unsupported)
        if need.fallbacks:
            words.append(_fallback_words(need))
        if need.fits is False:
            fitting = need.fits_context_tokens
            words.append(f"a context of {fitting:,} tokens would fit" if fitting else "does not fit at any context")
        marks = ",".join(str(footnotes.setdefault(word, len(footnotes) + 1)) for word in words)
        sizes = (need.weights_bytes, need.kv_cache_bytes, need.workspace_bytes, need.runtime_bytes, need.need_bytes)
        grid.add_row(
            need.variant,
            need.backend,
            *(str(need.options.get(axis) or _usual(need, axis) or "auto") for axis in axes),
            f"{need.bits_per_weight:.2f}",
            size_text(need.disk_bytes),
            *map(_size, sizes),
            "cannot run" if need.unsupported else "yes" if need.fits else "NO",
            marks,
        )
    console = Console(highlight=False, width=160, force_jupyter=False)
    with console.capture() as captured:
        console.print(
            f"{plan.model}: {plan.parameters / 1e6:,.1f} million weights; "
            f"{size_text(plan.memory_bytes)} of {'GPU' if plan.device == 'cuda' else 'host'} memory"
        )
        console.print(f"{_sequences(plan)}\n")
        console.print(grid)
        console.print(f"\ndisk for all of it: {size_text(plan.disk_bytes)}, {size_text(plan.free_disk_bytes)} free")
        if plan.disk_bytes > plan.free_disk_bytes:
            console.print("  not enough: make room, or set WORKBENCH_HOME to a larger disk")
        for text in plan.notes:
            console.print(f"note: {text}", markup=False)
        for text, number in footnotes.items():
            console.print(f"[{number}] {text}", markup=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n")) + "\n"


def layers(kinds: Sequence[LayerKind], format: str) -> str:
    """Which linear layers share an input and what produces it, a paragraph a kind of layer; or as JSON."""
    if format == "json":
        return json.dumps(to_json(list(kinds)), indent=2) + "\n"
    paragraphs = (
        f"decoder layers {kind.layers}\n" + "".join(f"  {group}\n" for group in kind.groups) for kind in kinds
    )
    return "\n".join(paragraphs)


def _sequences(plan: Plan) -> str:
    """`1 sequence of 640 or 4,224 tokens; 8 or 32 of 640 tokens`, and how a row answers for several."""
    lengths: dict[int, set[int]] = {}
    for point in plan.points:
        lengths.setdefault(point.batch, set()).add(point.tokens)
    alike: dict[tuple[int, ...], list[int]] = {}
    for batch, found in sorted(lengths.items()):
        alike.setdefault(tuple(sorted(found)), []).append(batch)
    parts = [f"{_either(batches)} of {_either(found)} tokens" for found, batches in alike.items()]
    one = next(iter(alike.values())) == [1]
    parts[0] = parts[0].replace(" of ", " sequence of " if one else " sequences of ", 1)
    return "; ".join(parts) + ("; each row is for what needs most" if sum(map(len, lengths.values())) > 1 else "")


def _either(numbers: Sequence[int]) -> str:
    *most, last = (f"{number:,}" for number in numbers)
    return f"{', '.join(most)} or {last}" if most else last


FORMATS = {"terminal": terminal, "json": json_text}


def _size(value: float | None) -> str:
    return "-" if value is None else size_text(value)


def _usual(need: Need, axis: str) -> object:
    """What an engine takes where a recipe does not say; a dash if it has no such option."""
    return getattr(backend_named(need.backend).Options(), axis, "-")


def _fallback_words(need: Need) -> str:
    kinds: dict[str, int] = {}
    for name in need.fallbacks:
        kinds[re.sub(r"^blk\.\d+\.", "", name)] = kinds.get(re.sub(r"^blk\.\d+\.", "", name), 0) + 1
    listed = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in kinds.items())
    return f"{need.variant}: rows no multiple of 256, so another type for {listed}"
