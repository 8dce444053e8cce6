"""Files as others make them: by llama.cpp's own quantizer, split by the `gguf` package, packed as AutoAWQ packs."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

NIBBLES_OF_AUTOAWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def convert(base: Path, out: Path) -> Path:
    """A directory as a GGUF file of 32 bits, by llama.cpp's converter."""
    from workbench.worker.methods import gguf

    gguf.convert({"base": str(base), "out": str(out), "dtype": "float32", "name": "Others"}, lambda *_: None)
    return out


def quantize(source: Path, out: Path, kind: str, importance: dict[str, Any] | None = None) -> Path:
    """As `llama-quantize` does it; with an importance matrix it notes the same entries as that."""
    import llama_cpp

    from workbench.worker.ggml.imatrix import as_quantize_pointer

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), 1
    overrides = (llama_cpp.llama_model_kv_override * 3)()
    if importance:
        keep = as_quantize_pointer(importance)
        params.imatrix = keep.pointer
        for each, (key, value) in zip(
            overrides, {"file": "others.imatrix", "dataset": "others.txt"}.items(), strict=False
        ):
            each.tag, each.key = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR, f"quantize.imatrix.{key}".encode()
            each.value.val_str = value.encode()
        params.kv_overrides = overrides
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)) == 0
    return out


def split(source: Path, folder: Path, tensors: int, bare: bool = False) -> Path:
    """The first part of a copy in parts of so many tensors, by the `gguf` package's writer; `bare`: it holds none, as
    llama-gguf-split's `--no-tensor-first-split` has it. The parts have that program's keys and tensors."""
    return rewrite(source, folder / source.name, split_max_tensors=tensors, bare=bare)


def unpack(source: Path, out: Path) -> Path:
    """A copy of a GGUF file with the same weights, none of them quantized."""
    return rewrite(source, out, plain=True)


def rewrite(
    source: Path, out: Path, *, split_max_tensors: int = 0, bare: bool = False, plain: bool = False, **entries: Any
) -> Path:
    """A copy of a GGUF file with other `entries` (`__` for a dot; None: without it); `plain`: in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    changed = {key.replace("__", "."): value for key, value in entries.items()}
    kind = changed.get("general.architecture", reader.fields["general.architecture"].contents())
    out.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(out, kind, split_max_tensors=split_max_tensors, small_first_shard=bare)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or changed.get(key, key) is None:
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, changed.get(key, field.contents()), field.types[0], inner)
    for tensor in reader.tensors:
        if plain:
            writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first = out.with_name(f"{out.stem}-00001-of-{len(writer.tensors):05}.gguf")
    return first if split_max_tensors else out


def pack_as_autoawq(base: Path, out: Path, size: int = 64) -> Path:
    """A directory's linear layers rounded to nearest and packed as AutoAWQ's `WQLinear_GEMM.from_linear` does it."""
    from safetensors.torch import load_file

    tensors, made = load_file(base / "model.safetensors"), dict[str, Any]()
    for name, weight in tensors.items():
        if not (name.startswith("model.layers.") and weight.dim() == 2):
            made[name] = weight.half()
            continue
        table = weight.float().reshape(weight.shape[0], -1, size)
        low, high = table.amin(2), table.amax(2)
        scales = ((high - low).clamp(min=1e-5) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15)
        codes = ((table + (zeros * scales.float())[:, :, None]) / scales.float()[:, :, None]).round().clamp(0, 15)
        stem = name.removesuffix(".weight")
        made[f"{stem}.qweight"] = _words(codes.reshape(weight.shape).t())
        made[f"{stem}.qzeros"], made[f"{stem}.scales"] = _words(zeros.t()), scales.t().contiguous()
    _save_beside(base, out, made)
    how = {"bits": 4, "group_size": size, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
    configure(out, quantization_config=how | {"zero_point": True}, torch_dtype="float16", dtype=None)
    return out


def pack_by_gptqmodel(base: Path, out: Path, method: str, bits: int = 4, size: int = 32) -> Path:
    """A directory's linear layers rounded to nearest, AWQ between each group's extremes and GPTQ around zero, and
    packed by GPTQModel's own layers: AutoAWQ's layout, or version 1 of GPTQ's."""
    import torch
    from gptqmodel import QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
    from safetensors.torch import load_file

    largest, made = 2**bits - 1, dict[str, Any]()
    for name, weight in load_file(base / "model.safetensors").items():
        if not (name.startswith("model.layers.") and weight.dim() == 2):
            made[name] = weight.half()
            continue
        groups = weight.float().unflatten(1, (-1, size))
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        if method == "gptq":
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / largest).half().float()
        zeros = torch.full_like(scales, 2 ** (bits - 1)) if method == "gptq" else (-low / scales).round()
        codes = ((groups / scales[:, :, None]).round() + zeros[:, :, None]).clamp(0, largest)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = ((codes - zeros[:, :, None]) * scales[:, :, None]).flatten(1)
        sizes, stem = (weight.shape[1], weight.shape[0]), name.removesuffix(".weight")
        if method == "awq":
            layer: Any = AwqTorchLinear(bits, size, False, False, *sizes, pack_dtype=torch.int32)
            layer.pack(linear, scales, zeros)
        else:
            layer = TorchLinear(bits, size, True, False, *sizes)
            layer.pack(linear, scales, zeros, torch.arange(weight.shape[1], dtype=torch.int32) // size)
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=size))
        parts = ("qweight", "qzeros", "scales", *(("g_idx",) if method == "gptq" else ()))
        made |= {f"{stem}.{part}": getattr(layer, part).contiguous() for part in parts}
    _save_beside(base, out, made)
    how: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": size}
    if method == "awq":
        how |= {"zero_point": True, "version": "gemm"}
    else:
        how |= {"sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    configure(out, quantization_config=how, torch_dtype="float16", dtype=None)
    return out


def configure(folder: Path, **changes: Any) -> None:
    """Change entries of a config.json; None removes one."""
    content = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def _words(codes: Any) -> Any:
    import torch

    words = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int64)
    for place, column in enumerate(NIBBLES_OF_AUTOAWQ):
        words |= codes.long()[:, column::8] << 4 * place
    return words.where(words < 1 << 31, words - (1 << 32)).int()


def _save_beside(base: Path, out: Path, tensors: dict[str, Any]) -> None:
    """Tensors as a directory with whatever else the base's has."""
    from safetensors.torch import save_file

    out.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
