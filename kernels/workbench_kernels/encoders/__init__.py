"""Blocks made of float32 weights, byte for byte llama.cpp's: `encode` and what it is made of."""
