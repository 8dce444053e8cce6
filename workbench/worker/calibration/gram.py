"""G = mean(x x^T) of each distinct linear input of a decoder layer, in float32, while the layer runs.

Only the blocks on and above the diagonal are multiplied out; the lower ones are copied at the end, so that the
matrix is symmetric to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import UserError
from workbench.worker import Tensors
from workbench.worker.calibration.device import synchronize
from workbench.worker.calibration.windows import Windows
from workbench.worker.layers import Structure

GRAM_BLOCK = 256


@dataclass
class Grams:
    """The matrices of one layer as they grow: first linear of a group -> float32 [in, in]."""

    layer: int
    device: Any
    windows: Windows
    matrices: Tensors = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    """Tokens that went into each, or the sum of their weights."""
    weights: Any = None
    """Of each token [tokens], while not all count the same."""
    listening: frozenset[str] | None = None
    """The first linears of the groups that are listened to; all if None."""
    start: int = 0
    """The first token of the batch that is being run."""
    seconds: float = 0.0

    def watch(self, module: Any, structure: Structure) -> list[Any]:
        """Hooks on the layer's module that see each group's input; the caller removes them."""
        firsts = [group.linears[0] for group in structure.groups]
        return [module.get_submodule(name).register_forward_pre_hook(self._hook(name)) for name in firsts]

    def _hook(self, name: str) -> Callable[..., None]:
        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            if self.listening is not None and name not in self.listening:
                return
            begun = now(self.device)
            self._add(name, inputs[0])
            self.seconds += now(self.device) - begun

        return before

    def _add(self, name: str, inputs: Any) -> None:
        import torch

        x = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        if self.weights is not None:
            x = x * self.weights.sqrt()[:, None]
        if name not in self.matrices:
            self.matrices[name] = torch.zeros(x.shape[1], x.shape[1], device=self.device)
        accumulate(self.matrices[name], x)
        count = len(x) if self.weights is None else float(self.weights.sum())
        self.counts[name] = self.counts.get(name, 0) + count
        if not self._finite(name):
            bad = (~torch.isfinite(x).all(1)).nonzero()
            sample = self.windows.number_at(self.start + (int(bad[0]) if len(bad) else 0))
            raise self._refusal(name, f", first in calibration sample {sample}")

    def take(self, name: str, matrix: Any, count: float) -> None:
        """Add what another process has of an input, of so many tokens; `matrix` may change afterwards."""
        if name in self.matrices:
            self.matrices[name] += matrix.to(self.device)
        else:
            self.matrices[name] = matrix.to(self.device, copy=True)
        self.counts[name] = self.counts.get(name, 0) + count
        if not self._finite(name):
            raise self._refusal(name, " when it is summed up")

    def _finite(self, name: str) -> bool:
        return bool(self.matrices[name].diagonal().isfinite().all())

    def _refusal(self, name: str, where: str) -> UserError:
        return UserError(
            f"layer {self.layer}: the input of {name} is not finite{where}: the base's weights are damaged or "
            "overflow; fetch the base again, or take another"
        )

    def forget(self, names: frozenset[str]) -> None:
        """Begin these anew, and listen to nothing else from here on."""
        self.listening = names
        for name in names:
            self.matrices.pop(name, None)
            self.counts.pop(name, None)

    def finish(self) -> Tensors:
        """The means, symmetric; to be called once, after the last batch."""
        for name, matrix in self.matrices.items():
            mirror(matrix)
            matrix.div_(self.counts[name])
        return self.matrices


def now(device: Any) -> float:
    """Seconds, once the device has done what it was given."""
    synchronize(device)
    return time.perf_counter()


def accumulate(gram: Any, x: Any) -> None:
    """Add x^T x to the blocks on and above the diagonal; `x` [tokens, in], `gram` [in, in]."""
    size = gram.shape[0]
    step = max(GRAM_BLOCK, size // 8)
    for start in range(0, size, step):
        gram[start : start + step, start:].addmm_(x[:, start : start + step].t(), x[:, start:])


def mirror(gram: Any) -> None:
    """Copy the upper triangle onto the lower."""
    size = gram.shape[0]
    step = max(GRAM_BLOCK, size // 8)
    for start in range(0, size, step):
        stop = min(start + step, size)
        gram[stop:, start:stop] = gram[start:stop, stop:].t()
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).t())
