"""The pass of variants whose objective is the output: what each linear layer's outputs do to what the model says.

    gradients at the outputs of a layer's matrices (gradients.py) -> matrices of inputs and of gradients -> the layer as
                                                                     every variant stores it

It goes through the layers backward, over all calibration tokens, and quantizes each when its gradients are known: in
memory are a layer, its matrices and a batch of activations. On the disk are the hidden states before every layer.

Rejected: the matrices kept on the disk for the pass that goes forward (`run.py`), some 50 GB for a model of 8B, beside
the hidden states that a pass backward needs either way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import UserError, out_of_memory
from workbench.records import Calibrated, CalibrationRequest, from_json, to_json
from workbench.worker import Progress, Tensors
from workbench.worker.calibration import gradients
from workbench.worker.calibration.backward import backward
from workbench.worker.calibration.balance import balanced
from workbench.worker.calibration.device import choose_device, choose_precision
from workbench.worker.calibration.discover import told
from workbench.worker.calibration.ends import Head
from workbench.worker.calibration.gradients import GradientPass, at_work, key_of
from workbench.worker.calibration.gram import accumulate, mirror
from workbench.worker.calibration.layout import finish
from workbench.worker.calibration.variants import variants_of
from workbench.worker.calibration.walk import does_not_fit
from workbench.worker.calibration.weights import open_weights, read_layer
from workbench.worker.calibration.windows import read_windows
from workbench.worker.layers import Layer, Outputs, Structure

RUN = 2048
"""Outputs whose gradients have a matrix together: 16 MiB."""
MINDED = 0.5
"""Of a matrix of inputs, the part in which tokens count by their gradients; the rest, in which all count the same, is
less noisy."""
BACKWARD = 6
"""A layer backward and quantized, in layers forward; only for the progress bar."""
VERSION = 1
"""Of the bytes that this pass writes for given inputs; raise it when they change."""


@dataclass
class Note(gradients.Note):
    """How far a pass is, and what its variants lost."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Sums:
    """The sums over tokens of a layer: by the first linear of a group x x^T, by linear |g|^2 x x^T and g g^T."""

    structure: Structure
    device: Any
    inputs: Tensors = field(default_factory=dict)
    minded: Tensors = field(default_factory=dict)
    gradients: Tensors = field(default_factory=dict)
    tokens: int = 0

    def heard(self, name: str, x: Any, gradient: Any, piece: slice) -> None:
        """Add a batch."""
        import torch

        x, gradient = x.float(), gradient.float()
        firsts = {group.linears[0] for group in self.structure.groups}
        if name in firsts:
            self._add(self.inputs, name, x)
        self._add(self.minded, name, x * gradient.square().mean(1).sqrt()[:, None])
        outputs = gradient.shape[1]
        length = min(RUN, outputs)
        runs = -(-outputs // length)
        if name not in self.gradients:
            self.gradients[name] = torch.zeros(runs, length, length, device=self.device)
        for run, matrix in enumerate(self.gradients[name]):
            some = gradient[:, run * length : (run + 1) * length]
            accumulate(matrix[: some.shape[1], : some.shape[1]], some)
        self.tokens += piece.stop - piece.start if name == self.structure.linears[0] else 0

    def _add(self, sums: Tensors, name: str, x: Any) -> None:
        import torch

        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1], device=self.device)
        accumulate(sums[name], x)

    def means(self) -> tuple[Tensors, Outputs]:
        """The Gram matrices by the first linear of a group, and what is known by linear; to be called once."""
        for sums in (self.inputs, self.minded):
            for matrix in sums.values():
                mirror(matrix)
        for runs in self.gradients.values():
            for matrix in runs:
                mirror(matrix)
            runs.div_(self.tokens)
        grams: Tensors = {}
        for group in self.structure.groups:
            plain = self.inputs.pop(group.linears[0]).div_(self.tokens)
            size = plain.diagonal().sum()
            for name in group.linears:
                minded = self.minded[name]
                own = minded.diagonal().sum()
                minded.mul_(MINDED * size / own if float(own) > 0 else 0.0)
                minded.add_(plain, alpha=1 - MINDED if float(own) > 0 else 1.0)
            mean = plain.zero_()
            for name in group.linears:
                mean.add_(self.minded[name], alpha=1 / len(group.linears))
            grams[group.linears[0]] = mean
        return grams, Outputs(self.minded, self.gradients)


