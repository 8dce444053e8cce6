"""What another engine alone changes of a base's quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.records import Row
from workbench.report.quality import Noise
from workbench.report.selection import BASE, engine_texts, pair_of

ANOTHER_MODEL_NATS = 0.02
"""Mean divergence of the base from its own reference from which an engine is said to run another model: bfloat16 costs
up to 0.001 nats a token, a sliding window or a rope scaling that is left out 0.1 to 2."""


@dataclass(frozen=True)
class NoiseFloor:
    """How far one base differs between engines that saw the same tokens."""

    base: str
    backends: tuple[str, ...]
    low: float
    """Perplexity."""
    high: float
    divergences: tuple[tuple[str, float], ...]
    """(engine, with its options where bases on it differ in them; KLD mean from the base's reference in nats a token)
    where it was compared with one: what an engine's arithmetic and precision cost alone."""

    @property
    def spread(self) -> float:
        """The difference in perplexity that engines alone make."""
        return self.high - self.low

    @property
    def relative(self) -> float:
        """The spread as a fraction of the lowest."""
        return self.high / self.low - 1

    @property
    def noise(self) -> Noise:
        """Both spreads."""
        apart = [value for _, value in self.divergences]
        return Noise(self.spread, max(apart) - min(apart) if len(apart) > 1 else None)


def noise_floors(rows: Sequence[Row], values: Sequence[Mapping[str, float | None]]) -> tuple[NoiseFloor, ...]:
    """The noise floor of each base that two engines or more scored, from rows and their values. An engine that runs
    the base as another model says nothing of arithmetic, and is left out."""
    scores: dict[str, dict[str, list[float]]] = {}
    divergences: dict[str, list[tuple[str, float]]] = {}
    engines = engine_texts([row for row in rows if row.artifact.method == BASE])
    for row, own in zip(rows, values, strict=True):
        perplexity, divergence = own["perplexity"], own["kld_mean"]
        if row.artifact.method == BASE and perplexity is not None and (divergence or 0.0) <= ANOTHER_MODEL_NATS:
            scores.setdefault(row.base, {}).setdefault(row.backend, []).append(perplexity)
            if divergence is not None:
                divergences.setdefault(row.base, []).append((engines[pair_of(row)], divergence))
    floors = []
    for base, by_backend in scores.items():
        if len(by_backend) > 1:
            every = [value for scored in by_backend.values() for value in scored]
            found = tuple(divergences.get(base, ()))
            floors.append(NoiseFloor(base, tuple(by_backend), min(every), max(every), found))
    return tuple(floors)
