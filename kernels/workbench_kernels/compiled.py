"""What Triton's compiler makes of a kernel for a Hopper GPU, on any machine: no GPU is asked.

    python -m workbench_kernels.compiled Q4_K awq gptq

prints one JSON line a kernel, for the first tuned configuration and a 4096 x 4096 weight in fp16: registers, bytes
spilled, shared memory, instructions, matrix instructions and the widest load from global memory. It is no timing, but a
kernel that spills or loads two bytes at a time where sixteen could be had shows here before it is ever run.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from workbench_kernels import awq, gptq
from workbench_kernels.backend import Config, Kernel, parted, triton
from workbench_kernels.gguf import blocks
from workbench_kernels.gguf.types import BLOCK_TYPES

SIZE = 4096
GROUP = 128
POINTERS = {name: "*fp16" for name in ("x", "out", "scales")} | {
    name: "*i32" for name in ("qweight", "qzeros", "g_idx")
}


def kernels_of(operation: str) -> dict[str, tuple[Kernel, dict[str, object], Config]]:
    """What there is to compile of an operation: `decode`, `prefill`, `dequantize` -> function, constants, tile."""
    shape: dict[str, object] = {"N": SIZE, "K": SIZE, "SPLIT": 1, "BUCKET": 16}
    if operation in BLOCK_TYPES:
        common = blocks.constants_of(BLOCK_TYPES[operation], SIZE)
        return {
            "decode": (blocks._decode, shape | common, blocks.DECODE[0]),
            "prefill": (blocks._prefill, shape | common, blocks.PREFILL[0]),
            "dequantize": (blocks._dequantize, {"K": SIZE} | common, blocks.TILE),
        }
    module = {"awq": awq, "gptq": gptq}[operation]
    shape |= {"GROUP": GROUP, "PLAIN": True, "BITS": 4, "RUN": 32}
    return {
        "decode": (module._decode, shape | {"RUN": module.LONGEST_RUN}, module.DECODE[0]),
        "prefill": (module._prefill, shape, module.PREFILL[0]),
        "dequantize": (module._dequantize, shape, {"BC": 16} if operation == "awq" else {"BN": 64}),
    }


def compiled(operation: str, kernel: str) -> dict[str, str | int | None]:
    """The module docstring's facts about one kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants, config = kernels_of(operation)[kernel]
    tile, options = parted(config)
    constants = {name: value for name, value in (constants | tile).items() if name in function.arg_names}
    word = "*i16" if operation in BLOCK_TYPES and BLOCK_TYPES[operation].layout.word is torch.int16 else "*i32"
    types = POINTERS | {"w": word} | {name: "i32" for name in ("M", "N") if name not in constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(function, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", listing.stdout)
    loads = [word for word in words if word.startswith(("LDG.", "LDGSTS."))]
    known = re.search(r"REG:(\d+).*?LOCAL:(\d+)", usage.stdout)
    return {
        "operation": operation,
        "kernel": kernel,
        "registers": int(known[1]) if known else None,
        "spilled_bytes": 4 * sum(word.startswith("STL") for word in words),
        "shared_bytes": made.metadata.shared,
        "instructions": len(words),
        "matrix_instructions": sum(word.startswith(("HMMA", "HGMMA")) for word in words),
        "widest_load_bytes": max(
            (int(bits[0]) // 8 if (bits := re.findall(r"\.(\d+)$", word)) else 2 if "U16" in word else 4)
            for word in loads
        ),
    }


if __name__ == "__main__":
    for operation in sys.argv[1:] or [*BLOCK_TYPES, "awq", "gptq"]:
        for kernel in ("decode", "prefill", "dequantize"):
            print(json.dumps(compiled(operation, kernel)), flush=True)
