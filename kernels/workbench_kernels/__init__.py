"""Packed weights in PyTorch: AWQ, GPTQ and GGUF blocks multiplied as they are stored.

`awq`, `gptq` and `gguf` hold a layout each (`gguf` a file for every block type), `encoders` make GGUF blocks, `modules`
has the layers and `ops` the operators behind them. Needs torch; Triton only for the kernels.
"""

__version__ = "0.1.0"
