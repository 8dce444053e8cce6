"""AWQ's and GPTQ's weights as a GGUF file: the same codes and scales, in blocks of llama.cpp's own types.

A weight of either is d (q - z), with a scale d and a zero z a group. In ggml's blocks of 32 (`block_q4_0` and so on),
each with the scale of its group, that is

    Q4_0    w = d c          c = q - z of -8 ... 7: all of 2 and 3 bits, and 4 bits symmetric; exactly
    Q4_1    w = d q + m      m = -d z, rounded to float16; 4 bits with zeros
    Q8_0    w = d c          c = q - z of -128 ... 127: 8 bits symmetric; exactly

What is not packed stays as the checkpoint has it. Which row of which matrix comes to lie where is asked of the
converter itself: it is given the checkpoint with row numbers in the place of packed matrices, and they are read back
from what it wrote. Every matrix is compared with the checkpoint's as it is written, and the file's logits in llama.cpp
with the checkpoint's in transformers.

Rejected: a table of names and row orders by architecture, a second copy of what the converter maintains.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench.disk import need_room
from workbench.errors import UserError
from workbench.records import VariantRequest, from_json, to_json
from workbench.shape import DTYPE_CODES
from workbench.worker import Progress, proof
from workbench.worker.base.checkpoint import StoredTensor, checked_weights, main_dtype, read_json
from workbench.worker.base.saving import write_json
from workbench.worker.kernels import import_kernels
from workbench.worker.methods import gptq
from workbench.worker.methods.grouped import BLOCK, container

LARGEST_ERROR = 5e-4
"""Of a weight, as a share of the matrix's largest: what rounding m of Q4_1 to float16 may cost. It is at most 2^-11 of
m, and m is the weight of code 0."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def blocks(kind: str, codes: Any, zeros: Any, scales: Any) -> Any:
    """Blocks of rows: codes uint8 [rows, in], zeros and scales (float16) [rows, groups] -> uint8 [rows, bytes]."""
    import numpy as np

    rows, columns = codes.shape
    in_group = columns // scales.shape[1] // BLOCK
    d, z = (np.repeat(each, in_group, 1)[:, :, None] for each in (scales, zeros.astype(np.int16)))
    table = codes.reshape(rows, -1, BLOCK)
    heads = [d]
    if kind == "Q4_1":
        heads.append((-d.astype(np.float32) * z).astype(np.float16))
    else:
        table = table.astype(np.int16) - z
    if kind == "Q8_0":
        body = table.astype(np.int8).view(np.uint8)
    else:
        nibbles = table.astype(np.uint8) if kind == "Q4_1" else (table + 8).astype(np.uint8)
        body = nibbles[:, :, : BLOCK // 2] | (nibbles[:, :, BLOCK // 2 :] << 4)
    parts = [np.ascontiguousarray(head).view(np.uint8).reshape(rows, -1, 2) for head in heads]
    return np.concatenate([*parts, body], 2).reshape(rows, -1)


@dataclass(frozen=True)
class Packed:
    """A packed matrix of a checkpoint, read when it is asked for. `bits`: of GPTQ; None: AWQ."""

    stem: str
    tensors: Mapping[str, StoredTensor]
    bits: int | None

    def _stored(self, part: str) -> StoredTensor:
        tensor = self.tensors.get(f"{self.stem}.{part}")
        if tensor is None:
            raise UserError(f"tensor {self.stem}.{part} is missing: make the variant again")
        return tensor

    def _read(self, part: str) -> Any:
        from safetensors import safe_open

        with safe_open(self._stored(part).file, framework="pt") as file:
            return file.get_tensor(f"{self.stem}.{part}")

    @property
    def outputs(self) -> int:
        """Rows of the matrix; packed tensors are transposed."""
        return self._stored("scales").shape[1]

    @property
    def columns(self) -> int:
        """Inputs of the matrix."""
        words = self._stored("qweight").shape[0]
        return words * 32 // self.bits if self.bits else words

    @cached_property
    def zeros(self) -> Any:
        """Codes of zero, numpy uint8 [outputs, groups]."""
        packed = self._read("qzeros")
        if self.bits is None:
            import workbench_kernels.awq

            return workbench_kernels.awq.unpack(packed).t().numpy()
        # Version 1 of the format stores every zero less one.
        return (gptq.unpack(packed.t().contiguous(), self.bits) + 1 & 2**self.bits - 1).numpy()

    def codes(self) -> Any:
        """numpy uint8 [outputs, in]."""
        packed = self._read("qweight")
        if self.bits is None:
            import workbench_kernels.awq

            return workbench_kernels.awq.unpack(packed).t().contiguous().numpy()
        return gptq.unpack(packed, self.bits).t().contiguous().numpy()

    def scales(self) -> Any:
        """numpy float16 [outputs, groups]; `UserError` for scales that float16 does not hold."""
        stored = self._read("scales").t().contiguous()
        half = stored.half()
        if not bool(half.isfinite().all()) or not bool((half.float() == stored.float()).all()):
            raise UserError(f"{self.stem}: its scales are no float16 numbers, which a block of llama.cpp's holds")
        return half.numpy()

    def group_size(self) -> int:
        """Inputs that share a scale. `UserError` for groups that are no runs of inputs."""
        groups = int(self.zeros.shape[1])
        size = self.columns // groups
        if self.columns % groups:
            raise UserError(
                f"{self.stem}: {groups} groups do not divide {self.columns} inputs: take another group_size"
            )
        if self.bits is not None:
            import torch

            if not bool((self._read("g_idx") == torch.arange(self.columns) // size).all()):
                raise UserError(
                    f"{self.stem}: its groups are not runs of inputs (act-order), and those of the engine are: leave "
                    "`desc_act` out"
                )
        return size

    def kind(self) -> str:
        """The type of its blocks. `UserError` for what no blocks hold: another order or size of groups, 8 bits with
        zeros."""
        size = self.group_size()
        if size % BLOCK:
            raise UserError(
                f"{self.stem}: groups of {size} inputs are no multiple of llama.cpp's blocks of {BLOCK}: take a "
                "group_size that is"
            )
        found = container(self.bits or 4, int(self.zeros.min()), int(self.zeros.max()))
        if found is None:
            raise UserError(f"{self.stem}: no type of llama.cpp's holds 8 bits with zero points: set `sym: true`")
        return found

    def weight(self) -> Any:
        """What the codes mean, float32 [outputs, in] in torch."""
        return meaning(self.codes(), self.zeros, self.scales())

    def in_blocks(self, kind: str) -> tuple[Any, float]:
        """The matrix, uint8 [outputs, bytes of a row], and by how much of its largest weight a weight is off."""
        import gguf
        import numpy as np

        codes, scales = self.codes(), self.scales()
        made = blocks(kind, codes, self.zeros, scales)
        meant = meaning(codes, self.zeros, scales).numpy()
        written = gguf.quants.dequantize(made, gguf.GGMLQuantizationType[kind])
        error = float(np.abs(written - meant).max() / max(float(np.abs(meant).max()), 1e-30))
        if not error <= (LARGEST_ERROR if kind == "Q4_1" else 0.0):
            raise UserError(
                f"{self.stem}: as {kind} a weight is off by {error:.1e} of the largest: its zeros lie far out"
            )
        return made, error


def meaning(codes: Any, zeros: Any, scales: Any) -> Any:
    """The weights that codes [outputs, in], zeros and scales [outputs, groups] mean, all numpy: float32 [outputs, in]
    in torch."""
    import torch

    codes, zeros, scales = (torch.from_numpy(each).float() for each in (codes, zeros, scales))
    return ((codes.view(*scales.shape, -1) - zeros[:, :, None]) * scales[:, :, None]).reshape(codes.shape)


def carry(payload: object, progress: Progress) -> object:
    """Worker for a `VariantRequest` whose `source` is an AWQ or GPTQ checkpoint: the GGUF file of it. Returns
    `MadeVariant`. Raises `UserError` for what llama.cpp's types do not hold."""
    from workbench.worker.ggml.quantizer import describe
    from workbench.worker.methods import gguf

    request: VariantRequest = from_json(VariantRequest, payload)
    source, out = Path(str(request.source)), Path(request.out)
    try:
        tensors, matrices = packed_in(source)
        stems = [matrix.stem for matrix in matrices]
        kinds = [matrix.kind() for matrix in matrices]
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            numbered, converted = Path(scratch) / "numbered", Path(scratch) / "numbered.gguf"
            plain = _write_numbered(source, numbered, tensors, matrices)
            gguf.convert(
                {"base": str(numbered), "out": str(converted), "dtype": "float32", "name": source.name}, _quiet
            )
            error, places = _write(converted, out, matrices, kinds, plain, progress)
        _prove(source, out, stems, kinds, places)
    except UserError as problem:
        out.unlink(missing_ok=True)
        raise UserError(f"{source.name} cannot be carried to GGUF: {problem}") from None
    made = describe(str(out), max(kinds))
    told = f"the checkpoint's own codes and scales in blocks of {' and '.join(sorted(set(kinds)))}"
    told += f"; weights equal to {error:.1e} of the largest" if error else "; weights equal bit for bit"
    carried = {"from": source.name, "types": sorted(set(kinds)), "largest_error": error}
    return to_json(replace(made, warnings=[told], provenance={"carried": carried}))


def packed_in(source: Path) -> tuple[Mapping[str, StoredTensor], list[Packed]]:
    """A checkpoint's tensors, and its packed matrices. `UserError` for one that is gone, or of another layout."""
    from workbench.worker.backends.packed import gptq_bits

    if not source.is_dir():
        raise UserError("its folder is not there any more: make the variant again")
    import_kernels()
    tensors, bits = checked_weights(source), gptq_bits(source)
    stems = sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight"))
    if not stems:
        raise UserError("no tensor of it ends in `.qweight`: it is no AWQ or GPTQ checkpoint")
    return tensors, [Packed(stem, tensors, bits) for stem in stems]


def _quiet(done: float, total: float, text: str) -> None:
    """The progress of a conversion that takes no time."""


def _write_numbered(source: Path, out: Path, tensors: Mapping[str, StoredTensor], matrices: list[Packed]) -> str:
    """Write the checkpoint with (row, place in `matrices`) for each row of a packed matrix. Returns the dtype of its
    other matrices, as safetensors names it."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    packed = {f"{matrix.stem}.{part}" for matrix in matrices for part in PARTS}
    left = {name: tensor for name, tensor in tensors.items() if name not in packed}
    out.mkdir()
    need_room(out, 3 * sum(tensor.size_bytes for tensor in left.values()))
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            (out / file.name).symlink_to(file)
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)
    (out / "config.json").unlink()
    write_json(out / "config.json", config)
    content = {}
    for place, matrix in enumerate(matrices):
        rows = torch.arange(matrix.outputs, dtype=torch.float32)
        content[f"{matrix.stem}.weight"] = torch.stack([rows, torch.full_like(rows, place)], 1)
    for name, tensor in left.items():
        with safe_open(tensor.file, framework="pt") as opened:
            content[name] = opened.get_tensor(name)
    save_file(content, out / "model.safetensors", metadata={"format": "pt"})
    return DTYPE_CODES[main_dtype({name: tensor for name, tensor in left.items() if len(tensor.shape) > 1})]


@dataclass(frozen=True)
class _Place:
    """A tensor of the file to write. `rows`: int [rows, 2], (row, matrix) of each; None: it is not packed."""

    tensor: Any
    kind: str
    rows: Any = None


def _write(
    numbered: Path, out: Path, matrices: list[Packed], kinds: list[str], plain: str, progress: Progress
) -> tuple[float, dict[str, Any]]:
    """Write the file that the numbered one stands for; the largest error of any matrix, and where rows came to lie:
    tensor's name -> int [rows, 2] of (row, matrix)."""
    import gguf
    import numpy as np
    from gguf.quants import quant_shape_to_byte_shape

    from workbench.worker.ggml.encode import SET_BY_THE_QUANTIZER, copy_metadata

    reader = gguf.GGUFReader(str(numbered))
    places = [_place(tensor, matrices, kinds, plain) for tensor in reader.tensors]
    seen = np.concatenate([place.rows for place in places if place.rows is not None])
    expected = np.concatenate([[(row, i) for row in range(m.outputs)] for i, m in enumerate(matrices)])
    if not np.array_equal(np.unique(seen, axis=0), np.unique(expected, axis=0)) or len(seen) != len(expected):
        raise UserError("llama.cpp's converter leaves rows of its matrices out, or takes some twice")
    writer = gguf.GGUFWriter(str(out), reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    copy_metadata(reader, writer)
    writer.add_uint32(SET_BY_THE_QUANTIZER[0], gguf.GGML_QUANT_VERSION)
    writer.add_uint32(SET_BY_THE_QUANTIZER[1], gguf.LlamaFileType[f"MOSTLY_{max(set(kinds), key=kinds.count)}"])
    size_bytes = 0
    for place in places:
        stored = gguf.GGMLQuantizationType[place.kind]
        size = [int(length) for length in reversed(place.tensor.shape)]
        if place.rows is not None:
            size[-1] = matrices[int(place.rows[0, 1])].columns
        shape = quant_shape_to_byte_shape(size, stored)
        size_bytes += int(np.prod(shape))
        writer.add_tensor_info(place.tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=stored)
    need_room(out.parent, size_bytes)
    largest = 0.0
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for i, place in enumerate(places):
            progress(i, len(places), "carrying to GGUF")
            made, error = _content(place, matrices)
            writer.write_tensor_data(made)
            largest = max(largest, error)
    finally:
        writer.close()
    return largest, {place.tensor.name: place.rows for place in places if place.rows is not None}


def _place(tensor: Any, matrices: list[Packed], kinds: list[str], plain: str) -> _Place:
    """What a tensor of the numbered file stands for."""
    import numpy as np

    if len(tensor.shape) < 2 or int(tensor.shape[0]) != 2:
        return _Place(tensor, plain if len(tensor.shape) > 1 else "F32")
    rows = tensor.data.reshape(-1, 2)
    whole = rows.astype(np.int64)
    sources = sorted(set(whole[:, 1].tolist()))
    if not np.array_equal(whole, rows) or not 0 <= sources[0] <= sources[-1] < len(matrices):
        raise UserError(f"llama.cpp's converter does more to {tensor.name} than move rows")
    found = {(kinds[i], matrices[i].columns) for i in sources}
    if len(found) > 1:
        raise UserError(
            f"{tensor.name} is made of matrices of different bits: {', '.join(sorted(k for k, _ in found))}"
        )
    return _Place(tensor, found.pop()[0], whole)


def _content(place: _Place, matrices: list[Packed]) -> tuple[Any, float]:
    """A tensor's bytes, uint8, and by how much of its largest weight a packed weight is off."""
    import numpy as np
    import torch

    if place.rows is None:
        values = torch.from_numpy(np.array(place.tensor.data))
        kind = {"F16": torch.float16, "BF16": torch.bfloat16}.get(place.kind, torch.float32)
        if not torch.equal(values.to(kind).float(), values):
            raise UserError(f"{place.tensor.name} is not what the checkpoint holds")
        return values.to(kind).contiguous().view(torch.uint8).numpy(), 0.0
    made, largest = None, 0.0
    for i in sorted(set(place.rows[:, 1].tolist())):
        part, error = matrices[i].in_blocks(place.kind)
        made = np.empty((len(place.rows), part.shape[1]), np.uint8) if made is None else made
        mine = place.rows[:, 1] == i
        made[mine], largest = part[place.rows[mine, 0]], max(largest, error)
    return made, largest


def _prove(source: Path, out: Path, stems: list[str], kinds: list[str], places: Mapping[str, Any]) -> None:
    """Compare llama.cpp's logits of the file with the checkpoint's in transformers, its matrices packed as they were
    written (and compared), but in the checkpoint's own order of rows."""
    import gguf
    import numpy as np
    import torch

    from workbench.worker.backends.packed import read_checkpoint
    from workbench.worker.ggml.logits import logits_of

    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(out)).tensors}

    number = {stem: i for i, stem in enumerate(stems)}
    lying: dict[int, list[str]] = {}
    for name, rows in places.items():
        for i in np.unique(rows[:, 1]).tolist():
            lying.setdefault(i, []).append(name)

    def layer_of(stem: str, bias: Any) -> Any:
        from workbench_kernels.modules import BlockLinear

        i, parts = number[stem], list[tuple[Any, Any]]()
        for name in lying[i]:
            mine = places[name][:, 1] == i
            parts.append((places[name][mine, 0], written[name][mine]))
        order, blocks = (np.concatenate(each) for each in zip(*parts, strict=True))
        return BlockLinear(torch.from_numpy(blocks[np.argsort(order)]), kinds[i], bias)

    model = read_checkpoint(source, "float32", "cpu", "eager", False, layer_of).model
    ids = proof.ids_for(model)
    expected = logits_of(out, ids)
    if expected is None:
        raise UserError("llama.cpp cannot load what was written; see the log for its words")
    found = proof.compare(proof.logits_of(model, ids), expected, proof.COARSE_NATS)
    if not found.same:
        raise UserError(f"llama.cpp makes another model of it {found.words}")
