"""What an interrupted run needs to go on: the next layer's number and input, and what was noted so far.

The hidden states of all tokens lie in two memory-mapped files that take turns as a layer's input and output, so the
input of the layer at work is whole whenever the run is stopped. The note is renamed into place after a layer's
tensors are written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from workbench.disk import write_whole
from workbench.records import CalibrationRequest, digest
from workbench.worker import Tensors
from workbench.worker.calibration.device import name_of
from workbench.worker.calibration.layout import Checkpoint, reserve
from workbench.worker.calibration.weights import Weights
from workbench.worker.calibration.windows import Windows

CALIBRATE_VERSION = 2
"""Version of the bytes that this pass writes for given inputs. Raise it when they change: older half-done work is then
not used."""


@dataclass
class Note:
    """What is kept of a run beside its tensors; `errors` and `warnings` are each variant's, by its name."""

    key: str
    errors: dict[str, dict[str, float]]
    warnings: dict[str, list[str]]
    seconds: dict[str, float] = field(default_factory=dict)
    experts: dict[str, list[int]] = field(default_factory=dict)
    """Module with a layer's experts -> tokens that each of them saw."""
    layer: int = 0
    """The next to do."""


@dataclass
class Work:
    """A run's folder: its note, the hidden states of so many `tokens` of that `width`, the stored diagonals."""

    folder: Path
    tokens: int
    width: int
    note: Note
    mapped: Tensors = field(default_factory=dict)

    def hidden(self, layer: int) -> Any:
        """The input of a layer for all tokens, float32 [tokens, hidden], mapped; two files take turns."""
        import torch

        file = str(self.folder / f"hidden-{layer % 2}.bin")
        if file not in self.mapped:
            flat = torch.from_file(file, shared=True, size=self.tokens * self.width, dtype=torch.float32)
            self.mapped[file] = flat.view(self.tokens, self.width)
        return self.mapped[file]

    def finished(self, layer: int) -> None:
        """Note that a layer is done and written; whoever is interrupted after this goes on with the next."""
        self.note.layer = layer + 1
        write_whole(self.folder / "progress.json", json.dumps(asdict(self.note)))

    def keep_importance(self, layer: int, diagonals: Tensors) -> None:
        """Store the diagonals of a layer's Gram matrices."""
        from safetensors.torch import save_file

        save_file(diagonals, self.folder / f"importance-{layer:05d}.safetensors")

    def importance(self, layer: int) -> Tensors:
        """What `keep_importance` stored: first linear of a group -> float32 [in]."""
        from safetensors.torch import load_file

        return dict(load_file(self.folder / f"importance-{layer:05d}.safetensors"))


def open_work(
    folder: Path, key: str, windows: Windows, weights: Weights, checkpoints: Mapping[str, Checkpoint]
) -> Work:
    """Work noted in `folder` under this key with its files whole, or new work with its files laid out."""
    fresh = Note(key, errors={name: {} for name in checkpoints}, warnings={name: [] for name in checkpoints})
    work = Work(folder, windows.tokens, weights.sizes.hidden, fresh)
    size = work.tokens * work.width * 4
    files = [folder / f"hidden-{turn}.bin" for turn in (0, 1)]
    whole = all(checkpoint.laid_out() for checkpoint in checkpoints.values())
    if whole and all(file.is_file() and file.stat().st_size == size for file in files):
        with contextlib.suppress(OSError, ValueError, TypeError):
            note = Note(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
            if note.key == key:
                return replace(work, note=note)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").unlink(missing_ok=True)
    for checkpoint in checkpoints.values():
        checkpoint.lay_out()
    for file in files:
        reserve(file, size)
    return work


def boot() -> str:
    """What changes when the machine starts anew: after a power cut, what was written last need not be on the disk."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return ""


def key_of(request: CalibrationRequest, weights: Weights, devices: Sequence[Any], precision: str) -> str:
    """A digest of everything that determines the bytes: work noted under another key is not gone on with."""
    import torch
    import transformers

    return digest(
        [
            CALIBRATE_VERSION,
            request.tokens_digest,
            weights.config,
            precision,
            name_of(devices[0]),
            torch.get_num_threads(),
            weights.stamps(),
            [[each.name, each.method, each.options] for each in request.variants],
            boot(),
            request.imatrix_out is not None,
            *(["grams"] if request.grams_out else []),
            *([[name_of(device) for device in devices[1:]]] if devices[1:] else []),
            torch.__version__,
            transformers.__version__,
        ]
    )
