"""Quantize a language model every way, run it in every engine, believe the numbers."""

from __future__ import annotations

__version__ = "0.2.0"
