"""AWQ's and GPTQ's weights as a folder that mlx-lm loads: the same codes and scales, in MLX's groups.

A weight of either is d (q - z), with a scale d and a zero z a group. MLX computes w = s q + b a group of 32, 64 or 128
inputs: s = d and b = -d z, both float16, a larger group's in each of its parts. Symmetric zeros are powers of two, so
that b is exact. Codes lie in uint32 words as one stream of bits, lowest first, along the inputs.

mlx-lm reads 4-bit AWQ itself, but no other bits, no `g_idx`, and GPTQ's codes in AWQ's order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.disk import need_room, remove
from workbench.errors import UserError
from workbench.records import MadeVariant, VariantRequest, from_json, to_json
from workbench.worker import Progress, Tensors, proof
from workbench.worker.base.checkpoint import INDEX, StoredTensor, read_json
from workbench.worker.base.saving import for_both_readers, write_json, write_shards
from workbench.worker.ggml.carry import LARGEST_ERROR, PARTS, Packed, meaning, packed_in
from workbench.worker.methods import gptq
from workbench.worker.methods.grouped import mlx_group

SIDE_FILES = (".json", ".jinja", ".model", ".txt")
"""Endings of what goes along: configuration, tokenizer, template."""
NOT_ALONG = (".index.json", "quantize_config.json", "quant_config.json")
WRITTEN = ("weight", "scales", "biases")
"""The tensors of a packed matrix."""


def carry(payload: object, progress: Progress) -> object:
    """Worker for a `VariantRequest` whose `source` is an AWQ or GPTQ checkpoint: the folder. Returns `MadeVariant`.
    Raises `UserError` for what MLX's groups do not hold, and for what is another model in MLX."""
    request: VariantRequest = from_json(VariantRequest, payload)
    source, out = Path(str(request.source)), Path(request.out)
    out.mkdir()
    try:
        tensors, found = packed_in(source)
        bits, matrices = found[0].bits or 4, {matrix.stem: matrix for matrix in found}
        error = _write(source, out, tensors, matrices, bits, progress)
        _prove(source, out, matrices, bits)
    except UserError as problem:
        remove(out)
        raise UserError(f"{source.name} cannot be carried to MLX: {problem}") from None
    types = {name: "F16" for name in tensors if not name.endswith(PARTS)} | dict.fromkeys(matrices, f"affine-{bits}")
    told = f"the checkpoint's own codes and scales in MLX's groups of {bits} bits"
    told += f"; weights equal to {error:.1e} of the largest" if error else "; weights equal bit for bit"
    carried = {"from": source.name, "types": [f"affine, {bits} bits"], "largest_error": error}
    return to_json(MadeVariant(types, warnings=[told], provenance={"carried": carried}))


def in_groups(matrix: Packed) -> tuple[Tensors, float, int]:
    """A matrix as MLX has it (`weight` int32 words, `scales`, `biases`), by how much of its largest weight a weight is
    off, and its group. `UserError` for what no groups hold."""
    import torch

    bits, stored = matrix.bits or 4, (matrix.codes(), matrix.zeros, matrix.scales())
    size = mlx_group(matrix.group_size())
    codes, zeros, scales = map(torch.from_numpy, stored)
    repeats = codes.shape[1] // scales.shape[1] // size
    exact = -scales.float() * zeros.float()
    biases = exact.half()
    error = float((exact - biases.float()).abs().max() / meaning(*stored).abs().max().clamp(min=1e-30))
    if not error <= LARGEST_ERROR:
        raise UserError(f"{matrix.stem}: a weight is off by {error:.1e} of the largest: its zeros lie far out")
    parts = {
        "weight": gptq.pack(codes.t().contiguous(), bits).t().contiguous(),
        "scales": scales.repeat_interleave(repeats, 1).contiguous(),
        "biases": biases.repeat_interleave(repeats, 1).contiguous(),
    }
    return parts, error, size


