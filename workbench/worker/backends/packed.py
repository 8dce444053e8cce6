"""A quantized artifact in transformers with its weights left packed, by the kernels of `kernels/`.

transformers builds the model from the artifact's configuration, empty; every linear layer (and embedding) whose weight
is packed in the file is replaced by a module that computes with it as it is, and the other tensors are put in their
places. A tensor without a place and a place without a tensor are both refused: half a model gives numbers too.

A GGUF file needs three things mapped back. Its configuration and the names of its tensors are asked of
transformers' own reader. Some tensors were also rearranged when the file was made (Llama's query and key heads);
transformers undoes that on de-quantized values, so its undoing is tried on the row numbers instead: where it only
moves rows, packed rows are moved the same way, and where it does more, that tensor is de-quantized.

Rejected: a quantizer registered with transformers (its hooks change between minor versions, and a GGUF's fixed
quantizer cannot be replaced), an own table of GGUF names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError
from workbench.shape import FLOATS
from workbench.worker import Tensors
from workbench.worker.base.checkpoint import checked_weights, is_multimodal, read_json
from workbench.worker.base.gguf_config import read_gguf
from workbench.worker.base.gguf_weights import Mapped
from workbench.worker.kernels import import_kernels
from workbench.worker.layers import kept_dtype

PACKED_FORMATS = ("awq", "gptq", "gguf")


@dataclass(frozen=True)
class PackedModel:
    """`model` in eval mode; `packed` and `dense`: how many weight matrices stay packed, and how many do not."""

    model: Any
    packed: int
    dense: int


def load(
    path: Path,
    format: str,
    *,
    dtype: str | None,
    device: str,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PackedModel:
    """The model of a checkpoint directory (`awq`, `gptq`) or of a GGUF file, its weights packed, on `device`.

    `dtype` of activations and of what is not packed; None: the checkpoint's own, for a GGUF the one the
    architecture is safe in. Raises `UserError` that names the tensor for what is not covered or not whole.
    """
    import_kernels()
    read = _read_gguf if format == "gguf" else read_checkpoint
    return read(path, dtype, device, attention, trust_remote_code)


# --- safetensors --------------------------------------------------------------------------------


def read_checkpoint(
    path: Path,
    dtype: str | None,
    device: str,
    attention: str | None,
    remote_code: bool,
    layer_of: Callable[[str, Any], Any] | None = None,
) -> PackedModel:
    """The model of a directory; `layer_of(name, bias)` gives its packed layers, by default those of `kernels/`."""
    from safetensors import safe_open
    from transformers import AutoConfig
    from workbench_kernels.modules import AwqLinear, GptqLinear

    if is_multimodal(read_json(path / "config.json")):
        raise UserError(f"{path}: `kernel: workbench` runs a language model by itself. Leave it out for a whole model.")
    left, opened = checked_weights(path), dict[Path, Any]()
    # Before transformers: it fills in, and warns of, what it will not be asked to do.
    try:
        bits = gptq_bits(path)
    except UserError as error:
        raise UserError(f"{error}. Leave `kernel: workbench` out") from None
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=remote_code, local_files_only=True)
    del config.quantization_config
    stems = sorted(name.removesuffix(".qweight") for name in left if name.endswith(".qweight"))
    if not stems:
        raise UserError(f"{path}: no tensor ends in `.qweight`: it is no AWQ or GPTQ checkpoint")
    model, kind = _empty(config, dtype or str(config.dtype or "float16").removeprefix("torch."), attention, remote_code)

    def take(name: str) -> Any:
        """A tensor's file is opened, and the tensor read onto the device, when it is taken; each is taken once."""
        if name not in left:
            raise UserError(f"{path}: tensor {name} is missing. Make the variant again.")
        file = left.pop(name).file
        if file not in opened:
            opened[file] = safe_open(file, framework="pt", device=device)
        return opened[file].get_tensor(name)

    for stem in stems:
        _linear(model, path, stem)
        bias = take(f"{stem}.bias").to(kind) if f"{stem}.bias" in left else None
        if layer_of:
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                left.pop(f"{stem}.{part}", None)
            _replace(model, path, stem, layer_of(stem, bias))
            continue
        qweight, qzeros, scales = (take(f"{stem}.{part}") for part in ("qweight", "qzeros", "scales"))
        try:
            if bits is None:
                module: AwqLinear | GptqLinear = AwqLinear(qweight, qzeros, scales, bias)
            else:
                module = GptqLinear(qweight, qzeros, scales, take(f"{stem}.g_idx"), bits, bias)
        except ValueError as error:
            raise UserError(f"{path}: {stem}: {error}. Leave `kernel: workbench` out.") from None
        _replace(model, path, stem, module)
    for name in list(left):
        _place(model, path, name, take(name), kind)
    return _finished(model, path, device, len(stems))


