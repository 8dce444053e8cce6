"""What numbers and names in records may be: finite, of a size that arithmetic on them stays finite, and printable.

Where msgspec is, `from_json` holds records to them (`codec.py`). An engine's own interpreter may be without it: that is
given only what the parent has checked.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

try:
    limit: Any = importlib.import_module("msgspec").Meta
except ImportError:
    limit = lambda **limits: tuple(limits.items())  # noqa: E731

Whole = Annotated[int, limit(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, limit(ge=0, le=10**18)]
Positive = Annotated[int, limit(ge=1, le=10**18)]
Number = Annotated[float, limit(ge=-1e18, le=1e18)]
Size = Annotated[float, limit(ge=0, le=1e18)]
Seconds = Annotated[float, limit(ge=0, le=1e9)]
Timed = Annotated[float, limit(ge=1e-9, le=1e9)]
"""Seconds between two readings of a clock, which are never the same."""
Nats = Annotated[float, limit(ge=-0.1, le=1e12)]
"""Losses and divergences; rounding may take one that is zero a little below it."""
Moment = Annotated[str, limit(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")]
"""RFC 3339, UTC, in whole seconds: moments are in the order of their texts."""
Name = Annotated[str, limit(pattern=r"^[^\x00-\x1f\x7f/\\]{1,200}\Z")]
"""What may become the name of a file or a column."""
Folder = Annotated[str, limit(pattern=r"^[^\x00-\x1f\x7f/\\]{0,200}\Z")]
"""A `Name`, or none."""
Title = Annotated[str, limit(pattern=r"^[^\x00-\x1f\x7f]{1,500}\Z")]
