"""The pass that prices types: how far the model's output moves by what each type does to each matrix.

    gradients at the outputs of a layer's matrices (gradients.py) -> prices of its matrices (ggml/prices.py)

It runs over whole windows of the calibration tokens, as many as prices need. A layer's prices are written when they
are known, and an interrupted pass goes on behind the last of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.records import Priced, PricesRequest, from_json, to_json
from workbench.worker import Progress, Tensors
from workbench.worker.calibration import gradients
from workbench.worker.calibration.backward import Seen, sampled
from workbench.worker.calibration.device import choose_device, choose_precision
from workbench.worker.calibration.ends import Head
from workbench.worker.calibration.gradients import GradientPass, at_work, key_of
from workbench.worker.calibration.weights import open_weights, read_layer
from workbench.worker.calibration.windows import Windows, read_windows
from workbench.worker.ggml import imatrix, prices
from workbench.worker.ggml.blocks import round_trip
from workbench.worker.ggml.choice import types_for
from workbench.worker.ggml.names import file_columns, tensor_names
from workbench.worker.layers import LAYERS

RUN_TOKENS = 3072
"""Tokens that gradients are taken of: whole windows, evenly spread, one at least."""
PRICED_TOKENS = 1536
"""Tokens, evenly spread over those, that matrices of layers are priced by."""
HEAD_TOKENS = 256
"""The same of the output matrix, of which no token is drawn but all are looked at."""
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


BACKWARD = 5
"""A layer backward with its prices, in layers forward; only for the progress bar."""


@dataclass
class Note(gradients.Note):
    """How far a pass is, and its prices."""

    prices: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tensor, as GGUF files call it -> type -> nats a token."""


def run(payload: object, progress: Progress) -> object:
    """Worker for a `PricesRequest`: the prices of all types of every matrix. Returns `Priced`.

    Raises `UserError` for a base that the pass does not take or whose gradients are not finite, and for tokens that it
    cannot be run on.
    """
    request: PricesRequest = from_json(PricesRequest, payload)
    with at_work(request):
        work = _Work(request, progress)
        for step in (work.forward, work.output, work.backward, work.embedding):
            step()
    return to_json(Priced(work.note.prices, work.windows.tokens, work.note.seconds))


class _Work(GradientPass[Note]):
    """A pass on its way."""

    def __init__(self, request: PricesRequest, progress: Progress) -> None:
        import torch

        device = choose_device(request.device)
        precision, weights = choose_precision(request.precision, device), open_weights(Path(request.base))
        windows = _some(read_windows(Path(request.tokens), weights))
        key = key_of([request.tokens_digest, request.seed], weights, device, precision)
        fresh = Note(key, weights.layers + 1)
        super().__init__(
            Path(request.state), fresh, weights, windows, device, precision, request.seed, progress, BACKWARD
        )
        self.names = tensor_names(weights.config, weights.matrices())
        self.means = imatrix.load(request.imatrix)
        self.columns = file_columns(weights.config)
        self.sample = torch.arange(0, windows.tokens, max(1, windows.tokens // PRICED_TOKENS))

    def output(self) -> None:
        """The gradient after the last layer, and the output matrix's prices."""
        layers, tokens = self.weights.layers, self.windows.tokens
        if self.note.back <= layers:
            return
        head = Head(self.weights, self.device)
        self.after_the_last(head)
        hidden = self.states.hidden(layers)
        with self.timed("prices", "prices of the output matrix"):
            some, types = hidden[:: max(1, tokens // HEAD_TOKENS)], types_for(head.columns, weighted=False)
            self.note.prices[OUTPUT] = prices.of_head(head, some.to(self.device), types, round_trip)
        self.note.back = layers
        self.keep()

    def backward(self) -> None:
        """The prices of every layer's matrices, from the last layer to the first."""
        for index in reversed(range(self.note.back)):
            where = f"layer {index + 1} of {self.weights.layers}"
            tensors = read_layer(self.weights, index, self.device)
            with self.timed("backward", f"{where}: backward pass"):
                layer = self.model.layer(index, tensors, self.precision).requires_grad_(False)
                seen = sampled(self.model, self.weights, index, layer, self.states, self.sample, self.precision)
                self.model.release(index)
            with self.timed("prices", f"{where}: prices"):
                self._price(index, tensors, seen)
            self.note.back = index
            self.keep()

    def embedding(self) -> None:
        """The embedding's prices; where it is the output matrix too, both added."""
        import torch

        table = self.model.skeleton.model.get_input_embeddings()
        rows, embedded = table.weight.detach(), torch.empty(self.states.tokens, self.states.width)

        def embed(errors: Any) -> Any:
            table.weight = torch.nn.Parameter(errors, requires_grad=False)
            self.model.embed(embedded)
            return embedded

        with self.timed("prices", "prices of the embedding"):
            types = types_for(rows.shape[1], weighted=False)
            found = prices.of_embedding(rows, self.states.gradient(0), embed, types, round_trip)
        if self.weights.tied:
            output = self.note.prices.pop(OUTPUT)
            found = {kind: price + output[kind] for kind, price in found.items()}
        self.note.prices[EMBEDDING] = found

    def _price(self, index: int, tensors: Tensors, seen: Seen) -> None:
        """The prices of a layer's matrices."""
        chance, stacked = self.chance(index), Counter[str]()
        for group in self.weights.structures[index].groups:
            for name in group.linears:
                tensor, weight = self.names[f"{LAYERS}.{index}.{name}.weight"], tensors[f"{name}.weight"]
                means, place = self.means.get(tensor), stacked[tensor]
                importance = None if means is None else means.reshape(-1, weight.shape[1])[place]
                if importance is not None and name in self.columns:
                    importance = importance[self.columns[name].argsort().numpy()]
                stacked[tensor] += 1
                if name not in seen.gradients:
                    continue  # An expert that no token is sent to.
                gradients, inputs = seen.gradients[name], seen.inputs[group.linears[0]]
                self.check(gradients, f"at {name} of layer {index}")
                types = types_for(weight.shape[1], importance is not None)
                found = prices.of_linear(weight, inputs, gradients, importance, types, round_trip, chance)
                # Of experts there is one tensor a layer; a token costs nothing in those that it is not sent to.
                share = len(inputs) / self.windows.tokens if group.routed else 1.0
                before = self.note.prices.get(tensor, {}) if place else {}
                self.note.prices[tensor] = {kind: before.get(kind, 0.0) + share * found[kind] for kind in found}


def _some(windows: Windows) -> Windows:
    """Whole windows, evenly spread, of `RUN_TOKENS` together at the most; or one."""
    import torch

    count = len(windows.lengths)
    parts = torch.split(windows.ids, windows.lengths)
    for step in range(1, count + 1):
        chosen = range(0, count, step)
        if sum(windows.lengths[number] for number in chosen) <= RUN_TOKENS:
            break
    return Windows(
        torch.cat([parts[number] for number in chosen]),
        [windows.lengths[number] for number in chosen],
        [windows.numbers[number] for number in chosen],
    )
