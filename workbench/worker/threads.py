"""How many threads torch takes for loops of small steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

ALONE = 2**23
"""A matrix of fewer weights is worked on column by column by one thread. Its steps are so short that several threads
mostly wait for one another: where other programs kept both cores busy, two took 7 to 35 times as long as one at 2**20
and 2**21 weights."""


@contextmanager
def fit_for(weights: int) -> Iterator[None]:
    """Inside, torch takes one thread if a matrix has too few weights for more."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if weights >= ALONE else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
