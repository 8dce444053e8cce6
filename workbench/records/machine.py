"""Where and under what conditions a number was measured."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict

from workbench.records.limits import Count, Folder, Number, Seconds, Size


class Conditions(TypedDict, total=False):
    """What the machine did while a job ran (`machine/monitor.py`, `worker/measure/`); None where it cannot be read."""

    others_cores: Number | None
    """Others' work, in cores on average."""
    stolen_fraction: Number | None
    """Part of the processors' time that a hypervisor gave to others."""
    clock_hz: list[Number] | None
    """Lowest, median, highest in timed repeats."""
    throttled: bool | None
    gpu_clock_hz: list[Number] | None
    gpu_throttled: bool | None
    gpu_strangers: Count | None
    """Processes of others on the GPU, at the most."""
    gpu_untold: list[str]
    """What the driver did not tell of which GPU; only where there is something."""
    probe_s: list[Seconds]
    """A fixed piece of work before each repeat."""
    repeats_s: list[list[Number]]
    """When each repeat began and ended, by the machine's clock; for what the parent saw then, and in no row."""
    page_cache_before: Number | None
    """How much of the weight files was in the page cache."""
    environment: dict[str, str]
    """Variables that configure engines, as they were set for the whole program."""


@dataclass(frozen=True)
class Accelerator:
    """A GPU as rows name it."""

    name: str = ""
    memory_bytes: Count = 0


@dataclass(frozen=True)
class Machine:
    """Where a number was measured."""

    name: Folder = ""
    """The folder that its results go to: what `hardware` says. Older ones have six digits of a cache folder behind."""
    cpu: str = ""
    threads: Count = 0
    memory_bytes: Count = 0
    gpus: list[Accelerator] = field(default_factory=list)
    driver: str | None = None
    system: str = ""
    python: str = ""
    copy_bytes_per_s: Size | None = None
    """What its memory copies, read and written both counted."""
    installation: str = ""
    """Six hex digits of the cache folder; older rows have them at the end of `name`."""

    def is_of(self, installation: str) -> bool:
        """Whether this cache folder measured; another on the same hardware measures for itself."""
        return installation == (self.installation or self.name[-6:])

    @property
    def hardware(self) -> str:
        """GPUs, processor, cores, memory as a name: what makes two machines one. Empty where no processor is known."""
        return _hardware(tuple(gpu.name for gpu in self.gpus), self.cpu, self.threads, self.memory_bytes)


@functools.lru_cache(256)
def _hardware(gpus: tuple[str, ...], cpu: str, threads: int, memory_bytes: int) -> str:
    cards = [f"{count} {name}" if count > 1 else name for name, count in Counter(gpus).items()]
    # As memory is sold: what a kernel keeps of it differs from one to the next.
    gib = memory_bytes / 2**30
    step = max(1, 2 ** (int(gib).bit_length() - 4))
    words = " ".join([*cards, f"{cpu} {threads} cores {math.ceil(gib / step) * step} GiB"])
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:150] if cpu else ""
