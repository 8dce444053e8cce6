"""Scoring by what a server says of the token that comes next: a request a position, the whole vocabulary in each.

So nothing is estimated for a tail. That is a vocabulary of JSON a token, which bounds how much is asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from workbench.records import Quality
from workbench.worker.backends.served import NotScored
from workbench.worker.scoring.reducer import Scoring

if TYPE_CHECKING:
    import torch

MOST_VALUES = 250 * 10**6
"""Log-probabilities that a row asks for at the most: 100 bytes of JSON each, for all of them a quarter of an hour."""
LEAST = -104.0
"""Log-probability in the place of one that float32 has no number for."""
ROWS = 64
"""Positions that are reduced at once."""
PROBES, T_PROBES = 12, 2.2
"""Positions that are computed in two ways, and Student's t at 97.5 % with so many degrees of freedom."""
TOLD = 1e-3
"""A relative difference of perplexities that is worth a word."""
Post = Callable[[str, object], bytes]
Told = Iterable[tuple[int, float]]
"""Ids and log-probabilities."""


def score(asked: Scoring, progress: Callable[[int], object], whom: str, told: Callable[[list[int]], Told]) -> Quality:
    """Reduce what is `told` behind every scored prefix. Raises `NotScored` where that is too much to ask `whom` for."""
    import torch

    from workbench.worker.scoring.reducer import Reducer

    vocab_size = asked.tokens.vocab_size
    scored = sum(max(0, len(ids) - 1 - first) for _, ids, first in asked.windows)
    if scored * vocab_size > MOST_VALUES:
        raise NotScored(
            f"{scored:,} positions are too many to ask {whom} for, which tells all {vocab_size:,} log-probabilities of "
            "each: score fewer windows, or the file in its engine's own process"
        )
    reducer = Reducer(asked)
    for index, ids, first in asked.windows:
        progress(index)
        for start in range(first, len(ids) - 1, ROWS):
            places = range(start, min(start + ROWS, len(ids) - 1))
            reducer(index, start, torch.stack([row(told(ids[: place + 1]), vocab_size) for place in places]))
    return reducer.result()


def by_llama_server(asked: Scoring, progress: Callable[[int], object], post: Post) -> tuple[Quality, list[str]]:
    """What a llama-server's own requests say, and what is to be known of that. Raises as `score`."""
    from workbench.serving.native import likely_next, plain_token

    plain = plain_token(post)

    def told(prefix: list[int], whole: bool = False) -> Told:
        return [(each.id, each.logprob) for each in likely_next(post, prefix, plain, whole)]

    quality = score(asked, progress, "llama-server", told)
    return quality, _rounding(asked, quality, lambda prefix: told(prefix, True)) if asked.per_token else []


def _rounding(asked: Scoring, quality: Quality, anew: Callable[[list[int]], Told]) -> list[str]:
    """How far perplexity is from that of whole windows, if that can be told apart.

    llama.cpp rounds a quantized matrix's inputs to 8 bits. Sums that differ in their last bit round a few of them
    otherwise, and these many more in the layers that follow, so that a prefix computed token by token and the same
    prefix in one piece differ as two draws of that rounding do, in this server and in the engine's own process alike.
    How much is found by asking both of some positions: d, the root of their mean square difference in nats, makes a
    mean over n tokens uncertain by t d / sqrt(n).
    """
    places = [
        (index, place - first, ids[: place + 1], ids[place + 1])
        for index, ids, first in asked.windows
        for place in range(first, len(ids) - 1)
    ]
    squares = []
    for number in range(min(PROBES, len(places))):
        index, at, prefix, target = places[(2 * number + 1) * len(places) // (2 * PROBES)]
        loss = quality["windows"][index]["nll"][at]
        if isinstance(loss, float):
            squares.append((loss + max(LEAST, dict(anew(prefix)).get(target, LEAST))) ** 2)
    if not squares:
        return []
    bound = math.expm1(T_PROBES * math.sqrt(math.fsum(squares) / len(squares) / len(places)))
    if bound < TOLD:
        return []
    return [
        f"computed a token at a time: llama.cpp's rounding of inputs puts its perplexity within {bound:.1%} of that of "
        f"whole windows, by {len(squares)} positions computed both ways"
    ]


def row(told: Told, vocab_size: int) -> torch.Tensor:
    """[vocabulary] log-probabilities. Raises `RuntimeError` where some are missing."""
    import torch

    pairs = list(told)
    ids = [token for token, _ in pairs]
    found = torch.full((max(vocab_size, 1 + max(ids, default=0)),), -torch.inf)
    found[ids] = torch.tensor([max(LEAST, value) for _, value in pairs])
    if not torch.isfinite(found[:vocab_size]).all():
        raise RuntimeError(f"{len(ids)} log-probabilities of a vocabulary of {vocab_size}: not what was asked for")
    return found[:vocab_size]
