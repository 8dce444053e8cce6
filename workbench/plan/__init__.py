"""What a recipe will need before any of it is made: bytes of weights, KV cache and workspace, and what fits."""
