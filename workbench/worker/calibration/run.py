"""The one pass over the base: AWQ, GPTQ and the importance matrix from the same Gram matrices.

For each decoder layer: read its weights from the memory-mapped safetensors, push the hidden states of all
calibration tokens through transformers' own layer class, accumulate G = mean(x x^T) for each distinct linear input,
let every variant quantize the layer from it, write, free, go on. The base is read once whatever the number of
variants. What is in memory is a layer, its Grams and a batch of activations; the hidden states lie on the disk,
memory-mapped. Each step is a module of `calibration/`. Several devices share the tokens (`team.py`).

Rejected: the quantized layers' outputs as the next layer's inputs. It needs a pass for every variant and ties them
to each other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from workbench.disk import disk_faults
from workbench.errors import UserError, out_of_memory
from workbench.records import Calibrated, CalibrationRequest, from_json, to_json
from workbench.worker import Progress, Tensors
from workbench.worker.calibration.balance import balanced
from workbench.worker.calibration.device import (
    choose_devices,
    choose_precision,
    exact_products,
)
from workbench.worker.calibration.discover import told
from workbench.worker.calibration.layout import finish
from workbench.worker.calibration.resume import Work, key_of, open_work
from workbench.worker.calibration.team import team
from workbench.worker.calibration.variants import Variant, variants_of
from workbench.worker.calibration.walk import FEWEST_ROUTED, Walk, does_not_fit, forward
from workbench.worker.calibration.weights import Weights, open_weights, read_layer
from workbench.worker.calibration.windows import Windows, read_windows
from workbench.worker.ggml import grams as gram_files
from workbench.worker.ggml import imatrix, names
from workbench.worker.layers import LAYERS, Layer, Structure, parts_of


def run(payload: object, progress: Progress) -> object:
    """Worker for a `CalibrationRequest`: make all calibrated variants of a base in one pass. Returns `Calibrated`.

    A variant whose options do not fit this base is refused, and the others are made. Raises `UserError` for input that
    cannot be calibrated on, and where there is nothing left to make.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    request: CalibrationRequest = from_json(CalibrationRequest, payload)
    started = time.perf_counter()
    if request.threads:
        torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    exact_products()
    devices = choose_devices(request.device, request.devices)
    device = devices[0]
    precision = choose_precision(request.precision, device)
    weights = open_weights(Path(request.base))
    windows = read_windows(Path(request.tokens), weights)
    devices = devices[: len(windows.lengths)]
    variants, refused = variants_of(request.variants, weights)
    named, no_imatrix = _gguf_names(weights) if request.imatrix_out or request.grams_out else ({}, "")
    if (refused or no_imatrix) and not variants and not named:
        raise UserError("; ".join(filter(None, [*refused.values(), no_imatrix])))

    columns = names.file_columns(weights.config) if named else {}
    state = Path(request.state)
    with (
        torch.inference_mode(),
        disk_faults(state, "The finished layers are kept."),
        team(request, devices, precision, weights, windows) as others,
    ):
        model = Walk(weights, windows, device, others.own)
        model.add_up = others.add_up
        weights = model.proven(weights)
        checkpoints = {variant.name: variant.checkpoint for variant in variants}
        work = open_work(state, key_of(request, weights, devices, precision), windows, weights, checkpoints)
        note = work.note
        seconds = note.seconds
        if note.layer == 0:
            with _timed(seconds, "read"):
                model.embed(work.hidden(0))
        bar = _Bar(progress, weights.layers, variants, note.layer)
        for index in range(note.layer, weights.layers):
            with _timed(seconds, "read"):
                tensors = read_layer(weights, index, device)
            bar.text(f"layer {index + 1} of {weights.layers}: forward pass")
            structure, importance = weights.structures[index], dict[str, Any]()
            parts = parts_of(structure, tensors)
            for number, part in enumerate(parts):
                step = partial(_part_of_a_step, bar, len(parts))
                with others.at_work(index, number):
                    grams, counts = _forward(model, weights, index, part, tensors, work, precision, step)
                for name, seen in counts.items():
                    note.experts.setdefault(f"{LAYERS}.{index}.{name}", []).extend(seen)
                importance |= {name: gram.diagonal().contiguous().cpu() for name, gram in grams.items()}
                if request.grams_out and named and part is parts[0]:
                    with _timed(seconds, "write"):
                        _write_grams(Path(request.grams_out), index, part, grams, named, columns)
                layer = balanced(Layer(index, _tensors_of(part, parts, tensors), grams, part))
                for variant in variants:
                    bar.text(f"layer {index + 1} of {weights.layers}: {variant.name}")
                    with _timed(seconds, variant.name):
                        made = variant.quantize(layer, note.errors[variant.name], note.warnings[variant.name], device)
                    with _timed(seconds, "write"):
                        variant.write(index, made)
                    del made
                    step(variant.cost)
                del layer, grams
            if request.imatrix_out and named:
                work.keep_importance(index, importance)
            del tensors
            work.finished(index)
        with _timed(seconds, "write"):
            for variant in variants:
                finish(variant.checkpoint, weights, variant.method, variant.options)
            if request.imatrix_out and named:
                _write_imatrix(Path(request.imatrix_out), work, weights, named, columns, windows, request.tokens_digest)
    seconds["total"] = seconds.get("total", 0.0) + time.perf_counter() - started
    told_to_all = weights.warnings() + windows.warnings(weights) + _starved(note.experts)
    made_variants = {
        variant.name: variant.made(
            note.errors[variant.name], note.warnings[variant.name] + told_to_all, seconds.get(variant.name, 0.0)
        )
        for variant in variants
    }
    kinds = told(weights.structures)
    return to_json(Calibrated(seconds, made_variants, refused, no_imatrix, kinds, note.experts, len(devices)))


