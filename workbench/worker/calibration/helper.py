"""A process beside the pass: its share of the windows goes through every layer here, on a device of its own.

`python -P -m workbench.worker.calibration.helper STATE HEARS SAYS MEMORY` is begun and ended by `team.py`. STATE is the
pass's folder: in its files of hidden states each process reads and writes the rows of its own tokens. The others are
numbers of open files that it inherits: two pipes, with a line of JSON for each message, and memory that both sides see,
in which Gram matrices are handed over, one at a time. It ends when there is nobody any more to tell it anything.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench.errors import UserError, out_of_memory
from workbench.records import from_json
from workbench.worker.calibration.device import exact_products
from workbench.worker.calibration.gram import Grams
from workbench.worker.calibration.resume import Note, Work
from workbench.worker.calibration.walk import Walk, does_not_fit, forward
from workbench.worker.calibration.weights import open_weights, read_layer
from workbench.worker.calibration.windows import read_windows
from workbench.worker.layers import parts_of


@dataclass(frozen=True)
class Share:
    """What a process is to do of a pass."""

    base: str
    tokens: str
    """A token file."""
    device: str
    precision: str
    threads: int
    first: int
    """The first of its windows, in the order in which they are run."""
    end: int
    """The first that is not its own any more."""


class Line:
    """Messages to another process and from it, a line of JSON each, over two pipes."""

    def __init__(self, hears: int, says: int) -> None:
        self._hears, self._says = os.fdopen(hears), os.fdopen(says, "w")

    def say(self, message: object) -> None:
        """Raises `BrokenPipeError` if the other process has ended."""
        self._says.write(json.dumps(message) + "\n")
        self._says.flush()

    def hear(self) -> Any:
        """The next message. Raises `EOFError` if the other process has ended."""
        line = self._hears.readline()
        if not line.endswith("\n"):
            raise EOFError
        return json.loads(line)

    def close(self) -> None:
        """What could not be said is dropped."""
        for pipe in (self._hears, self._says):
            with contextlib.suppress(OSError):
                pipe.close()


def numbers_in(memory: int) -> Any:
    """An open file's memory as a flat float32 tensor, which every process that has the file sees."""
    import torch

    return torch.frombuffer(mmap.mmap(memory, os.fstat(memory).st_size), dtype=torch.float32)


def run(share: Share, state: Path, line: Line, memory: Any) -> None:
    """Push the share's windows through each layer that is named, and hand over their Gram matrices, until the other
    side ends. Raises as `forward` does, and `UserError` where the device's memory does not hold a layer."""
    import torch

    torch.set_num_threads(share.threads)
    exact_products()
    device, weights = torch.device(share.device), open_weights(Path(share.base))
    windows = read_windows(Path(share.tokens), weights)
    work = Work(state, windows.tokens, weights.sizes.hidden, Note("", {}, {}))
    tokens = slice(sum(windows.lengths[: share.first]), sum(windows.lengths[: share.end]))

    def hidden(layer: int) -> Any:
        return work.hidden(layer)[tokens]

    with torch.inference_mode():
        model = Walk(weights, windows.part(share.first, share.end), device)
        model.add_up = partial(_hand_over, line, memory)
        here, tensors = -1, dict[str, Any]()
        while True:
            index, number = line.hear()
            if index != here:
                here, tensors = index, read_layer(weights, index, device)
            part = parts_of(weights.structures[index], tensors)[number]
            try:
                forward(model, weights, index, part, tensors, hidden, share.precision, {}, lambda amount: None)
            except UserError:
                raise
            except Exception as error:
                if out_of_memory(error):
                    raise does_not_fit(index, device) from None
                raise


def _hand_over(line: Line, memory: Any, grams: Grams, names: Sequence[str]) -> None:
    """Give these inputs' matrices away, and learn how many tokens went into those of all processes together."""
    own = [name for name in names if name in grams.matrices]
    line.say({"has": {name: [grams.counts[name], len(grams.matrices[name])] for name in own}})
    for name in own:
        matrix = grams.matrices.pop(name)
        memory[: matrix.numel()].view_as(matrix).copy_(matrix)
        line.say({"ready": name})
        line.hear()
    grams.counts |= line.hear()


def main(state: str, hears: int, says: int, memory: int) -> None:
    """Do what the first message says; whatever goes wrong is told as `error`."""
    # Whoever interrupts the pass means the process that ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = Line(hears, says)
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            run(from_json(Share, line.hear()), Path(state), line, numbers_in(memory))
        except UserError as error:
            line.say({"error": str(error), "user": True})
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            traceback.print_exc()
            line.say({"error": f"{type(error).__name__}: {error}", "user": False})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
