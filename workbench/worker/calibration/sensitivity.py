"""The pass that prices types: how far the model's output moves by what each type does to each matrix.

    hidden states, layer by layer -> gradient at the last (ends.py) -> backward, last layer to first (backward.py)
                                                                       -> prices of its matrices (ggml/prices.py)

It runs over whole windows of the calibration tokens, as many as prices need. A layer's prices are written when they
are known, and an interrupted pass goes on behind the last of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workbench.disk import disk_faults, need_room, write_whole
from workbench.errors import UserError
from workbench.records import Priced, PricesRequest, digest, from_json, to_json
from workbench.worker import Progress, Tensors
from workbench.worker.calibration.backward import Seen, States, backward, forward
from workbench.worker.calibration.device import choose_device, choose_precision, exact_products, name_of
from workbench.worker.calibration.ends import Head
from workbench.worker.calibration.walk import Walk
from workbench.worker.calibration.weights import Weights, open_weights, read_layer
from workbench.worker.calibration.windows import Windows, read_windows
from workbench.worker.ggml import imatrix, prices
from workbench.worker.ggml.blocks import round_trip
from workbench.worker.ggml.choice import types_for
from workbench.worker.ggml.names import tensor_names
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
class Note:
    """How far a pass is."""

    key: str
    back: int
    """Layers to go back through, and one for the output matrix, which comes first."""
    forward: int = 0
    """Layers whose output is written."""
    prices: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tensor, as GGUF files call it -> type -> nats a token."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""


def run(payload: object, progress: Progress) -> object:
    """Worker for a `PricesRequest`: the prices of all types of every matrix. Returns `Priced`.

    Raises `UserError` for a base that the pass does not take or whose gradients are not finite, and for tokens that it
    cannot be run on.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    request: PricesRequest = from_json(PricesRequest, payload)
    if request.threads:
        torch.set_num_threads(request.threads)
    exact_products()
    state = Path(request.state)
    state.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), disk_faults(state, "The finished layers are kept."):
        work = _Work(request, progress)
        for step in (work.forward, work.output, work.backward, work.embedding):
            step()
    return to_json(Priced(work.note.prices, work.windows.tokens, work.note.seconds))


