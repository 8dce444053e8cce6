"""A GGUF file whose blocks are made by this project's own encoders (`kernels/`), on the GPU where there is one.

The file is llama.cpp's but for who made the blocks: each tensor gets the type that llama.cpp's rules mean for it
(`mixtures.py`, where they are held against its quantizer), tensors stand in its order, and the metadata are copied as
it copies them. Encoding on a GPU takes less time than reading, writing and comparing, so each of these has a thread: in
memory at once are the blocks of two tensors and three slabs of weights, where a GPU reads them page-locked. Rejected:
asking the quantizer in a dry run for the types, which would be the same rules a second time, read off its log.

Some rows of every tensor are also given to llama.cpp's own functions, and the blocks compared: equality is tested on a
processor, and whoever encodes on a GPU is told whether it holds there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench.errors import NOT_IMPORTED, UserError, cannot_import, out_of_memory
from workbench.shape import FLOATS, NamedShape, Traits
from workbench.worker import Progress
from workbench.worker.base.gguf_file import field_of
from workbench.worker.ggml.index import block_maker
from workbench.worker.ggml.mixtures import RULED, is_quantized, types_of

SLAB = 2**26
"""Weights that are float32 at once, in whole rows."""

CHECKED_ROWS = 2
"""How many rows of every slab are compared with llama.cpp's, spread over it."""

SET_BY_THE_QUANTIZER = ("general.quantization_version", "general.file_type")
LEFT_OUT = ("split.no", "split.count", "split.tensors.count")
WITHOUT_IMPORTANCES = ("output.weight", "token_embd.weight", "per_layer_token_embd.weight")
"""What no calibration pass sees as an input; llama.cpp quantizes these blindly in any mixture."""


@dataclass(frozen=True)
class Place:
    """Where the encoders run: torch's `device`, and its `name` for people."""

    device: str
    name: str


def place_of(encoder: str) -> Place | None:
    """Where `encoder: workbench | auto | llamacpp` lets the encoders run; None: llama.cpp is to make the blocks.

    `auto` takes a CUDA GPU that torch sees, and no processor. Raises `UserError` if `workbench` is asked for and torch
    is missing.
    """
    if encoder == "llamacpp":
        return None
    try:
        import torch

        from workbench.worker.kernels import import_kernels

        import_kernels()
    except (*NOT_IMPORTED, UserError) as problem:
        if encoder == "auto":
            return None
        if isinstance(problem, UserError):
            raise
        raise cannot_import("torch (encoder: workbench)", problem, "pip install torch") from None
    if torch.cuda.is_available():
        return Place("cuda", torch.cuda.get_device_name())
    return Place("cpu", "cpu") if encoder == "workbench" else None


@dataclass(frozen=True)
class Checked:
    """How many rows were compared with llama.cpp's, and how many of them had the same bytes."""

    rows: int
    equal: int


def traits_of(reader: Any) -> Traits:
    """What a GGUF file says of its model, as far as the rules ask."""
    kind = str(field_of(reader, "general.architecture"))
    heads = int(field_of(reader, f"{kind}.attention.head_count"))
    return Traits(
        layers=int(field_of(reader, f"{kind}.block_count")),
        heads=heads,
        kv_heads=int(field_of(reader, f"{kind}.attention.head_count_kv", heads)),
        experts=int(field_of(reader, f"{kind}.expert_count", 0)),
        model_type=kind,
    )


def types_in(reader: Any, mixture: str, weighted: bool) -> dict[str, str | None] | str:
    """The type of each tensor of a GGUF file in a mixture, in the order of the file to write; None: left as it is. Or
    why the encoders do not make it. `weighted`: with an importance matrix."""
    from workbench_kernels.encoders.encode import ENCODERS

    kind = str(field_of(reader, "general.architecture"))
    if kind not in RULED:
        return f"it makes files of {', '.join(RULED)}, and this is one of {kind}"
    traits = traits_of(reader)
    shapes = [NamedShape(each.name, tuple(map(int, reversed(each.shape)))) for each in reader.tensors]
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    kept = {shape.name for shape in shapes if not is_quantized(shape)}
    meant, _ = types_of(mixture, shapes, traits, weighted)
    types = {name: None if name in kept or wanted == stored[name] else wanted for name, wanted in meant.items()}
    missing = sorted({wanted for wanted in types.values() if wanted and wanted not in ENCODERS and wanted != "F16"})
    return f"it has no encoder for {', '.join(missing)}" if missing else types


