"""llama.cpp's block types that there are kernels for, by the name llama.cpp gives them."""

from workbench_kernels.gguf import iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from workbench_kernels.gguf.layout import BlockType

BLOCK_TYPES: dict[str, BlockType] = {
    module.TYPE.name: module.TYPE
    for module in (q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, q3_k, q2_k, iq4_xs, iq4_nl)
}


def block_type(name: str, tensor: str = "blocks") -> BlockType:
    """The type of that name; `ValueError` that names the tensor if there are no kernels for it."""
    if name not in BLOCK_TYPES:
        raise ValueError(f"{tensor} has type {name}; supported: {', '.join(BLOCK_TYPES)}")
    return BLOCK_TYPES[name]
