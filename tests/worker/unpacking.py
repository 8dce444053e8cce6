"""AWQ's, GPTQ's and GGUF's layouts read back, independently of `kernels/`: what packed tensors are held against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from workbench.errors import UserError
from workbench.worker.calibration.discover import structures_of
from workbench.worker.ggml.names import file_columns, tensor_names
from workbench.worker.methods.awq import NIBBLES

torch = pytest.importorskip("torch")


def unpack_awq(packed: Any) -> Any:
    """The inverse of `awq.pack`: int32 [n, words] -> uint8 [n, words x 8]."""
    codes = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for nibble, column in enumerate(NIBBLES):
        codes[:, :, column] = ((packed >> (4 * nibble)) & 15).to(torch.uint8)
    return codes.reshape(packed.shape[0], -1)


def dequantize_awq(tensors: dict[str, Any]) -> Any:
    """A stored linear layer's weight, float32 [out, in], from its `qweight`, `qzeros`, `scales`."""
    codes, zeros = unpack_awq(tensors["qweight"]).to(torch.float32), unpack_awq(tensors["qzeros"]).to(torch.float32)
    size = codes.shape[0] // zeros.shape[0]
    scales = tensors["scales"].to(torch.float32)
    wide = codes.view(-1, size, codes.shape[1])
    return ((wide - zeros[:, None]) * scales[:, None]).reshape(codes.shape).t().contiguous()


def unpack_gptq(packed: Any, bits: int) -> Any:
    """The inverse of `gptq.pack`: int32 [words, m] -> uint8 [words x 32 / bits, m]."""
    common = math.gcd(bits, 32)
    values, words = 32 // common, bits // common
    table = packed.reshape(-1, words, packed.shape[1]).to(torch.int64) & 0xFFFFFFFF
    codes = torch.empty(table.shape[0], values, packed.shape[1], dtype=torch.uint8, device=packed.device)
    for i in range(values):
        word, shift = divmod(i * bits, 32)
        value = table[:, word] >> shift
        if shift + bits > 32:
            value |= table[:, word + 1] << (32 - shift)
        codes[:, i] = (value & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(-1, packed.shape[1])


def dequantize_gptq(tensors: dict[str, Any], bits: int) -> Any:
    """A stored linear layer's weight, float32 [out, in], from its `qweight`, `qzeros`, `scales`, `g_idx`."""
    codes = unpack_gptq(tensors["qweight"], bits).to(torch.float32)
    zeros = ((unpack_gptq(tensors["qzeros"].t(), bits).to(torch.int64) + 1) & (2**bits - 1)).t().to(torch.float32)
    group = tensors["g_idx"].to(torch.int64)
    return ((codes - zeros[group]) * tensors["scales"].to(torch.float32)[group]).t().contiguous()


def exact(model: Any, ids: list[int]) -> Any:
    """A model's own logits in float32, [tokens - 1, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1]


def load_base(folder: Path) -> Any:
    import transformers

    # Gemma 2's capped scores are left out by the fast kernel.
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def from_gguf(base: Path, path: str, without: str = "none") -> Any:
    """The base's model with a GGUF file's matrices in place, de-quantized by the `gguf` package; those of the type
    `without` stay the base's."""
    import gguf

    config = json.loads((base / "config.json").read_text())
    # Gemma's files have no output matrix and no name for one.
    weights = ["model.embed_tokens.weight", *(name for name in ("lm_head.weight",) if _named(config, name))]
    for layer, structure in enumerate(structures_of(config)):
        weights += [f"model.layers.{layer}.{linear}.weight" for linear in structure.linears]
    names = {short: name for name, short in tensor_names(config, weights).items()}
    model = load_base(base)
    state = model.state_dict()
    seen = set()
    for tensor in gguf.GGUFReader(path).tensors:
        seen.add(tensor.name)
        if tensor.name in names and tensor.tensor_type.name != without:
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            weight = weight.reshape(state[names[tensor.name]].shape)
            if config["model_type"] in ("llama", "mistral") and ".attn_q." in tensor.name:
                weight = unpermuted(weight, config["num_attention_heads"])
            if config["model_type"] in ("llama", "mistral") and ".attn_k." in tensor.name:
                weight = unpermuted(weight, config["num_key_value_heads"])
            state[names[tensor.name]] = weight
    assert set(names) - seen <= {"output.weight"}
    model.load_state_dict(state)
    return model


def unpermuted(weight: Any, heads: int) -> Any:
    """llama.cpp's Llama keeps a head's rotary pairs side by side; the checkpoint keeps them half a head apart."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def with_files_weights(base: Path, exact_path: str, path: str) -> Any:
    """The base's model with a GGUF file's matrices in place, their rows in the order that a file of the same
    architecture with the base's own weights shows."""
    import gguf

    config = json.loads((base / "config.json").read_text())
    model = load_base(base)
    state = model.state_dict()
    names = {short: name for name, short in _names(config, state).items()}
    own = {tensor.name: tensor for tensor in gguf.GGUFReader(exact_path).tensors}
    tiled = file_columns(config)
    for tensor in gguf.GGUFReader(path).tensors:
        name = names.get(tensor.name)
        if tensor.name.endswith("_exps.weight"):
            _, layer, part, _ = tensor.name.split(".")
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            places_of_experts(config["model_type"], state, f"model.layers.{layer}.")[part].copy_(weight)
        if tensor.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
            _, layer, part, _ = tensor.name.split(".")
            weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            both = state[f"model.layers.{layer}.self_attn.kv_b_proj.weight"].unflatten(0, (len(weight), -1))
            # DeepSeek's heads: keys above values, and the keys' part turned.
            keys = config["qk_nope_head_dim"]
            place, turned = (both[:, :keys], weight.mT) if part == "attn_k_b" else (both[:, keys:], weight)
            place.copy_(turned)
        if name is None or len(tensor.shape) != 2 or tensor.tensor_type.name == "F32":
            continue
        columns = tiled.get(name.split(".", 3)[-1].removesuffix(".weight"), torch.arange(state[name].shape[1]))
        wanted = state[name][:, columns]
        rows = torch.from_numpy(own[tensor.name].data.copy())
        apart = torch.cdist(wanted.double(), rows.double())
        assert float(apart.min(1).values.max()) < 1e-6, f"{tensor.name} holds other rows than {name}"
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        state[name] = weight[apart.argmin(1)][:, columns.argsort()]
    model.load_state_dict(state)
    return model


def places_of_experts(kind: str, state: dict[str, Any], layer: str) -> dict[str, Any]:
    """A layer's experts as a GGUF file has them, [experts, out, in], in the memory of transformers' own tensors."""
    pair, down = (
        next(each for name, each in state.items() if name.startswith(layer) and name.endswith(f".experts.{part}"))
        for part in ("gate_up_proj", "down_proj")
    )
    if kind in ("gpt_oss", "llama4_text"):
        pair, down = pair.transpose(1, 2), down.transpose(1, 2)
    gate, up = (pair[:, ::2], pair[:, 1::2]) if kind == "gpt_oss" else pair.chunk(2, 1)
    return {"ffn_gate_exps": gate, "ffn_up_exps": up, "ffn_down_exps": down}


def _names(config: dict[str, Any], state: dict[str, Any]) -> dict[str, str]:
    weights = [name for name, tensor in state.items() if name.endswith(".weight") and tensor.dim() == 2]
    return {name: short for each in weights for name, short in _named(config, each).items()}


def _named(config: dict[str, Any], name: str) -> dict[str, str]:
    try:
        return tensor_names(config, [name])
    except UserError:
        return {}
