"""How far the measuring is: a table that grows, in a log a line for each row, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial

from workbench.console import Show, seconds
from workbench.records import Row
from workbench.report.formats.terminal import so_far
from workbench.report.metrics import METRICS
from workbench.report.selection import Pair, pair_of
from workbench.report.table import build
from workbench.report.units import MIB

FIGURES = (
    ("perplexity", "perplexity {:.3f}", 1.0),
    ("kld_mean", "KLD {:.4f}", 1.0),
    ("prefill_tok_s", "prompt {:.1f} t/s", 1.0),
    ("decode_tok_s", "new {:.1f} t/s", 1.0),
    ("peak_vram_bytes", "{:.0f} MiB VRAM", MIB),
    ("peak_rss_bytes", "{:.0f} MiB", MIB),
)
"""What a row's line in a log has, as far as it was measured: metric, words, unit."""


class Outlook:
    """The jobs of a run, counted; a context manager that says what is kept when they are interrupted.

    `planned`: the rows that are to be measured; `engines`: what theirs are called, by pair (`engine_texts`).
    """

    def __init__(
        self,
        planned: Sequence[Row],
        engines: Mapping[Pair, str],
        show: Show,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._clock, self._started = show, clock, clock()
        self._engines = engines
        self._total, self._done, self._begun = len(planned), 0, 0
        self._variant = max((len(row.artifact.variant) for row in planned), default=0)
        self._backend = max((len(engines[pair_of(row)]) for row in planned), default=0)
        self._tell()

    def waiting(self, begun: int) -> None:
        """So many jobs have had a first round and wait for their next."""
        self._begun = begun
        self._tell()

    def ended(self, row: Row | None, begun: int, known: Sequence[Row]) -> None:
        """A job came to its end, by this run or (None) by another; what was measured is told: where something is drawn
        by the table of all rows that are `known`, else by a line."""
        self._done += 1
        self.waiting(begun)
        if row is not None and self._show.live:
            # Drawn at every frame, made once for each size of the terminal.
            self._show.table = lru_cache(1)(partial(so_far, build(known), row))
        elif row is not None and row.measurement is not None:
            found = [(METRICS[name].value(row), words, unit) for name, words, unit in FIGURES]
            figures = ", ".join(words.format(value / unit) for value, words, unit in found if value is not None)
            name = f"{row.artifact.variant:{self._variant}}  {self._engines[pair_of(row)]:{self._backend}}"
            self._show.say(f"{name}  {figures} ({self.words()})")

    def words(self) -> str:
        """`5 of 19 jobs, about 4 min left`."""
        # The first round of a job loads and scores; those that follow take about as long together.
        work = self._done + self._begun / 2
        left = self._total - work
        told = f"{self._done} of {self._total} jobs"
        if not work or not left:
            return told
        return f"{told}, about {seconds((self._clock() - self._started) * left / work)} left"

    def __enter__(self) -> Outlook:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._show.put_away(keep=kind is not None)
        if kind is KeyboardInterrupt and self._done < self._total:
            self._show.say(f"\n{self._done} of {self._total} jobs measured and stored; what had begun begins again")

    def _tell(self) -> None:
        self._show.whole = self.words() if self._done < self._total else ""
