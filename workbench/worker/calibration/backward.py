"""Decoder layers forward, and then backward: what reaches each linear layer, and what the model makes of its output.

The hidden states before every layer lie on the disk, so a layer is run again with autograd when its turn comes, from
the last to the first, and in memory are one layer and its activations of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.worker import Tensors
from workbench.worker.calibration.layout import reserve
from workbench.worker.calibration.skeleton import output_of
from workbench.worker.calibration.walk import Walk, batches
from workbench.worker.calibration.weights import Weights

Heard = Callable[[str, Any, Any, slice], None]

KEPT = 8
"""Activations, each as wide as a layer's widest, that autograd keeps of one, about."""


@dataclass(frozen=True)
class States:
    """A folder with the hidden states before every layer and after the last, and with the gradients by two of them:
    float32 [tokens, width] each, mapped anew whenever asked for, so that what is resident does not grow."""

    folder: Path
    tokens: int
    width: int

    def hidden(self, layer: int) -> Any:
        """A layer's input."""
        return self._mapped(f"hidden-{layer:05d}.bin")

    def gradient(self, layer: int) -> Any:
        """The gradient of the losses by a layer's input; two files take turns."""
        return self._mapped(f"gradient-{layer % 2}.bin")

    def whole(self, forward: int, back: int) -> bool:
        """Whether what was written is there, of a pass that went through so many layers, and back to that one."""
        names = [f"hidden-{layer:05d}.bin" for layer in range(forward + 1)] if forward else []
        names += [f"gradient-{back % 2}.bin"] if back <= forward else []
        return all(self._there(self.folder / name) for name in names)

    def _there(self, file: Path) -> bool:
        return file.is_file() and file.stat().st_size == 4 * self.tokens * self.width

    def _mapped(self, name: str) -> Any:
        import torch

        size, file = self.tokens * self.width, self.folder / name
        if not self._there(file):
            reserve(file, size * 4)
        return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(self.tokens, self.width)


@dataclass(frozen=True)
class Seen:
    """Of a sample of tokens the inputs of a layer's groups, by their first linear, and the gradients at the outputs of
    its linears: float32 [tokens, in] and [tokens, out]. Of experts: of all tokens that are sent to them, if any are."""

    inputs: Tensors
    gradients: Tensors


def forward(model: Walk, index: int, layer: Any, states: States, precision: str) -> None:
    """Push all tokens through a layer: the input of the next is written."""
    import torch

    source, target = states.hidden(index), states.hidden(index + 1)
    with torch.no_grad():
        for piece, out in model.outputs(index, layer, source, precision):
            target[piece] = out.reshape(-1, out.shape[-1]).to(device="cpu", dtype=torch.float32)


def backward(
    model: Walk, weights: Weights, index: int, layer: Any, states: States, precision: str, heard: Heard
) -> None:
    """Pull the gradients through a layer, batch by batch: those by its input are written, and `heard` is told of each
    linear layer what came into it and the gradient by what went out, [tokens, in] and [tokens, out] (of experts: of the
    tokens that are sent to them), and which of all tokens the batch has."""
    import torch

    came: Tensors = {}
    went: Tensors = {}

    def listen(name: str) -> Any:
        def notice(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            came[name], went[name] = arguments[0].detach(), output

        return layer.get_submodule(name).register_forward_hook(notice)

    hooks = [listen(name) for name in weights.structures[index].linears]
    source, after, before = states.hidden(index), states.gradient(index + 1), states.gradient(index)
    try:
        for start, count, length in batches(model.windows.lengths, KEPT * max(weights.widest, states.width)):
            piece = slice(start, start + count * length)
            with torch.enable_grad(), model.autocast(precision):
                x = source[piece].to(model.device).view(count, length, -1).requires_grad_()
                out = output_of(layer, x, model.calls[length][index])
            given = after[piece].to(model.device).view(out.shape).to(out.dtype)
            by_x, *by_outputs = torch.autograd.grad(out, [x, *went.values()], given)
            before[piece] = by_x.reshape(count * length, -1).to(device="cpu", dtype=torch.float32)
            for name, found in zip(went, by_outputs, strict=True):
                x = came[name]
                heard(name, x.reshape(-1, x.shape[-1]), found.reshape(-1, found.shape[-1]), piece)
            came.clear()
            went.clear()
    finally:
        for hook in hooks:
            hook.remove()


def sampled(model: Walk, weights: Weights, index: int, layer: Any, states: States, sample: Any, precision: str) -> Seen:
    """`backward`, and what it told of a sample. `sample`: numbers of tokens, ascending."""
    structure = weights.structures[index]
    inputs: dict[str, list[Any]] = {group.linears[0]: [] for group in structure.groups}
    gradients: dict[str, list[Any]] = {name: [] for name in structure.linears}
    routed = {name for group in structure.groups if group.routed for name in group.linears}

    def heard(name: str, x: Any, gradient: Any, piece: slice) -> None:
        rows = (sample[(sample >= piece.start) & (sample < piece.stop)] - piece.start).to(model.device)
        some = slice(None) if name in routed else rows
        gradients[name].append(gradient[some].float())
        if name in inputs:
            inputs[name].append(x[some].float())

    backward(model, weights, index, layer, states, precision, heard)
    return Seen(_joined(inputs), _joined(gradients))


def _joined(parts: dict[str, list[Any]]) -> Tensors:
    import torch

    return {name: torch.cat(found) for name, found in parts.items() if found}
