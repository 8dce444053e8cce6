"""oneMKL's vector functions are called once by one thread before several call one for the first time.

torch computes `exp`, `sqrt`, `cos` and others of a contiguous tensor by oneMKL, a part in each thread. Before 2025.0
oneMKL chooses a function's implementation during its first call, and a second thread that comes meanwhile may compute
its part by one of lower accuracy (https://github.com/pytorch/pytorch/issues/188792). On a Xeon of two cores every third
process had other last digits in the first `exp` of its logits, so no quality could be reproduced to the last digit.

Rejected: one thread for all (slow), and a call where each number is made (the next one would be forgotten).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

FUNCTIONS = (
    *("abs", "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "sin", "sqrt", "tan"),
    *("tanh", "trunc"),
)
"""What torch leaves to oneMKL's vector functions (aten/src/ATen/cpu/vml.h)."""


def settle(torch: Any) -> None:
    """Call each function once on one number; takes 4 ms."""
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(number, name)()


def settle_when_torch_is_imported() -> None:
    """Have `settle` called as the last step of this process's `import torch`; at once where that has been."""
    if "torch" in sys.modules:
        settle(sys.modules["torch"])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch where Python does, and adds a step to its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        found = importlib.machinery.PathFinder.find_spec(name, path) if name == "torch" else None
        if found is not None and found.loader is not None:
            load = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                sys.meta_path.remove(self)
                settle(module)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found
