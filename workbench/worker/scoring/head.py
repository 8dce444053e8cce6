"""Logits in float32 from an engine's own last hidden states.

In bfloat16 a logit between 16 and 32 has a step of 0.125, and rounding to that grid alone reads as a divergence of
4e-4 from the base: a third of all that 16-bit arithmetic does to a model, and no property of a variant. So what is
scored is the product of the engine's last hidden states with its own head, both as they are, summed and kept in
float32; the engine's head does the same sums and throws the digits away at the end. What the weights, the layers
and the hidden states lost stays in the numbers.

Rejected: an engine in float32 throughout (twice the memory, and another model than the one that is served), vLLM's
`head_dtype` override (on a processor it holds the whole head a second time in float32), correcting only the likeliest
ids (gathering their rows costs as much as the product).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_CHUNK_BYTES = 16 << 20
"""Bytes of the head in float32 at any moment, where it has to be converted."""


def product(hidden: Any, weight: Any, bias: Any = None) -> Any:
    """[..., h] and [vocabulary, h], both of 16 bits, to [..., vocabulary] in float32."""
    import torch

    rows = hidden.reshape(-1, hidden.shape[-1])
    if rows.is_cuda:
        logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:
        rows = rows.float()
        logits = torch.empty(len(rows), len(weight), dtype=torch.float32, device=rows.device)
        step = max(1, _CHUNK_BYTES // (4 * weight.shape[1]))
        for at in range(0, len(weight), step):
            torch.mm(rows, weight[at : at + step].float().t(), out=logits[:, at : at + step])
    if bias is not None:
        logits += bias.float()
    return logits.reshape(*hidden.shape[:-1], len(weight))


def fits(weight: Any) -> bool:
    """Whether a head's weight is one that `product` takes: a plain matrix of a 16-bit type, not packed away."""
    import torch

    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.dtype in (torch.bfloat16, torch.float16)
    )


def _wide(head: Any) -> Callable[[Any], Any] | None:
    """Of a head, hidden states [..., h] to logits [..., vocabulary] in float32; None for packed heads of others, and
    for those that compute in float32 anyway."""
    import torch

    if type(head) is torch.nn.Linear:
        return (lambda hidden: product(hidden, head.weight, head.bias)) if fits(head.weight) else None
    if type(head).__module__ == "workbench_kernels.modules":
        own = head.forward
        # These compute, and answer, in the type of what they are given.
        return lambda hidden: own(hidden.float())
    return None


@contextmanager
def in_float32(model: Any) -> Iterator[bool]:
    """While it lasts a transformers model's logits are float32; whether that was possible."""
    head = model.get_output_embeddings()
    wide = _wide(head)
    if wide is None:
        yield False
        return
    kept = head.__dict__.get("forward")
    head.forward = wide
    try:
        yield True
    finally:
        if kept is None:
            del head.forward
        else:
            head.forward = kept