def _forward(
    model: Walk,
    weights: Weights,
    index: int,
    part: Structure,
    tensors: Tensors,
    work: Work,
    precision: str,
    step: Callable[[float], None],
) -> tuple[Tensors, dict[str, list[int]]]:
    """`forward`, or a `UserError` where the device's memory does not hold it."""
    try:
        return forward(model, weights, index, part, tensors, work.hidden, precision, work.note.seconds, step)
    except UserError:
        raise
    except Exception as error:
        if not out_of_memory(error):
            raise
    raise does_not_fit(index, model.device)


def _tensors_of(part: Structure, parts: list[Structure], tensors: Tensors) -> Tensors:
    """The tensors of a part's linear layers; with the first, those of no linear layer of any part."""
    own, all_of_them = set(part.linears), {name for each in parts for name in each.linears}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (stem := name.rpartition(".")[0]) in own or (part is parts[0] and stem not in all_of_them)
    }


def _part_of_a_step(bar: _Bar, parts: int, amount: float) -> None:
    bar.step(amount / parts)


def _gguf_names(weights: Weights) -> tuple[dict[str, str], str]:
    """The names in a GGUF file of all linear layers' weights, or why there are none."""
    try:
        return names.tensor_names(weights.config, weights.matrices()), ""
    except UserError as error:
        return {}, str(error)


def _in_the_file(found: Any, columns: Any) -> Any:
    """A diagonal [in] or a Gram matrix [in, in] in the order of a GGUF file's `columns` (None: the base's own)."""
    if columns is None:
        return found
    columns = columns.to(found.device)
    return found[columns] if found.dim() == 1 else found[columns][:, columns]


def _write_grams(
    out: Path, index: int, part: Structure, grams: Tensors, named: dict[str, str], columns: Tensors
) -> None:
    """Write a layer's Gram matrices but its experts', each for all tensors with that input, by their GGUF names and in
    the order of their columns there."""
    shared = {
        tuple(named[f"{LAYERS}.{index}.{name}.weight"] for name in group.linears): _in_the_file(
            grams[group.linears[0]], columns.get(group.linears[0])
        )
        for group in part.groups
        if not group.routed
    }
    gram_files.write(out, index, shared)


def _write_imatrix(
    out: Path, work: Work, weights: Weights, named: dict[str, str], columns: Tensors, windows: Windows, dataset: str
) -> None:
    """Write the importance matrix from the stored diagonals, by GGUF names and in the order of columns there."""
    import numpy as np

    rows: dict[str, list[Any]] = {}
    for index, structure in enumerate(weights.structures):
        diagonals = work.importance(index)
        for group in structure.groups:
            for name in group.linears:
                # Of experts there is one tensor a layer, in which they stand one after another.
                diagonal = _in_the_file(diagonals[group.linears[0]], columns.get(name))
                rows.setdefault(named[f"{LAYERS}.{index}.{name}.weight"], []).append(diagonal)
    means = {tensor: np.stack([row.numpy() for row in each]) for tensor, each in rows.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    count, longest = len(windows.lengths), max(windows.lengths)
    imatrix.write(out, means, tokens=windows.tokens, windows=count, window=longest, dataset=dataset)


def _starved(experts: dict[str, list[int]]) -> list[str]:
    """A warning of experts that were calibrated on tokens of others, the emptiest first."""
    found = [(n, f"{name}.{i}") for name, seen in experts.items() for i, n in enumerate(seen) if n < FEWEST_ROUTED]
    if not found:
        return []
    shown = ", ".join(f"{name} ({count})" for count, name in sorted(found)[:3])
    more = f" and {len(found) - 3} more" if found[3:] else ""
    return [
        f"{len(found)} of {sum(map(len, experts.values()))} experts saw fewer than {FEWEST_ROUTED} calibration tokens "
        f"and were calibrated on all of their layer's, weighted by the router: {shown}{more}. Take more text"
    ]


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begun


class _Bar:
    """Work done and to do, in forward passes of one layer; every layer costs the same."""

    def __init__(self, progress: Progress, layers: int, variants: list[Variant], done: int) -> None:
        self.progress = progress
        layer = 1.0 + sum(variant.cost for variant in variants)
        self.total, self.done, self.words = layers * layer, done * layer, ""

    def text(self, words: str) -> None:
        self.words = words
        self.progress(self.done, self.total, words)

    def step(self, amount: float) -> None:
        self.done += amount
        self.progress(self.done, self.total, self.words)
