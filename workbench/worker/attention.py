"""Which attention computes all that a model asks for."""

from __future__ import annotations

from typing import Any


def caps_scores(config: Any) -> bool:
    """Whether a transformers configuration caps the scores of attention, c tanh(score / c), as Gemma 2 does.

    PyTorch's fused attention (`sdpa`) has no such step, and transformers takes it for such models too, without a word:
    another model, by some thousandths of its logits. The plain attention (`eager`) has it.
    """
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))
