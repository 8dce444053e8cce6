"""In which form an engine had a row's weights: the container and its types, and whether they stayed packed there.

AWQ's codes in llama.cpp are a GGUF file of Q4_1, and a GGUF file in vLLM is de-quantized: speed, memory and what is
served are of that form.
"""

from __future__ import annotations

from workbench.records import Row

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Types that are no quantization."""
UNPACKED = "none, de-quantized"
"""How an engine's `kernel` begins where it de-quantizes what it loads."""


def container(row: Row) -> str | None:
    """Format and quantized types (`gguf Q4_K+Q6_K`), or that of a plain file's matrices, whose norms may be F32. None
    for what was never made."""
    artifact = row.artifact
    if not artifact.format or artifact.provenance.get("loaded"):
        # What an engine quantizes as it loads the base has no types in a file.
        return artifact.format or None
    kinds = set(artifact.tensor_types.values())
    shown = kinds - FLOATS or kinds - {"F32"} or kinds
    return " ".join([artifact.format, *(["+".join(sorted(shown))] if shown else [])])


def held(row: Row) -> str | None:
    """`packed`, `de-quantized`, or `plain` for a file of floats; None where it was not measured or not told."""
    artifact, settings = row.artifact, row.measurement.settings if row.measurement else None
    if settings is None:
        return None
    kernel = settings.get("kernel")
    if isinstance(kernel, str) and kernel.startswith(UNPACKED):
        return "de-quantized"
    if artifact.format == "compressed-tensors" and row.backend == "transformers" and kernel is None:
        # Its rows did not say so at first.
        return "de-quantized"
    if artifact.provenance.get("loaded"):
        return "packed"
    if not artifact.tensor_types:
        return None
    return "plain" if set(artifact.tensor_types.values()) <= FLOATS else "packed"


def carried_from(row: Row) -> str | None:
    """The checkpoint whose codes and scales these are, in another container."""
    found = (row.artifact.provenance.get("carried") or {}).get("from")
    return found if isinstance(found, str) else None


def words(row: Row) -> str:
    """All of it in a few words, with the bits a weight in the engine's memory: `gguf Q4_1, packed, 7.2 bits`."""
    bits = bits_in_engine(row)
    return ", ".join(filter(None, (container(row), held(row), f"{bits:.1f} bits a weight" if bits else None)))


def bits_in_engine(row: Row) -> float | None:
    """Bytes of all weights as the engine has them in memory x 8 over parameters."""
    size_bytes = row.measurement.memory.get("weights") if row.measurement else None
    return size_bytes * 8 / row.artifact.parameters if size_bytes and row.artifact.parameters else None
