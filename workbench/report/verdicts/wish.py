"""What somebody wants of a variant and an engine: limits, and an order among what keeps them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from workbench.errors import UserError, check_known
from workbench.sizes import size_text

ORDERS = {
    "speed": ("speed", "quality", "memory", "size"),
    "quality": ("quality", "speed", "memory", "size"),
    "memory": ("memory", "quality", "speed", "size"),
    "size": ("size", "quality", "speed", "memory"),
}
"""What `--sort` may be, and what decides where it does not."""

FIRST = {
    "speed": "the fastest",
    "quality": "the best quality",
    "memory": "the least memory",
    "size": "the smallest on disk",
}
"""Each of `ORDERS` in words."""


@dataclass(frozen=True)
class Constraints:
    """Limits and an order that somebody set; None: no limit."""

    memory_bytes: float | None = None
    size_bytes: float | None = None
    max_perplexity: float | None = None
    """Perplexity relative to the base's on the same engine: 0.01 is 1 % worse."""
    max_perplexity_value: float | None = None
    """The perplexity itself."""
    max_kld: float | Mapping[str, float] | None = None
    """Mean divergence in nats a token: on the first evaluation set, or by set."""
    min_accuracy: float | Mapping[str, float] | None = None
    """Share of items answered rightly: at every task, or by task."""
    min_decode_tok_s: float | None = None
    min_prefill_tok_s: float | None = None
    min_served_tok_s: float | None = None
    """New tokens a second of requests that are served together."""
    batch: int | None = None
    """Sequences at once that speeds are of; None: the headline's."""
    context: int | None = None
    """Tokens of a sequence, prompt and answer, that speeds are of at the least; None: the headline's."""
    backend: str | None = None
    sort: str = "speed"

    def __post_init__(self) -> None:
        """Raises `UserError` for a limit that nothing measured can keep or break, and for an unknown order."""
        check_known("order", self.sort, ORDERS)
        limits = [field.name for field in fields(self) if field.name not in ("backend", "sort")]
        for name in limits:
            for _, each in named(getattr(self, name)):
                if not isinstance(each, int | float):
                    raise UserError(f"{name.removesuffix('_tok_s')} {each!r}: a limit is a number, as 0.6 for 60 %")
                if not 0 <= each < math.inf:
                    raise UserError(f"{name.removesuffix('_tok_s')} {each:g}: a limit is zero or more")

    def __str__(self) -> str:
        """The wish in words."""
        limits = [
            self.memory_bytes is not None and f"at most {size_text(self.memory_bytes)} of memory",
            self.size_bytes is not None and f"at most {size_text(self.size_bytes)} on disk",
            self.max_perplexity is not None
            and f"at most {100 * self.max_perplexity:g} % more perplexity than the base",
            _said("perplexity at most {:g}", self.max_perplexity_value),
            *(_said(f"divergence{_on(name)} at most {{:g}} nat", each) for name, each in named(self.max_kld)),
            *(_said(f"accuracy{_on(name)} at least {{:.0%}}", each) for name, each in named(self.min_accuracy)),
            _said("decode at least {:g} tok/s", self.min_decode_tok_s),
            _said("prefill at least {:g} tok/s", self.min_prefill_tok_s),
            _said("served at least {:g} tok/s", self.min_served_tok_s),
            _said("batch {}", self.batch),
            _said("{} tokens of context", self.context),
            self.backend and f"on {self.backend}",
        ]
        return f"{FIRST[self.sort]}{''.join(f', {each}' for each in limits if each)}"


def named(limit: float | Mapping[str, float] | None) -> Sequence[tuple[str, float]]:
    """A limit by the name of what it is of; without a name where it is a bare number."""
    return [] if limit is None else [*limit.items()] if isinstance(limit, Mapping) else [("", limit)]


def parse_share(text: str, option: str) -> tuple[float | None, float | None]:
    """`1%` as (0.01, None): more than the base's; `12.5` as (None, 12.5): the value itself."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if match is None:
        raise UserError(f"{option} {text}: write 1% (more than the base's) or the value itself, such as 12.5")
    return (float(match[1]) / 100, None) if match[2] else (None, float(match[1]))


def parse_named(texts: Iterable[str], option: str) -> dict[str, float]:
    """`0.1` as {"": 0.1}, and `code:0.1` as {"code": 0.1}; `60%` is 0.6. Raises `UserError` for anything else."""
    found = {}
    for text in texts:
        match = re.fullmatch(r"(?:(.+):)?\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(%?)\s*", text)
        if match is None:
            raise UserError(f"{option} {text}: a limit is zero or more, as 0.1, or NAME:0.1 for a set or task NAME")
        found[match[1] or ""] = float(match[2]) / (100 if match[3] else 1)
    return found


def _said(words: str, value: float | None) -> str | None:
    return None if value is None else words.format(value)


def _on(name: str) -> str:
    return f" on {name}" if name else ""
