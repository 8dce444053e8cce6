"""Which type llama.cpp gives each tensor of a mixture: what "Q4_K_M" means for a given shape.

A mixture's name is that of most of its tensors. The others get more or fewer bits by what they do and how deep
they lie, and a tensor whose rows its blocks do not divide gets another type altogether. The rules are facts
of llama.cpp's quantizer (`src/llama-quant.cpp`, as of llama-cpp-python 0.3.36), said here in a form that needs
no file and no engine, so that a plan can be made of a shape alone; the encoders go by them too. Tests hold them against
the quantizer's own dry run, mixture by mixture. What a file really holds is always read back from it
(`worker/methods/gguf.py`).

Rejected: bits a weight by name ("Q4_K_M is 4.85"). That holds for one shape; the same name is 5.1 bits for a
small model with a large vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from workbench.shape import NamedShape, Traits

BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_1": (32, 20),
    "Q4_0": (32, 18),
    "IQ4_NL": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q2_K": (256, 84),
    "IQ4_XS": (256, 136),
    "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98),
    "IQ2_S": (256, 82),
    "IQ2_XS": (256, 74),
    "IQ2_XXS": (256, 66),
    "IQ1_M": (256, 56),
    "IQ1_S": (256, 50),
}
"""Weights and bytes of a block of each type (ggml's `block_*` structures)."""

RULED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
"""Architectures, as GGUF files call them, for which the rules are held against the quantizer. Falcon has its own."""

FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a tensor gets if its rows are no multiple of 256; F16 if they are no multiple of 32 either."""

TINY = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
"""Mixtures of less than three bits, with rules of their own."""

UNQUANTIZED = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "shortconv.conv.weight", "position_embd")


def main_type(mixture: str) -> str:
    """The type of most of a mixture's tensors, where it has another name than the mixture."""
    others = {"IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}
    return others.get(mixture) or re.sub(r"_K_[SML]$", "_K", mixture)


def tensor_bytes(kind: str, tensor: NamedShape) -> int:
    """Bytes of a tensor stored as `kind`."""
    weights, size_bytes = BLOCKS[kind]
    return tensor.weights // weights * size_bytes


def types_of(
    mixture: str, tensors: Sequence[NamedShape], traits: Traits, imatrix: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """NamedShape name -> type for a mixture; and, of those that fell back, tensor name -> the type meant for it.

    Layers are counted in order, as the quantizer meets them. Tensors of one dimension are F32.
    """
    main = main_type(mixture)
    order = sorted(tensors, key=lambda tensor: (tensor.layer is not None, tensor.layer or 0, tensor.name))
    names = {tensor.name for tensor in tensors}
    values = sum(_role(tensor.name) in ("v", "qkv", "kv_b") for tensor in tensors)
    seen = {"v": 0, "down": 0, "gate": 0, "up": 0}
    types: dict[str, str] = {}
    fell: dict[str, str] = {}
    for tensor in order:
        if not is_quantized(tensor):
            types[tensor.name] = "F32"
            continue
        if main in ("F32", "F16", "BF16"):
            types[tensor.name] = main
            continue
        role = _role(tensor.name)
        meant = _type(mixture, main, tensor, role, traits, "output.weight" not in names, values, seen, imatrix)
        counted = "v" if role in ("qkv", "kv_b") else role
        if counted in seen:
            seen[counted] += 1
        types[tensor.name] = _fitting(meant, tensor.shape[-1])
        if types[tensor.name] != meant:
            fell[tensor.name] = meant
        elif role in ("output", "embedding") and tensor.shape[-1] % BLOCKS[main][0]:
            # Q8_0 was taken for want of a multiple of 256, before any rule for this tensor.
            fell[tensor.name] = main
    return types, fell


def is_quantized(tensor: NamedShape) -> bool:
    """Whether a mixture has a say in a tensor's type; the others stay as they are."""
    if len(tensor.shape) < 2 or not tensor.name.endswith("weight"):
        return False
    return not any(part in tensor.name for part in UNQUANTIZED)


def _fitting(kind: str, row: int) -> str:
    if row % BLOCKS[kind][0] == 0:
        return kind
    other = FALLBACK.get(kind, kind)
    return other if row % BLOCKS[other][0] == 0 else "F16"


_ROLES = (
    ("attn_qkv.weight", "qkv"),
    ("attn_kv_b.weight", "kv_b"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "out"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)


def _role(name: str) -> str:
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((role for part, role in _ROLES if part in name), "other")


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between: where an `_M` mixture spends its bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _type(
    mixture: str,
    main: str,
    tensor: NamedShape,
    role: str,
    traits: Traits,
    tied: bool,
    values: int,
    seen: dict[str, int],
    imatrix: bool,
) -> str:
    """The type meant for one tensor, before its shape has a say (but for the output's, where it has at once)."""
    if role == "output" or (tied and role == "embedding"):
        if tensor.shape[-1] % BLOCKS[main][0]:
            return "Q8_0"
        if mixture in TINY or mixture == "IQ3_XXS":
            return "Q5_K"
        return main if main == "Q8_0" else "Q6_K"
    if role == "embedding":
        if mixture in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
            return "Q2_K"
        return "IQ3_S" if mixture in ("IQ2_S", "IQ2_M", "IQ3_XXS") else main
    if mixture in TINY:
        return _tiny(mixture, main, role, traits, seen)
    if role in ("v", "qkv", "kv_b"):
        return _value(mixture, main, traits, values, seen["v"], imatrix)
    # Experts are not consecutive in every file, so the quantizer reads their layer off the name.
    layers = traits.layers
    layer = (tensor.layer or 0) if traits.experts > 1 else seen.get(role, 0)
    eight = traits.experts == 8
    if role == "k":
        return "Q8_0" if eight else {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mixture, main)
    if role == "q":
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mixture, main)
    if role == "down":
        return _down(mixture, main, layer, layers, eight, imatrix)
    if role == "out":
        if eight:
            small = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS")
            return "Q5_K" if mixture in small or mixture.startswith("IQ3") else main
        chosen = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return chosen.get(mixture, main)
    if role in ("gate", "up") and mixture == "IQ3_XS" and layers // 8 <= layer < 7 * layers // 8:
        return "IQ3_XXS"
    return main


def _tiny(mixture: str, main: str, role: str, traits: Traits, seen: dict[str, int]) -> str:
    wider = mixture in ("IQ2_S", "IQ2_M")
    if role in ("v", "qkv", "kv_b"):
        return "Q4_K" if traits.sharing >= 4 or traits.experts >= 4 else "IQ3_S" if wider else "Q2_K"
    if role == "k" and traits.experts == 8:
        return "Q4_K"
    if role == "down" and seen["down"] < traits.layers // 8:
        return "IQ3_S" if wider else "Q2_K"
    if role == "out":
        if traits.experts == 8:
            return "Q5_K"
        return "IQ3_S" if wider else "IQ2_XXS" if mixture in ("IQ1_S", "IQ1_M") else main
    return main


def _value(mixture: str, main: str, traits: Traits, values: int, layer: int, imatrix: bool) -> str:
    shared = traits.sharing >= 4
    kind = main
    if mixture == "Q2_K":
        kind = "Q4_K" if shared else "Q3_K"
    elif mixture in ("Q2_K_S", "IQ3_XS", "IQ3_S") and shared or mixture == "IQ3_M":
        kind = "Q4_K"
    elif mixture == "IQ3_XXS":
        kind = "Q4_K" if shared else "IQ3_XXS" if imatrix else "IQ3_S"
    elif mixture == "Q3_K_M":
        kind = "Q5_K" if layer < 2 else "Q4_K"
    elif mixture == "Q3_K_L" or (mixture in ("IQ4_NL", "IQ4_XS") and shared):
        kind = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, values):
        kind = "Q6_K"
    elif mixture == "Q4_K_S" and layer < 4:
        kind = "Q5_K"
    if traits.is_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if traits.experts == 8 else kind


def _down(mixture: str, main: str, layer: int, layers: int, eight: bool, imatrix: bool) -> str:
    first = layer < layers // 8
    if mixture == "Q2_K":
        return "Q3_K"
    if mixture == "Q2_K_S" and first:
        return "Q4_K"
    if mixture == "IQ3_XXS" and not imatrix:
        return "Q4_K" if first else "Q3_K"
    if mixture == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if mixture == "IQ3_M" and (first or (eight and _more_bits(layer, layers))):
        return "Q4_K"
    if mixture == "Q3_K_L" or (mixture == "Q4_K_S" and first):
        return "Q5_K"
    if mixture in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    if mixture in ("IQ4_NL", "IQ4_XS") and first and not imatrix:
        return "Q5_K"
    if mixture in ("Q4_0", "Q5_0") and imatrix and first:
        # The first ones can go astray even with an importance matrix; a zero point mends that.
        return "Q4_1" if mixture == "Q4_0" else "Q5_1"
    return main
