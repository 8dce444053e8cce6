"""The calibration tokens, checked against the base, in the order in which they are run.

Windows of equal length stand together: a batch holds windows of one length, and the sums do not depend on the
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.worker.calibration.weights import Weights
from workbench.worker.tokens.file import read_tokens

FEWEST_TOKENS = 128


@dataclass(frozen=True)
class Windows:
    """`ids`: int64, all windows one after another; `lengths` and `numbers` (in the file) of each."""

    ids: Any
    lengths: list[int]
    numbers: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def number_at(self, token: int) -> int:
        """Which window of the file a token of `ids` is in."""
        for number, length in zip(self.numbers, self.lengths, strict=True):
            token -= length
            if token < 0:
                return number
        return self.numbers[-1]

    def warnings(self, weights: Weights) -> list[str]:
        """What a user should know of a pass over these tokens."""
        if self.tokens >= weights.widest:
            return []
        return [
            f"{self.tokens} calibration tokens are fewer than the widest layer's {weights.widest} inputs: "
            "its Gram matrix is singular and the result leans on the damping; take more"
        ]

    def part(self, first: int, end: int) -> Windows:
        """Those from the `first` on, up to that at `end`."""
        begins, ends = sum(self.lengths[:first]), sum(self.lengths[:end])
        return Windows(self.ids[begins:ends], self.lengths[first:end], self.numbers[first:end])


def read_windows(path: Path, weights: Weights) -> Windows:
    """Read `{"windows": [[id, ...], ...]}`. Raises `UserError` for tokens that the base cannot be run on."""
    import torch

    vocab_size, most = weights.sizes.vocab_size, weights.config.get("max_position_embeddings")
    content = read_tokens(path).windows
    for number, window in enumerate(content):
        if not window:
            raise UserError(f"calibration window {number} is empty; take other calibration text")
        for token in window:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise UserError(
                    f"calibration window {number} holds token {token!r}, outside the vocabulary of "
                    f"{vocab_size}: the calibration was made with another model's tokenizer"
                )
    total = sum(len(window) for window in content)
    if total < FEWEST_TOKENS:
        raise UserError(
            f"the calibration has {total} tokens; at least {FEWEST_TOKENS} are needed and {32 * 512} are usual: "
            "raise `calibration.windows` or take longer text"
        )
    longest = max(len(window) for window in content)
    if isinstance(most, int) and longest > most:
        raise UserError(
            f"a calibration window has {longest} tokens and the model's context {most}: lower `calibration.window`"
        )
    numbers = sorted(range(len(content)), key=lambda number: len(content[number]))
    flat = torch.tensor([token for number in numbers for token in content[number]], dtype=torch.int64)
    return Windows(flat, [len(content[number]) for number in numbers], numbers)