def _write(
    source: Path,
    out: Path,
    tensors: Mapping[str, StoredTensor],
    matrices: Mapping[str, Packed],
    bits: int,
    progress: Progress,
) -> float:
    """Write the folder, a shard at a time; the largest error of any matrix."""
    import torch

    need_room(out, sum(tensor.size_bytes for tensor in tensors.values()))
    packed = {f"{stem}.{part}" for stem in matrices for part in PARTS}
    names = [*matrices, *(name for name in tensors if name not in packed)]
    sizes, errors = set[int](), [0.0]

    def parts() -> Iterator[Tensors]:
        for i, name in enumerate(names):
            progress(i, len(names), "carrying to MLX")
            if name not in matrices:
                yield {name: tensors[name].read(name)}
                continue
            made, error, size = in_groups(matrices[name])
            made["weight"] = made["weight"].view(torch.uint32)
            errors.append(error)
            sizes.add(size)
            yield {f"{name}.{part}": tensor for part, tensor in made.items()}

    write_shards(out, parts(), "mlx")
    for along in source.iterdir():
        if along.suffix in SIDE_FILES and not along.name.endswith(NOT_ALONG):
            shutil.copyfile(along, out / along.name)
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    # Where layers differ mlx-lm goes by their shapes.
    config["quantization"] = {"group_size": max(sizes), "bits": bits, "mode": "affine"}
    write_json(out / "config.json", for_both_readers(config))
    return max(errors)


def _prove(source: Path, out: Path, matrices: Mapping[str, Packed], bits: int) -> None:
    """Compare MLX's logits of the folder with the checkpoint's in transformers, its matrices as they were written (and
    compared with the checkpoint's): a bias that float16 rounds is 2e-5 nats of SmolLM2 135M, more than a slip."""
    from workbench.worker.backends import mlx
    from workbench.worker.backends.packed import read_checkpoint

    places = read_json(out / INDEX)["weight_map"]

    def layer_of(stem: str, bias: Any) -> Any:
        parts = [_read(out / places[name], name) for name in (f"{stem}.{part}" for part in WRITTEN)]
        layer = _grouped(parts, bits, bias)
        meant = matrices[stem].weight()
        off = float((layer.weight - meant).abs().max() / meant.abs().max().clamp(min=1e-30))
        if not off <= LARGEST_ERROR:
            raise UserError(f"MLX makes another model of it: a weight of {stem} is off by {off:.1e} of the largest")
        return layer

    model = read_checkpoint(source, "float32", "cpu", "eager", False, layer_of).model
    ids = proof.ids_for(model)
    try:
        found = mlx.logits_of(out, ids)
    except (ValueError, TypeError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"mlx-lm cannot load what was written: {reason}") from None
    compared = proof.compare(proof.logits_of(model, ids), found, proof.SAME_WEIGHTS_NATS)
    if not compared.same:
        raise UserError(f"MLX makes another model of it {compared.words}")


def _read(file: Path, name: str) -> Any:
    """A tensor of the folder."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)


def _grouped(parts: list[Any], bits: int, bias: Any) -> Any:
    """A linear layer of `WRITTEN` that computes in float32 and holds its weight packed."""
    import torch

    class Grouped(torch.nn.Module):
        """w = s q + b, as MLX has it."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.scales, self.biases = parts[0].view(torch.int32), parts[1].float(), parts[2].float()
            self.out_features, self.in_features = parts[0].shape[0], parts[0].shape[1] * 32 // bits
            self.bias = None if bias is None else bias.float()

        @property
        def weight(self) -> Any:
            """[out, in]."""
            codes = gptq.unpack(self.words.t().contiguous(), bits).t().float().reshape(*self.scales.shape, -1)
            return (codes * self.scales[:, :, None] + self.biases[:, :, None]).reshape(self.out_features, -1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight, self.bias)

    return Grouped()