def gptq_bits(path: Path) -> int | None:
    """The bits of a GPTQ checkpoint, None of an AWQ one; `UserError` for a layout that there are no kernels for."""
    file = path / "config.json"
    found = read_json(file).get("quantization_config") or {}
    method, version = found.get("quant_method"), found.get("version", "gemm")
    layout = found.get("checkpoint_format") or found.get("format") or "gptq"
    good = (method == "awq" and str(version).lower() == "gemm" and found.get("bits") == 4) or (
        method == "gptq" and layout == "gptq"
    )
    if not good:
        said = {key: found[key] for key in ("quant_method", "version", "checkpoint_format", "bits") if key in found}
        raise UserError(
            f"{file}: quantization_config {said or 'is missing'}; supported are awq (version gemm, 4 bits) and gptq "
            "(checkpoint_format gptq)"
        )
    if method == "awq" and not found.get("zero_point", True):
        raise UserError(f"{file}: awq with zero_point false; supported is true")
    return int(found["bits"]) if method == "gptq" else None


# --- GGUF ---------------------------------------------------------------------------------------


def _read_gguf(path: Path, dtype: str | None, device: str, attention: str | None, remote_code: bool) -> PackedModel:
    import torch
    from workbench_kernels.gguf.planes import split
    from workbench_kernels.gguf.types import block_type
    from workbench_kernels.modules import BlockEmbedding, BlockLinear

    try:
        read = read_gguf(path)
    except UserError as error:
        cut = _first_cut_tensor(path)
        raise UserError(f"{error} The first tensor beyond its end is {cut}.") if cut else error from None
    model, kind = _empty(read.config, dtype or kept_dtype(read.config.to_dict()), attention, remote_code)
    mapped = Mapped(path, read, model)
    packed: dict[str, tuple[Any, str]] = {}
    values: Tensors = {}
    for tensor in read.reader.tensors:
        if "_exps." in tensor.name:
            raise UserError(
                f"{path}: tensor {tensor.name} is of experts, which `kernel: workbench` does not support. Leave it out."
            )
        if tensor.name not in mapped.names:
            continue
        name, type_name = mapped.names[tensor.name], tensor.tensor_type.name
        order = None
        if type_name not in FLOATS:
            try:
                block_type(type_name, tensor.name)
            except ValueError as error:
                raise UserError(f"{path}: {error}. Leave `kernel: workbench` out: it is then de-quantized.") from None
            order = mapped.row_order(tensor) if _packable(model, name) else None
        if order is None:
            values[name] = mapped.dense(tensor).to(device=device, dtype=kind)
        else:
            packed[name] = split(block_type(type_name), torch.from_numpy(tensor.data[order]).to(device)), type_name
    for name, (planes, type_name) in packed.items():
        stem = name.removesuffix(".weight")
        try:
            if type(model.get_submodule(stem)) is torch.nn.Embedding:
                module: BlockEmbedding | BlockLinear = BlockEmbedding(planes, type_name, kind)
            else:
                module = BlockLinear(planes, type_name, values.pop(f"{stem}.bias", None))
            _replace(model, path, stem, module)
        except ValueError as error:
            raise UserError(f"{path}: tensor {name}: {error}") from None
    for name, tensor in values.items():
        _place(model, path, name, tensor, kind)
    return _finished(model, path, device, len(packed))


