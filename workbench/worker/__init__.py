"""All that runs beside an engine, in the engine's own interpreter.

Modules here import only the standard library and `workbench.records`/`workbench.errors` at top level; engines
and torch are imported inside the functions that need them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[float, float, str], Any]
"""What a worker is given to draw the parent's bar: done, total, and what is being done."""

Tensors = dict[str, "Tensor"]
"""Tensors by name."""
