"""The checkpoints that a pass makes: which can be, and a layer of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError, unknown
from workbench.records import CheckpointRequest, MadeVariant
from workbench.worker import Tensors
from workbench.worker.calibration.device import synchronize, with_cpu_fallback
from workbench.worker.calibration.layout import Checkpoint, check_shapes, layout_of
from workbench.worker.calibration.weights import Weights
from workbench.worker.layers import LAYERS, Layer, on_cpu
from workbench.worker.methods import METHODS, CalibratedMethod, method_named

LOST_SHARE = 0.2
"""Part of its output's power from which a linear layer is said to be lost. Four bits lose 0.01, two bits 0.1."""


@dataclass(frozen=True)
class Variant:
    """One thing to make: a method, its options, where the result goes and what each tensor of the base becomes."""

    name: str
    method: CalibratedMethod
    options: Any
    checkpoint: Checkpoint
    tensor_types: dict[str, str]

    @property
    def cost(self) -> float:
        """Its share of a layer's time, the forward pass and Grams being 1; only for the progress bar."""
        return 0.8 if getattr(self.options, "rounding", "nearest") == "compensated" else 0.5

    def quantize(self, layer: Layer, errors: dict[str, float], warnings: list[str], device: Any) -> Tensors:
        """A layer's tensors as they are stored; errors by the base's names and warnings are added to those given."""
        (made, found, told), moved = with_cpu_fallback(
            lambda: self.method.quantize(layer, self.options),
            lambda: self.method.quantize(on_cpu(layer), self.options),
            device,
        )
        synchronize(device)
        if moved:
            told = [*told, f"layer {layer.index} was quantized in host memory: {device} does not hold it"]
        errors |= {f"{LAYERS}.{layer.index}.{name}": value for name, value in found.items()}
        warnings += told
        return dict(made)

    def made(self, errors: dict[str, float], warnings: list[str], taken_s: float) -> MadeVariant:
        """What there is to say of it once it is whole."""
        return MadeVariant(self.tensor_types, tensor_errors=errors, warnings=warnings + _lost(errors), seconds=taken_s)

    def write(self, index: int, made: Tensors) -> None:
        """Write a layer's tensors to their places."""
        for name, tensor in made.items():
            self.checkpoint.write(f"{LAYERS}.{index}.{name}", tensor)


def variants_of(requests: list[CheckpointRequest], weights: Weights) -> tuple[list[Variant], dict[str, str]]:
    """What can be made, and the reasons of what cannot."""
    made, refused = [], {}
    for request in requests:
        try:
            made.append(_variant(request, weights))
        except UserError as error:
            refused[request.name] = str(error)
    return made, refused


def _variant(request: CheckpointRequest, weights: Weights) -> Variant:
    name = request.name
    known = {word: method for word in METHODS if isinstance(method := method_named(word), CalibratedMethod)}
    if request.method not in known:
        raise unknown("method", request.method, known, name)
    method = known[request.method]
    options = method.Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in request.options.items()})
    method.check(options)
    if method.making(options, cuda=False).stage != "pass":
        raise UserError(f"{name}: `engine: {options.engine}` does not take part in the calibration pass")
    check_shapes(weights, name, method, options)
    layout, types = layout_of(weights, method, options)
    return Variant(name, method, options, Checkpoint(Path(request.out), layout), types)


def _lost(errors: dict[str, float]) -> list[str]:
    """A warning of linear layers of which hardly anything is left, the worst first."""
    lost = sorted((name for name, error in errors.items() if error > LOST_SHARE), key=lambda name: -errors[name])
    if not lost:
        return []
    shown = ", ".join(f"{name.removesuffix('.weight')} ({min(errors[name], 1):.0%})" for name in lost[:3])
    more = f" and {len(lost) - 3} more" if lost[3:] else ""
    return [
        f"{len(lost)} of {len(errors)} linear layers lose more than {LOST_SHARE:.0%} of their output: {shown}{more}. "
        "Take more bits, smaller groups or another method"
    ]
