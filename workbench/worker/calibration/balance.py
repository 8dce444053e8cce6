"""Channels that float16 does not hold, brought into its range where that changes nothing.

Checkpoints store scales and norms as float16, and kernels compute with them as such. Weights of a bfloat16 or float32
base may be far beyond: an up-projection of 1e-7 has scales that float16 rounds to zero, and the layer is gone, though
the down-projection that reads it is as large as it is small. What AWQ does for precision mends that too: divide what
produces a channel by a factor and multiply what reads it by the same, here by powers of two, so that no bit is lost.

Rejected: scales in bfloat16. vLLM takes them, but GPTQModel makes float16 of them, and our own kernels want that too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from workbench.worker.architectures import Group, Layer
from workbench.worker.methods.awq import fold

SMALLEST = 2.0**-14
"""The smallest normal float16."""
LARGEST = 65504.0
FELT = 0.01
"""A channel counts from this part of the mean channel's share in what reads it."""


def balanced(layer: Layer) -> Layer:
    """The layer itself, or the same function with groups in float16's range; the grams are of its own activations."""
    tensors, grams = dict(layer.tensors), dict(layer.grams)
    changed = _queries_and_keys(tensors, layer.architecture.family.head_norms)
    for group in layer.architecture.groups:
        scales = _scales(tensors, group)
        if scales is not None:
            fold(tensors, group, scales)
            first = group.linears[0]
            grams[first] = (grams[first] / scales[:, None]).div_(scales)
            changed = True
    return replace(layer, tensors=tensors, grams=grams, shared={}) if changed else layer


def _queries_and_keys(tensors: Any, normed: bool) -> bool:
    """Give queries and keys the same size where one is beyond float16; whether that was needed. Only their product
    counts, unless they are normed."""
    query, key = (tensors.get(f"self_attn.{name}.weight") for name in ("q_proj", "k_proj"))
    if normed or query is None or key is None:
        return False
    sizes = [float(each.abs().amax()) for each in (query, key)]
    if not min(sizes) or (min(sizes) >= 8 * SMALLEST and max(sizes) <= LARGEST):
        return False
    factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    for name, by in (("q_proj", factor), ("k_proj", 1 / factor)):
        for part in ("weight", "bias"):
            if f"self_attn.{name}.{part}" in tensors:
                tensors[f"self_attn.{name}.{part}"] = tensors[f"self_attn.{name}.{part}"] * by
    return True


def _scales(tensors: Any, group: Group) -> Any:
    """What to multiply each input channel of a group by, [in] powers of two; None where float16 will do."""
    import torch

    producer = group.producer
    columns = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in group.linears]).amax(0)
    made = tensors[f"{producer.module}.weight"].abs()
    if producer.kind == "norm":
        sizes = made + 1 if producer.one_plus else made
    else:
        rows = made.amax(1)[slice(*producer.rows) if producer.rows else slice(None)].view(-1, 1, producer.head_dim)
        sizes = rows.expand(-1, producer.repeats, -1).reshape(-1)
        # Heads that share a producing row share a factor.
        columns = columns.view(-1, producer.repeats, producer.head_dim).amax(1, keepdim=True)
        columns = columns.expand(-1, producer.repeats, -1).reshape(-1)
    felt = sizes * columns
    counts = felt > FELT * felt.mean()
    # Of 16 levels, eight on either side of zero.
    beyond = (sizes < SMALLEST) | (columns < 8 * SMALLEST) | (torch.maximum(sizes, columns) > LARGEST)
    if not bool((counts & beyond).any()):
        return None
    return torch.where(felt > 0, (sizes / columns).log2().div(2).round().exp2(), torch.ones_like(felt))