def write(
    source: Path, out: Path, mixture: str, matrix: Path | None, place: Place, threads: int, progress: Progress
) -> Checked | str:
    """Write `out`, the mixture of the GGUF file `source`; or why not, and at the most half a file.

    `matrix`: an importance matrix. `threads`: where a processor encodes. Raises `UserError` that names the tensor for
    what cannot be encoded.
    """
    import gguf
    import numpy as np
    import torch
    from gguf.quants import quant_shape_to_byte_shape

    from workbench.worker.ggml import imatrix

    torch.set_num_threads(threads)
    # "c": torch takes no memory that cannot be written; what is written there would stay in memory.
    reader = gguf.GGUFReader(str(source), "c")
    types = types_in(reader, mixture, matrix is not None)
    if isinstance(types, str):
        return types
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    means = imatrix.load(matrix) if matrix else {}
    importances = {
        name: _importance(means.get(name), tensors[name], wanted, mixture) for name, wanted in types.items() if wanted
    }
    writer = gguf.GGUFWriter(str(out), reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    copy_metadata(reader, writer)
    writer.add_uint32(SET_BY_THE_QUANTIZER[0], gguf.GGML_QUANT_VERSION)
    writer.add_uint32(SET_BY_THE_QUANTIZER[1], gguf.LlamaFileType[f"MOSTLY_{mixture}"])
    for name, wanted in types.items():
        shape, dtype = tensors[name].data.shape, tensors[name].data.dtype
        stored = tensors[name].tensor_type if wanted is None else gguf.GGMLQuantizationType[wanted]
        if wanted:
            size = [int(length) for length in reversed(tensors[name].shape)]
            shape, dtype = quant_shape_to_byte_shape(size, stored), np.dtype(np.uint8)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=stored)
    checks: list[tuple[int, Future[int]]] = []
    written: Future[None] | None = None
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as checking, ThreadPoolExecutor(1) as writing:
            encoded = [tensors[name] for name, wanted in types.items() if wanted]
            slabs = _ahead(
                reading, (partial(_read, each, *rows, place.device) for each in encoded for rows in _slabs(each))
            )
            for i, (name, wanted) in enumerate(types.items()):
                progress(i, len(types), f"{mixture} on {place.name}")
                made = tensors[name].data
                try:
                    if wanted:
                        made = _encoded(tensors[name], wanted, importances[name], place.device, slabs, checking, checks)
                except ValueError as problem:
                    raise UserError(f"{source}: tensor {name} cannot be made {wanted}: {problem}") from None
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    return f"{place.name} has not the 2 GiB free that it needs"
                if written:
                    written.result()
                written = writing.submit(writer.write_tensor_data, made)
            if written:
                written.result()
            return Checked(sum(rows for rows, _ in checks), sum(equal.result() for _, equal in checks))
    finally:
        writer.close()


def same_as_llama_cpp(kind: str, rows: Any, importance: Any, made: Any) -> int:
    """How many of `rows` (numpy float32 [n, in], importances float32 [in] or None) llama.cpp's quantizer makes the same
    bytes of as `made`, uint8 [n, bytes of a row]."""
    import gguf
    import numpy as np

    rows, theirs = np.ascontiguousarray(rows), np.zeros_like(made)
    pointer = None if importance is None else importance.ctypes.data
    number = int(gguf.GGMLQuantizationType[kind])
    block_maker()(number, rows.ctypes.data, theirs.ctypes.data, 0, *rows.shape, pointer)
    return int((theirs == made).all(1).sum())


def copy_metadata(reader: Any, writer: Any) -> None:
    """Every field of the source but those that the quantizer sets or leaves out; strings by their bytes, which in a
    vocabulary need not be text."""
    import gguf

    skipped = (gguf.Keys.General.ARCHITECTURE, *SET_BY_THE_QUANTIZER, *LEFT_OUT)
    for name, field in reader.fields.items():
        if name in skipped or name.startswith("GGUF."):
            continue
        held = field.types[-1] if len(field.types) > 1 else None
        if field.types[-1] != gguf.GGUFValueType.STRING:
            value = field.contents()
        elif held:
            value = [field.parts[i].tobytes() for i in field.data]
        else:
            value = field.parts[-1].tobytes()
        writer.add_key_value(name, value, field.types[0], sub_type=held)