class _Work(GradientPass[Note]):
    """A pass on its way."""

    def __init__(self, request: CalibrationRequest, progress: Progress) -> None:
        device = choose_device(request.device)
        precision, weights = choose_precision(request.precision, device), open_weights(Path(request.base))
        windows = read_windows(Path(request.tokens), weights)
        self.variants, self.refused = variants_of(request.variants, weights)
        if not self.variants:
            raise UserError("; ".join(self.refused.values()))
        if any(group.routed for structure in weights.structures for group in structure.groups):
            raise UserError(
                "`objective: output` takes no model with experts yet, which see a part of the tokens each: leave it out"
            )
        self.head = Head(weights, device)
        asked = [[each.name, each.method, each.options] for each in request.variants]
        key = key_of([request.tokens_digest, request.seed, VERSION, asked], weights, device, precision)
        names = [variant.name for variant in self.variants]
        fresh = Note(key, weights.layers + 1)
        fresh.errors, fresh.warnings = {name: {} for name in names}, {name: [] for name in names}
        state = Path(request.state)
        checkpoints = [variant.checkpoint for variant in self.variants]
        if not all(checkpoint.laid_out() for checkpoint in checkpoints):
            (state / "progress.json").unlink(missing_ok=True)
            for checkpoint in checkpoints:
                checkpoint.lay_out()
        super().__init__(state, fresh, weights, windows, device, precision, request.seed, progress, BACKWARD)

    def output(self) -> None:
        """The gradient after the last layer."""
        if self.note.back > self.weights.layers:
            self.after_the_last(self.head)
            self.note.back = self.weights.layers
            self.keep()

    def backward(self) -> None:
        """Every layer's matrices, and the layer as every variant stores it, from the last to the first."""
        self.weights = self.model.proven(self.weights)
        for index in reversed(range(self.note.back)):
            where = f"layer {index + 1} of {self.weights.layers}"
            tensors, structure = read_layer(self.weights, index, self.device), self.weights.structures[index]
            with self.timed("backward", f"{where}: backward pass"):
                grams, outputs = self._known(index, tensors, structure)
            ready = balanced(Layer(index, tensors, grams, structure, outputs=outputs))
            for variant in self.variants:
                with self.timed(variant.name, f"{where}: {variant.name}"):
                    warnings = self.note.warnings[variant.name]
                    if ready.outputs is None:
                        warnings.append(f"layer {index} is beyond float16's range: its outputs' errors were not minded")
                    made = variant.quantize(ready, self.note.errors[variant.name], warnings, self.device)
                    variant.write(index, made)
            self.note.back = index
            self.keep()

    def _known(self, index: int, tensors: Tensors, structure: Structure) -> tuple[Tensors, Outputs]:
        """A layer's matrices. Raises `UserError` where the device's memory does not hold them."""
        try:
            sums = _Sums(structure, self.device)
            layer = self.model.layer(index, tensors, self.precision).requires_grad_(False)
            backward(self.model, self.weights, index, layer, self.states, self.precision, sums.heard)
            self.model.release(index)
            self.check(self.states.gradient(index), f"at layer {index}")
            return sums.means()
        except UserError:
            raise
        except Exception as error:
            if not out_of_memory(error):
                raise
        raise does_not_fit(index, self.device)

    def finish(self) -> None:
        """Everything outside of layers."""
        with self.timed("write", "embeddings and configuration"):
            for variant in self.variants:
                finish(variant.checkpoint, self.weights, variant.method, variant.options)


def run(payload: object, progress: Progress) -> object:
    """Worker for a `CalibrationRequest` of variants with `objective: output`. Returns `Calibrated`.

    Raises `UserError` for a base that the pass does not take or whose gradients are not finite, and for tokens that it
    cannot be run on.
    """
    request: CalibrationRequest = from_json(CalibrationRequest, payload)
    started = time.perf_counter()
    with at_work(request):
        work = _Work(request, progress)
        for step in (work.forward, work.output, work.backward, work.finish):
            step()
    note, told_to_all = work.note, work.weights.warnings() + work.windows.warnings(work.weights)
    note.seconds["total"] = note.seconds.get("total", 0.0) + time.perf_counter() - started
    made = {
        variant.name: variant.made(
            note.errors[variant.name], note.warnings[variant.name] + told_to_all, note.seconds.get(variant.name, 0.0)
        )
        for variant in work.variants
    }
    return to_json(Calibrated(note.seconds, made, work.refused, "", told(work.weights.structures), {}, 1))