class _Work:
    """A pass on its way."""

    def __init__(self, request: PricesRequest, progress: Progress) -> None:
        import torch

        self.progress, self.seed, state = progress, request.seed, Path(request.state)
        self.device = choose_device(request.device)
        self.precision = choose_precision(request.precision, self.device)
        self.weights = open_weights(Path(request.base))
        self.windows = _some(read_windows(Path(request.tokens), self.weights))
        self.names = tensor_names(self.weights.config, self.weights.matrices())
        self.means = imatrix.load(request.imatrix)
        self.states = States(state, self.windows.tokens, self.weights.sizes.hidden)
        self.file = state / "progress.json"
        self.note = _noted(self.file, _key(request, self.weights, self.device, self.precision), self.weights.layers)
        self.model = Walk(self.weights, self.windows, self.device)
        self.sample = torch.arange(0, self.windows.tokens, max(1, self.windows.tokens // PRICED_TOKENS))

    def forward(self) -> None:
        """The hidden states before every layer and after the last."""
        if not self.note.forward:
            need_room(self.file.parent, 4 * self.states.tokens * self.states.width * (self.weights.layers + 3))
            self.model.embed(self.states.hidden(0))
        for index in range(self.note.forward, self.weights.layers):
            with self._timed("forward", f"layer {index + 1} of {self.weights.layers}: forward pass"):
                layer = self.model.layer(index, read_layer(self.weights, index, self.device), self.precision)
                forward(self.model, index, layer, self.states, self.precision)
                self.model.release(index)
            self.note.forward = index + 1
            self._keep()

    def output(self) -> None:
        """The gradient after the last layer, and the output matrix's prices."""
        layers, tokens = self.weights.layers, self.windows.tokens
        if self.note.back <= layers:
            return
        head, chance = Head(self.weights, self.device), self._chance(layers)
        hidden, gradient = self.states.hidden(layers), self.states.gradient(layers)
        with self._timed("output", "output matrix"):
            for start in range(0, tokens, head.chunk):
                piece = slice(start, start + head.chunk)
                gradient[piece] = head.gradient(hidden[piece].to(self.device), chance).cpu()
            self._check(gradient, "after the last layer")
        with self._timed("prices", "prices of the output matrix"):
            some, types = hidden[:: max(1, tokens // HEAD_TOKENS)], types_for(head.columns, weighted=False)
            self.note.prices[OUTPUT] = prices.of_head(head, some.to(self.device), types, round_trip)
        self.note.back = layers
        self._keep()

    def backward(self) -> None:
        """The prices of every layer's matrices, from the last layer to the first."""
        for index in reversed(range(self.note.back)):
            where = f"layer {index + 1} of {self.weights.layers}"
            tensors = read_layer(self.weights, index, self.device)
            with self._timed("backward", f"{where}: backward pass"):
                layer = self.model.layer(index, tensors, self.precision).requires_grad_(False)
                seen = backward(self.model, self.weights, index, layer, self.states, self.sample, self.precision)
                self.model.release(index)
            with self._timed("prices", f"{where}: prices"):
                self._price(index, tensors, seen)
            self.note.back = index
            self._keep()

    def embedding(self) -> None:
        """The embedding's prices; where it is the output matrix too, both added."""
        import torch

        table = self.model.skeleton.model.get_input_embeddings()
        rows, embedded = table.weight.detach(), torch.empty(self.states.tokens, self.states.width)

        def embed(errors: Any) -> Any:
            table.weight = torch.nn.Parameter(errors, requires_grad=False)
            self.model.embed(embedded)
            return embedded

        with self._timed("prices", "prices of the embedding"):
            types = types_for(rows.shape[1], weighted=False)
            found = prices.of_embedding(rows, self.states.gradient(0), embed, types, round_trip)
        if self.weights.tied:
            output = self.note.prices.pop(OUTPUT)
            found = {kind: price + output[kind] for kind, price in found.items()}
        self.note.prices[EMBEDDING] = found

    def _price(self, index: int, tensors: Tensors, seen: Seen) -> None:
        """The prices of a layer's matrices."""
        chance, stacked = self._chance(index), Counter[str]()
        for group in self.weights.structures[index].groups:
            for name in group.linears:
                tensor, weight = self.names[f"{LAYERS}.{index}.{name}.weight"], tensors[f"{name}.weight"]
                means, place = self.means.get(tensor), stacked[tensor]
                importance = None if means is None else means.reshape(-1, weight.shape[1])[place]
                stacked[tensor] += 1
                if name not in seen.gradients:
                    continue  # An expert that no token is sent to.
                gradients, inputs = seen.gradients[name], seen.inputs[group.linears[0]]
                self._check(gradients, f"at {name} of layer {index}")
                types = types_for(weight.shape[1], importance is not None)
                found = prices.of_linear(weight, inputs, gradients, importance, types, round_trip, chance)
                # Of experts there is one tensor a layer; a token costs nothing in those that it is not sent to.
                share = len(inputs) / self.windows.tokens if group.routed else 1.0
                before = self.note.prices.get(tensor, {}) if place else {}
                self.note.prices[tensor] = {kind: before.get(kind, 0.0) + share * found[kind] for kind in found}

    def _chance(self, part: int) -> Any:
        """A generator for a layer, or for what follows the last: the same whether the pass was interrupted or not."""
        import torch

        return torch.Generator().manual_seed(self.seed * 2**20 + part)

    def _check(self, gradient: Any, where: str) -> None:
        import torch

        if not bool(torch.isfinite(gradient).all()):
            raise UserError(
                f"the gradient {where} is not finite: the base's weights are damaged, or overflow in {self.precision}. "
                "Fetch the base again, set `calibration: {precision: float32}`, or name a `type`"
            )

    def _keep(self) -> None:
        write_whole(self.file, json.dumps(asdict(self.note)))

    @contextlib.contextmanager
    def _timed(self, phase: str, words: str) -> Iterator[None]:
        layers, note = self.weights.layers, self.note
        done = note.forward + BACKWARD * (layers + 1 - note.back)
        self.progress(done, layers + BACKWARD * (layers + 1), words)
        begun = time.perf_counter()
        try:
            yield
        finally:
            note.seconds[phase] = note.seconds.get(phase, 0.0) + time.perf_counter() - begun


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


def _noted(file: Path, key: str, layers: int) -> Note:
    """What a pass with this key has done so far."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        note = Note(**json.loads(file.read_text(encoding="utf-8")))
        if note.key == key:
            return note
    return Note(key, layers + 1)


def _key(request: PricesRequest, weights: Weights, device: Any, precision: str) -> str:
    """A digest of all that determines the prices: what a pass with another key has done is not gone on with."""
    import torch
    import transformers

    where = [precision, name_of(device), torch.get_num_threads(), torch.__version__, transformers.__version__]
    return digest([request.tokens_digest, request.seed, weights.config, weights.stamps(), where])
