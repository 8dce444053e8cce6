"""Gradients of what the model says, at every layer: forward once, then backward, one layer in memory at a time.

    hidden states, layer by layer -> gradient at the last (ends.py) -> backward, last layer to first (backward.py)

An interrupted pass goes on behind the last layer that is done. What is made of a layer's gradients is a subclass's.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from workbench.disk import disk_faults, need_room, write_whole
from workbench.errors import UserError
from workbench.records import CalibrationRequest, PricesRequest, digest
from workbench.worker import Progress
from workbench.worker.calibration.backward import States, forward
from workbench.worker.calibration.device import exact_products, name_of
from workbench.worker.calibration.ends import Head
from workbench.worker.calibration.resume import boot
from workbench.worker.calibration.walk import Walk
from workbench.worker.calibration.weights import Weights, read_layer
from workbench.worker.calibration.windows import Windows


@dataclass
class Note:
    """How far a pass is."""

    key: str
    back: int
    """Layers to go back through, and one for what follows the last, which comes first."""
    forward: int = 0
    """Layers whose output is written."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By phase."""


N = TypeVar("N", bound=Note)


class GradientPass(Generic[N]):
    """A pass on its way, in a folder, with a note that begins as `fresh` or, where one with its key is there, as that.
    `cost`: a layer backward, in layers forward, for the progress bar."""

    def __init__(
        self,
        folder: Path,
        fresh: N,
        weights: Weights,
        windows: Windows,
        device: Any,
        precision: str,
        seed: int,
        progress: Progress,
        cost: float,
    ) -> None:
        self.progress, self.seed, self.cost = progress, seed, cost
        self.device, self.precision, self.weights, self.windows = device, precision, weights, windows
        self.states = States(folder, windows.tokens, weights.sizes.hidden)
        self.file = folder / "progress.json"
        self.note = _noted(self.file, fresh)
        if not self.states.whole(self.note.forward, self.note.back):
            self.note = fresh
        self.model = Walk(weights, windows, device)

    def forward(self) -> None:
        """The hidden states before every layer and after the last."""
        if not self.note.forward:
            need_room(self.file.parent, 4 * self.states.tokens * self.states.width * (self.weights.layers + 3))
            self.model.embed(self.states.hidden(0))
        for index in range(self.note.forward, self.weights.layers):
            with self.timed("forward", f"layer {index + 1} of {self.weights.layers}: forward pass"):
                layer = self.model.layer(index, read_layer(self.weights, index, self.device), self.precision)
                forward(self.model, index, layer, self.states, self.precision)
                self.model.release(index)
            self.note.forward = index + 1
            self.keep()

    def after_the_last(self, head: Head) -> None:
        """The gradient by the output of the last layer."""
        layers, tokens = self.weights.layers, self.windows.tokens
        chance = self.chance(layers)
        hidden, gradient = self.states.hidden(layers), self.states.gradient(layers)
        with self.timed("output", "output matrix"):
            for start in range(0, tokens, head.chunk):
                piece = slice(start, start + head.chunk)
                gradient[piece] = head.gradient(hidden[piece].to(self.device), chance).cpu()
            self.check(gradient, "after the last layer")

    def chance(self, part: int) -> Any:
        """A generator for a layer, or for what follows the last: the same whether the pass was interrupted or not."""
        import torch

        return torch.Generator().manual_seed(self.seed * 2**20 + part)

    def check(self, gradient: Any, where: str) -> None:
        """Raise `UserError` for a gradient that is not finite."""
        import torch

        if not bool(torch.isfinite(gradient).all()):
            raise UserError(
                f"the gradient {where} is not finite: the base's weights are damaged, or overflow in {self.precision}. "
                "Fetch the base again, set `calibration: {precision: float32}`, or do without: name a `type` (GGUF), "
                "leave `objective` out (AWQ, GPTQ)"
            )

    def keep(self) -> None:
        """Write the note: whoever is interrupted after this goes on from here."""
        write_whole(self.file, json.dumps(asdict(self.note)))

    @contextlib.contextmanager
    def timed(self, phase: str, words: str) -> Iterator[None]:
        """Count what runs inside under a phase, and show `words` meanwhile."""
        layers, note = self.weights.layers, self.note
        done = note.forward + self.cost * (layers + 1 - note.back)
        self.progress(done, layers + self.cost * (layers + 1), words)
        begun = time.perf_counter()
        try:
            yield
        finally:
            note.seconds[phase] = note.seconds.get(phase, 0.0) + time.perf_counter() - begun


def _noted(file: Path, fresh: N) -> N:
    """What a pass with this key has done so far."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        note = type(fresh)(**json.loads(file.read_text(encoding="utf-8")))
        if note.key == fresh.key:
            return note
    return fresh


@contextlib.contextmanager
def at_work(request: CalibrationRequest | PricesRequest) -> Iterator[None]:
    """Torch as a pass by gradients wants it, and the folder that it goes on from."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    if request.threads:
        torch.set_num_threads(request.threads)
    exact_products()
    state = Path(request.state)
    state.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), disk_faults(state, "The finished layers are kept."):
        yield


def key_of(asked: list[object], weights: Weights, device: Any, precision: str) -> str:
    """A digest of all that determines what comes of gradients: what a pass with another key did is not gone on with."""
    import torch
    import transformers

    where = [precision, name_of(device), torch.get_num_threads(), torch.__version__, transformers.__version__, boot()]
    return digest([*asked, weights.config, weights.stamps(), where])
