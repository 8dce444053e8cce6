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

from workbench.worker.layers import Group, Layer, fold, made_by

SMALLEST = 2.0**-14
"""The smallest normal float16."""
LARGEST = 65504.0
FELT = 0.01
"""A channel counts from this part of the mean channel's share in what reads it."""


def balanced(layer: Layer) -> Layer:
    """The layer itself, or the same function with groups in float16's range; the grams are of its own activations, and
    nothing is known of its outputs any more."""
    tensors, grams = dict(layer.tensors), dict(layer.grams)
    changed = layer.structure.scores is not None and _queries_and_keys(tensors, *layer.structure.scores)
    for group in layer.structure.groups:
        scales = _scales(tensors, group)
        if scales is not None:
            fold(tensors, group, scales)
            first = group.linears[0]
            grams[first] = (grams[first] / scales[:, None]).div_(scales)
            changed = True
    return replace(layer, tensors=tensors, grams=grams, shared={}, outputs=None) if changed else layer


def _queries_and_keys(tensors: Any, query: str, key: str) -> bool:
    """Give queries and keys the same size where one is beyond float16; whether that was needed."""
    sizes = [float(tensors[f"{name}.weight"].abs().amax()) for name in (query, key)]
    if not min(sizes) or (min(sizes) >= 8 * SMALLEST and max(sizes) <= LARGEST):
        return False
    factor = 2.0 ** round(math.log2(sizes[1] / sizes[0]) / 2)
    for name, by in ((query, factor), (key, 1 / factor)):
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in tensors:
                tensors[part] = tensors[part] * by
    return True


def _scales(tensors: Any, group: Group) -> Any:
    """What to multiply each input channel of a group by, [in] powers of two; None where float16 will do."""
    import torch

    producer = group.producer
    if producer is None:
        return None
    columns = torch.stack([tensors[f"{name}.weight"].abs().amax(0) for name in group.linears]).amax(0)
    made = tensors[f"{producer.module}.weight"].abs()
    sizes = made_by(producer, made.amax(1) if producer.kind == "linear" else made + producer.one_plus)
    if producer.repeats > 1:
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
