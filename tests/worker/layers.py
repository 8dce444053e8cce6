"""A matrix to round and a decoder layer to quantize: random, with Grams as activations have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from workbench.worker.architectures import ARCHITECTURES, sizes_of
from workbench.worker.calibration.discover import structures_of
from workbench.worker.layers import Layer

torch = pytest.importorskip("torch")


def problem(inputs: int, outputs: int, seed: int, tokens: int = 300) -> tuple[Any, Any]:
    """Correlated inputs of very different sizes, as activations are: (weight [in, out], gram)."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=chance) * torch.logspace(-1.5, 0.5, inputs)
    x = torch.randn(tokens, inputs, generator=chance) @ mix
    return torch.randn(inputs, outputs, generator=chance), x.t() @ x / tokens


def half(values: Any) -> Any:
    """As float16 stores it, within its normal numbers."""
    return np.clip(values, 2.0**-14, 65504).astype(np.float16).astype(np.float64)


def layer_of(kind: str = "llama", seed: int = 0) -> Layer:
    """A random decoder layer of 64 channels, with biases, and Grams of inputs that differ in size a hundredfold."""
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (structure,) = structures_of(config | {"head_dim": 16})
    axes = sizes_of(config).axes
    chance = torch.Generator().manual_seed(seed)
    tensors, grams = {}, {}
    for name, linear in ARCHITECTURES[kind].linears.items():
        tensors[f"{name}.weight"] = torch.randn(axes[linear.rows], axes[linear.columns], generator=chance)
        tensors[f"{name}.bias"] = torch.randn(axes[linear.rows], generator=chance)
    for group in structure.groups:
        inputs = tensors[f"{group.linears[0]}.weight"].shape[1]
        sizes = torch.logspace(-1, 1, inputs)[torch.randperm(inputs, generator=chance)]
        x = torch.randn(400, inputs, generator=chance) * sizes
        grams[group.linears[0]] = x.t() @ x / 400
        if group.producer and group.producer.kind == "norm":
            tensors[f"{group.producer.module}.weight"] = torch.rand(inputs, generator=chance) + 0.5
    return Layer(0, tensors, grams, structure)
