"""How a variant is made. A method is one module and one line here; the recipe's word is the key.

A method module has, readable by the parent without any engine: `Options` (a frozen dataclass: the recipe's
keys), `FORMAT`, `default_name(options)`, `needs_calibration(options)` and `limits(options)` (backend name ->
why that engine cannot load what these options make).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

METHODS = {
    "gguf": "workbench.worker.methods.gguf",
    "awq": "workbench.worker.methods.awq",
    "gptq": "workbench.worker.methods.gptq",
}


def group_sizes(columns: Iterable[int]) -> list[int]:
    """The usual group sizes that divide the inputs of all these layers."""
    common = math.gcd(*columns)
    return [size for size in (16, 32, 64, 128, 256, 512) if common % size == 0]
