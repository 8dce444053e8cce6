"""What an interrupted run needs to go on: the next layer's number and input, and what was noted so far.

The hidden states of all tokens lie in two memory-mapped files that take turns as a layer's input and output, so the
input of the layer at work is whole whenever the run is stopped. The note is renamed into place after a layer's
tensors are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.disk import write_whole
from workbench.records import digest
from workbench.worker.calibration.device import name_of
from workbench.worker.calibration.layout import Checkpoint, reserve
from workbench.worker.calibration.weights import Weights
from workbench.worker.calibration.windows import Windows

CALIBRATE_VERSION = 1
"""Of the bytes this pass writes for given inputs. Raise it when they change: older half-done work is then not used."""


@dataclass
class Work:
    """`layer`: the next to do. `errors` and `warnings` are each variant's, by its name."""

    folder: Path
    key: str
    tokens: int
    width: int
    layer: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    mapped: dict[int, Any] = field(default_factory=dict)

    def hidden(self, layer: int) -> Any:
        """The input of a layer for all tokens, float32 [tokens, hidden], mapped; two files take turns."""
        import torch

        turn = layer % 2
        if turn not in self.mapped:
            flat = torch.from_file(
                str(self._file(turn)), shared=True, size=self.tokens * self.width, dtype=torch.float32
            )
            self.mapped[turn] = flat.view(self.tokens, self.width)
        return self.mapped[turn]

    def finished(self, layer: int) -> None:
        """Note that a layer is done and written; whoever is interrupted after this goes on with the next."""
        self.layer = layer + 1
        note = {
            "key": self.key,
            "layer": self.layer,
            "seconds": self.seconds,
            "errors": self.errors,
            "warnings": self.warnings,
        }
        write_whole(self.folder / "progress.json", json.dumps(note))

    def keep_importance(self, layer: int, grams: dict[str, Any]) -> None:
        """Store the diagonals of a layer's Gram matrices."""
        from safetensors.torch import save_file

        diagonals = {name: gram.diagonal().contiguous().cpu() for name, gram in grams.items()}
        save_file(diagonals, self.folder / f"importance-{layer:05d}.safetensors")

    def importance(self, layer: int) -> dict[str, Any]:
        """What `keep_importance` stored: first linear of a group -> float32 [in]."""
        from safetensors.torch import load_file

        return dict(load_file(self.folder / f"importance-{layer:05d}.safetensors"))

    def _file(self, turn: int) -> Path:
        return self.folder / f"hidden-{turn}.bin"

    def _note(self) -> dict[str, Any] | None:
        try:
            note = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note if note.get("key") == self.key else None


def open_work(
    folder: Path, key: str, windows: Windows, weights: Weights, checkpoints: Mapping[str, Checkpoint]
) -> Work:
    """Work noted in `folder` under this key with its files whole, or new work with its files laid out."""
    names = list(checkpoints)
    work = Work(folder, key, windows.tokens, int(weights.config["hidden_size"]))
    size = work.tokens * work.width * 4
    files = [work._file(turn) for turn in (0, 1)]
    note = work._note()
    whole = all(checkpoint.laid_out() for checkpoint in checkpoints.values())
    if note and whole and all(file.is_file() and file.stat().st_size == size for file in files):
        work.layer, work.seconds = note["layer"], note["seconds"]
        work.errors, work.warnings = note["errors"], note["warnings"]
        return work
    work.errors, work.warnings = {name: {} for name in names}, {name: [] for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "progress.json").unlink(missing_ok=True)
    for checkpoint in checkpoints.values():
        checkpoint.lay_out()
    for file in files:
        reserve(file, size)
    return work


def key_of(payload: dict[str, Any], weights: Weights, device: Any, precision: str) -> str:
    """Of everything that determines the bytes: work noted under another key is not gone on with."""
    import torch
    import transformers

    files = sorted(set(weights.files.values()))
    return digest(
        [
            CALIBRATE_VERSION,
            payload["tokens_digest"],
            weights.config,
            precision,
            name_of(device),
            torch.get_num_threads(),
            [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
            [[v["name"], v["method"], v["options"]] for v in payload["variants"]],
            payload["imatrix_out"] is not None,
            torch.__version__,
            transformers.__version__,
        ]
    )