def _importance(means: Any, tensor: Any, wanted: str, kind: str) -> Any:
    """A tensor's importances, float32 [experts, in], or None; the quantizer's refusals, in its words."""
    name = tensor.name
    columns, experts = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
    if means is not None and means.size != columns * experts:
        if name not in WITHOUT_IMPORTANCES[1:]:
            raise UserError(
                f"imatrix size {means.size} is different from tensor size {columns * experts} for {name}: "
                "it is of another model"
            )
        means = None
    if means is None:
        if kind == "Q2_K_S" and wanted == "Q2_K" and name not in WITHOUT_IMPORTANCES:
            raise UserError(f"Q2_K_S: tensor {name} requires an imatrix, which has no entry for it")
        return None
    return means.reshape(experts, columns)


def _ahead(reading: Executor, calls: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """What the calls give, in order; each is made while the one before it is used."""
    waiting: Future[Any] | None = None
    for call in calls:
        following = reading.submit(call)
        if waiting:
            yield waiting.result()
        waiting = following
    if waiting:
        yield waiting.result()


def _slabs(tensor: Any) -> Iterator[tuple[int, int]]:
    """Rows of a tensor, from and to, all of one expert."""
    columns, of_expert = int(tensor.shape[0]), int(tensor.shape[1])
    step = max(1, SLAB // columns)
    for start in range(0, tensor.n_elements // columns, of_expert):
        for first in range(start, start + of_expert, step):
            yield first, min(first + step, start + of_expert)


def _read(tensor: Any, first: int, end: int, device: str) -> Any:
    """Rows as they are stored, for a GPU in page-locked memory."""
    import torch

    stored = torch.from_numpy(tensor.data.reshape(-1, tensor.data.shape[-1])[first:end])
    if device == "cpu":
        return stored
    return torch.empty(stored.shape, dtype=stored.dtype, pin_memory=True).copy_(stored)


def _encoded(
    tensor: Any,
    wanted: str,
    importance: Any,
    device: str,
    slabs: Iterator[Any],
    checking: Executor,
    checks: list[tuple[int, Future[int]]],
) -> Any:
    """A tensor's blocks (or float16 numbers), uint8 [experts x out, bytes of a row], made of the next of `slabs`. To
    `checks` come how many rows are compared, and how many of them will be found equal."""
    import torch
    from workbench_kernels.encoders.encode import encode

    make: Callable[..., Any] = encode if wanted != "F16" else _half
    blocks: Any = None
    for first, end in _slabs(tensor):
        means = None
        if importance is not None and wanted != "F16":
            means = importance[first // int(tensor.shape[1])].copy()
        slab = _float32(next(slabs), tensor, device)
        made = make(wanted, slab, None if means is None else torch.from_numpy(means).to(device))
        if blocks is None:
            rows = tensor.n_elements // slab.shape[1]
            blocks = torch.empty(rows, made.shape[1], dtype=torch.uint8, pin_memory=device != "cpu")
        blocks[first:end].copy_(made, non_blocking=True)
        picked = torch.linspace(0, len(slab) - 1, min(CHECKED_ROWS, len(slab))).long()
        # Waits for the copy as well.
        some = slab[picked.to(device)].cpu().numpy()
        equal = checking.submit(same_as_llama_cpp, wanted, some, means, blocks[first + picked].numpy())
        checks.append((len(picked), equal))
        if device == "cpu":  # whose threads are all at it
            equal.result()
    return blocks.numpy()


def _float32(stored: Any, tensor: Any, device: str) -> Any:
    import torch

    if tensor.tensor_type.name not in FLOATS:
        raise ValueError(f"it is {tensor.tensor_type.name}; supported: {', '.join(FLOATS)}")
    if tensor.tensor_type.name == "BF16":
        stored = stored.view(torch.bfloat16)
    return stored.to(device, non_blocking=True).float()


def _half(wanted: str, weight: Any, importance: None) -> Any:
    import torch

    made = weight.half()
    if not bool(made.isfinite().all()):
        raise ValueError("it holds numbers that float16 does not; supported: smaller ones")
    return made.view(torch.uint8)
