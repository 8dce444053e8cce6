"""Packed weights in PyTorch: AWQ, GPTQ and GGUF blocks multiplied as they are stored.

`awq`, `gptq` and a file a block type (`q4_k`, `q8_0`, ...) hold an operation each; `types.BLOCK_TYPES` lists the block
types, `modules` has the layers, `ops` the operators behind them. Needs torch; Triton only for the kernels.
"""

__version__ = "0.1.0"