def _first_cut_tensor(path: Path) -> str | None:
    """The name of the first tensor that a file is too short for, if its list of tensors is whole."""
    from transformers.integrations.gguf.reader import GgufHeader

    try:
        header = GgufHeader.from_file(str(path))
    except Exception:  # damaged in any way: then there is no name to give
        return None
    size_bytes = path.stat().st_size
    ends = ((t.name, header.data_start + t.offset + t.nbytes) for t in sorted(header.tensors, key=lambda t: t.offset))
    return next((name for name, end in ends if end > size_bytes), None)


def _packable(model: Any, name: str) -> bool:
    """Whether a parameter is the weight of a plain linear layer or embedding (a subclass may do more than look up)."""
    import torch

    stem, _, leaf = name.rpartition(".")
    return leaf == "weight" and type(model.get_submodule(stem)) in (torch.nn.Linear, torch.nn.Embedding)


# --- shared -------------------------------------------------------------------------------------


def _empty(config: Any, dtype: str, attention: str | None, remote_code: bool) -> tuple[Any, Any]:
    """The model without weights (its buffers are real), and its dtype."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    kind = getattr(torch, dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=kind, attn_implementation=attention, trust_remote_code=remote_code
        )
    return model, kind


def _linear(model: Any, path: Path, stem: str) -> Any:
    """The plain linear layer of that name."""
    import torch

    try:
        module = model.get_submodule(stem)
    except AttributeError:
        raise UserError(f"{path}: tensor {stem}.qweight has no place in transformers' {type(model).__name__}") from None
    if type(module) is not torch.nn.Linear:
        raise UserError(
            f"{path}: {stem} is a {type(module).__name__}; `kernel: workbench` supports plain linear layers"
        )
    return module


def _replace(model: Any, path: Path, stem: str, module: Any) -> None:
    """Put a packed module in a place of the same sizes."""
    old = model.get_submodule(stem)
    wanted = tuple(old.weight.shape)
    sizes = [getattr(module, key, None) for key in ("out_features", "in_features", "num_embeddings", "embedding_dim")]
    found = tuple(size for size in sizes if size is not None)
    if found != wanted:
        raise UserError(f"{path}: tensor {stem}.weight is {found}, the configuration says {wanted}. Make it again.")
    if getattr(old, "bias", None) is not None and module.bias is None:
        raise UserError(f"{path}: tensor {stem}.bias is missing. Make the variant again.")
    model.set_submodule(stem, module)


def _place(model: Any, path: Path, name: str, tensor: Any, kind: Any) -> None:
    """Put a tensor that is not packed into its parameter or buffer."""
    import torch

    stem, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(stem)
        old = getattr(module, leaf)
    except AttributeError:
        raise UserError(f"{path}: tensor {name} has no place in transformers' {type(model).__name__}") from None
    if tuple(old.shape) != tuple(tensor.shape):
        raise UserError(f"{path}: tensor {name} is {tuple(tensor.shape)}, the configuration says {tuple(old.shape)}")
    tensor = tensor.to(kind) if tensor.is_floating_point() else tensor
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _finished(model: Any, path: Path, device: str, packed: int) -> PackedModel:
    """Tie the head, see that nothing is missing, move what is left to the device."""
    import torch
    from workbench_kernels.modules import BlockEmbedding, BlockLinear

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is torch.nn.Linear and head.weight.is_meta and model.config.tie_word_embeddings:
        stem = next(name for name, module in model.named_modules() if module is head)
        if isinstance(embedding, BlockEmbedding):
            model.set_submodule(stem, BlockLinear(embedding.planes, embedding.kind, head.bias))
        else:
            head.weight = embedding.weight
    absent = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"{path}: tensor {absent[0]}{more} missing. Make the variant again.")
    model.to(device).eval()
    dense = sum(tensor.ndim == 2 for tensor in model.parameters())
    return PackedModel(model, packed, dense)


def _all_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
