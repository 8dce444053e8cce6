"""Quantize a language model every way, run it in every engine, believe the numbers."""

__version__ = "0.1.0"
