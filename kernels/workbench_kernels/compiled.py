"""What Triton's compiler makes of a launch for a GPU that need not be there: no GPU is asked.

From the machine code come registers, spilled bytes, shared memory and instructions; from PTX how many bytes a load of
codes or of activations takes, and a store; from the launch how many programs there are. It is no timing, but a kernel
that spills, loads two bytes at a time where sixteen could be had, or leaves multiprocessors without work shows here
before it is ever run. `kernels/static_table.py` prints it of every kernel.
"""

import ast
import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench_kernels.backend import Config, parted, triton
from workbench_kernels.products import Launch

ROLES = {"words_at": "codes", "words": "codes", "decode": "activations", "prefill": "activations"}
"""What a load is of, by the Triton function that it stands in (a leading underscore counts nothing); elsewhere it is of
scales and zeros."""
TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""Pointers' types in Triton's signatures."""


@dataclass(frozen=True)
class Facts:
    """The facts of one launch on one architecture."""

    registers: int
    """A thread."""
    spilled_bytes: int
    """That the instructions which store to local memory write, a thread, each counted once."""
    shared_bytes: int
    instructions: int
    matrix_instructions: int
    access_bytes: dict[str, list[int]]
    """Bytes of every load of `codes`, `activations` and `scales` in the PTX, and of every one of its `stores`."""
    programs: int


def facts(launch: Launch, architecture: int, config: Config | None = None) -> Facts:
    """What the compiler makes of a launch for `sm_<architecture>`, with the first of its tiles unless one is named."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = config or launch.configs[0]
    tile, options = parted(config)
    function = launch.function
    known = {**launch.arguments, **tile}
    fixed = {parameter.name for parameter in function.params if parameter.is_constexpr}
    signature, aligned = {}, {}
    for place, name in enumerate(function.arg_names):
        value = known[name]
        if name in fixed:
            signature[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[place,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, {name: known[name] for name in fixed}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    words, registers = _machine_code(made.asm["cubin"])
    return Facts(
        registers=registers,
        spilled_bytes=sum(_width(word) for word in words if word.startswith("STL")),
        shared_bytes=made.metadata.shared,
        instructions=len(words),
        matrix_instructions=sum(word.startswith(("HMMA", "HGMMA", "UTC")) and "MMA" in word for word in words),
        access_bytes=_accesses(made.asm["ptx"]),
        programs=launch.programs(config),
    )


def _machine_code(cubin: bytes) -> tuple[list[str], int]:
    """The instructions' names, and the registers a thread has."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", listing.stdout)
    found = re.search(r"REG:(\d+)", usage.stdout)
    if not found:
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage.stdout}{usage.stderr}")
    return words, int(found[1])


def _width(word: str) -> int:
    """Bytes that an access like `STL.128` moves."""
    bits = re.search(r"\.(\d+)$", word)
    return int(bits[1]) // 8 if bits else 4


def _accesses(ptx: str) -> dict[str, list[int]]:
    """Bytes of the accesses to global memory, by what they are of; a load is known by the source line it came from."""
    files = {int(number): path for number, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx)}
    found: dict[str, list[int]] = {"codes": [], "activations": [], "scales": [], "stores": []}
    role, inline = "scales", False
    for line in ptx.splitlines():
        inline = "end inline asm" not in line and (inline or "begin inline asm" in line)
        place = re.match(r"\s*\.loc\s+(\d+) (\d+)", line)
        # Inside inline assembly the line numbers only count on.
        if place and int(place[2]) and not inline:
            role = ROLES.get(_function_at(files[int(place[1])], int(place[2])).lstrip("_"), "scales")
        access = re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+) ", line)
        copied = re.search(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (0x[0-9a-f]+|\d+)", line)
        if access:
            size = int(access[2] or 1) * int(access[3]) // 8
            found[role if access[1] == "ld" else "stores"].append(size)
        elif copied:
            found[role].append(int(copied[1], 0))
    return found


def _function_at(path: str, line: int) -> str:
    """Name of the function of a file that holds a line."""
    return next((name for first, last, name in _functions(path) if first <= line <= last), "")


@functools.cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """First line, last line and name of a file's functions."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [(node.lineno, node.end_lineno or 0, node.name) for node in tree.body if isinstance(node, ast.FunctionDef)]
