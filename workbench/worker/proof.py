"""Whether two engines compute one function: their logits on the same few tokens, compared.

Two readers of one file can differ without an error (a bias left out, a rope scaled), and a number made of it looks
like any other. KL divergence over the whole vocabulary sees each of these; a few dozen tokens are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SAME_WEIGHTS_NATS = 1e-5
"""Limit where both compute in float32 with the same weights: sums in another order leave 1e-8 or less, and the smallest
slip that was ever found (a rope scaled by 8 in one layer of six, on 128 tokens) 1e-4."""

ROUNDED_NATS = 0.05
"""Limit where an engine rounds what it multiplies quantized or 16-bit weights by, as llama.cpp does to eight bits: that
leaves 0.005 of random models of 2 to 62 layers and 0.007 of SmolLM2 135M in Q4_1; the slips that were found (biases,
rotations, scales, experts) 0.19 and more."""

COARSE_NATS = 0.5
"""Limit where every key and tensor was compared before, and the model may be one that two bits have left little of,
which enlarges any rounding: bfloat16 in vLLM against eight bits in llama.cpp leaves 0.21 of SmolLM2 135M in Q2_K
(perplexity 212) and at most 0.05 in other types; rows of queries and keys in another order make 3."""

TOKENS = 64
"""Tokens compared: past the first few a position's rotation counts, and an 8B takes seconds on a processor."""


@dataclass(frozen=True)
class Proof:
    """`kld_nats`: mean over so many `positions` of KL(first || second); `limit_nats`: what it may be."""

    kld_nats: float
    limit_nats: float
    positions: int

    @property
    def same(self) -> bool:
        """Whether it is one function; a divergence that is not a number is not."""
        return self.kld_nats <= self.limit_nats

    @property
    def words(self) -> str:
        """What a refusal says of it."""
        found = f"KL divergence {self.kld_nats:.2g} nats on {self.positions} tokens"
        return f"({found}, at most {self.limit_nats:g} by rounding)"


def compare(first: Any, second: Any, limit_nats: float) -> Proof:
    """The proof of two arrays of logits, each [positions, vocabulary] of the same ids (numpy or torch, any float type).

    Vocabularies may be padded: only the ids that both have count. Raises `ValueError` for other numbers of positions.
    """
    import torch

    logits = [torch.as_tensor(array).detach().to("cpu", torch.float64) for array in (first, second)]
    if len(logits[0]) != len(logits[1]):
        raise ValueError(f"logits of {len(logits[0])} and of {len(logits[1])} positions")
    shared = min(array.shape[-1] for array in logits)
    p, q = (torch.log_softmax(array[:, :shared], -1) for array in logits)
    return Proof(float((p.exp() * (p - q)).sum(-1).mean()), limit_nats, len(p))


def ids_for(model: Any, count: int = TOKENS) -> list[int]:
    """At most `count` ids to compare a model of transformers on, as many as its context has."""
    return ids_over(model.config.vocab_size, min(count, model.config.max_position_embeddings))


def logits_of(model: Any, ids: list[int]) -> Any:
    """What a model of transformers makes of them: [ids, vocabulary]."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def ids_over(vocabulary: int, count: int = TOKENS) -> list[int]:
    """`count` ids spread over a vocabulary of that size, in no order: by the golden ratio, the same everywhere."""
    return [int(vocabulary * (0.5 + place * 0.6180339887498949) % vocabulary) for place in range(count)]
