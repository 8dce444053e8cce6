"""AWQ's and GPTQ's weights as compressed-tensors: the same codes and scales, in the layout `pack-quantized`.

A weight of either is d (q - z), with a scale d and a zero z a group. compressed-tensors stores codes of 4 or 8 bits
unsigned, in 32-bit words along the inputs, lowest first (`weight_packed` [out, words]); scales [out, groups]; and,
where they are not all in the middle, zeros in words along the outputs. vLLM and transformers read it, llm-compressor
writes it (W4A16 and W4A16_ASYM of its schemes).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from workbench.disk import need_room, remove
from workbench.errors import UserError
from workbench.records import MadeVariant, VariantRequest, from_json, to_json
from workbench.worker import Progress, Tensors
from workbench.worker.base.checkpoint import TOKENIZER_FILES, StoredTensor, read_json
from workbench.worker.base.saving import copy_side_files, for_both_readers, write_json, write_shards
from workbench.worker.ggml.carry import PARTS, Packed, packed_in
from workbench.worker.methods import gptq
from workbench.worker.methods.compressed_tensors import written

BITS = (4, 8)


def carry(payload: object, progress: Progress) -> object:
    """Worker for a `VariantRequest` whose `source` is an AWQ or GPTQ checkpoint: the folder. Returns `MadeVariant`.
    Raises `UserError` for codes and groups that the layout has no place for."""
    request: VariantRequest = from_json(VariantRequest, payload)
    source, out = Path(str(request.source)), Path(request.out)
    out.mkdir()
    try:
        tensors, found = packed_in(source)
        bits = found[0].bits or 4
        if bits not in BITS:
            raise UserError(f"engines read 4 or 8 bits of it, not {bits}: take `bits: 4` or 8")
        sizes = {matrix.group_size() for matrix in found}
        whole = all(matrix.group_size() == matrix.columns for matrix in found)
        if len(sizes) > 1 and not whole:
            raise UserError(f"its layers have groups of different sizes ({', '.join(map(str, sorted(sizes)))})")
        middle = 2 ** (bits - 1)
        symmetric = all(bool((matrix.zeros == middle).all()) for matrix in found)
        need_room(out, sum(tensor.size_bytes for tensor in tensors.values()))
        write_shards(out, _parts(tensors, found, bits, symmetric, progress), "pt")
    except UserError as problem:
        remove(out)
        raise UserError(f"{source.name} cannot be carried to compressed-tensors: {problem}") from None
    copy_side_files(source, out, ("generation_config.json", "README.md", *TOKENIZER_FILES))
    groups = {"strategy": "channel"} if whole else {"strategy": "group", "group_size": sizes.pop()}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **groups}
    left = {name.removesuffix(".weight") for name, tensor in tensors.items() if len(tensor.shape) == 2}
    ignore = {name for name in left if "embed" not in name and not name.endswith(PARTS)} | {"lm_head"}
    config = read_json(source / "config.json")
    config["quantization_config"] = written("pack-quantized", weights, None, sorted(ignore))
    write_json(out / "config.json", for_both_readers(config))
    kind = f"I{bits}-" + ("row" if whole else f"g{groups['group_size']}")
    types = {name: tensor.dtype for name, tensor in tensors.items() if not name.endswith(PARTS)}
    types |= dict.fromkeys((f"{matrix.stem}.weight" for matrix in found), kind)
    carried = {"from": source.name, "types": [kind], "largest_error": 0.0}
    return to_json(
        MadeVariant(
            types,
            warnings=["the checkpoint's own codes and scales in compressed-tensors' words; weights equal bit for bit"],
            provenance={"carried": carried},
        )
    )


def _parts(
    tensors: Mapping[str, StoredTensor], matrices: list[Packed], bits: int, symmetric: bool, progress: Progress
) -> Iterator[Tensors]:
    """All tensors of the folder, a matrix or another tensor at a time."""
    packed = {f"{matrix.stem}.{part}" for matrix in matrices for part in PARTS}
    for i, matrix in enumerate(matrices):
        progress(i, len(matrices), "carrying to compressed-tensors")
        made = packed_parts(matrix, bits, symmetric)
        yield {f"{matrix.stem}.{part}": tensor for part, tensor in made.items()}
    for name, tensor in tensors.items():
        if name not in packed:
            yield {name: tensor.read(name)}


def packed_parts(matrix: Packed, bits: int, symmetric: bool) -> Tensors:
    """A matrix as compressed-tensors has it, by the ends of the names."""
    import torch

    parts = {
        # Packed along the inputs, and the words beside each other.
        "weight_packed": gptq.pack(torch.from_numpy(matrix.codes()).t().contiguous(), bits).t().contiguous(),
        "weight_scale": torch.from_numpy(matrix.scales()).contiguous(),
        "weight_shape": torch.tensor([matrix.outputs, matrix.columns]),
    }
    if not symmetric:
        parts["weight_zero_point"] = gptq.pack(torch.from_numpy(matrix.zeros), bits)
    return parts
