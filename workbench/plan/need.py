"""What one variant needs in one engine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from workbench.recipe.choices import BackendChoice, limits_of
from workbench.records import Artifact, Variant
from workbench.shape import DTYPE_BYTES, SCORE_CHUNK_BYTES, UBATCH_TOKENS, NamedShape, Shape
from workbench.worker.backends import BACKENDS
from workbench.worker.ggml.mixtures import tensor_bytes, types_of
from workbench.worker.methods import group_sizes

DTYPE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F32"}
CONTEXT_STEP = 256
"""llama.cpp rounds a sequence's context up to this."""
VLLM_BLOCK_TOKENS = 16
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "fp8": 1.0}
"""Bytes a value of the KV cache."""
REPACKED = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL"})
"""Types that llama.cpp copies into another layout on an x86 processor with AVX-512 (`ggml-cpu/repack.cpp`)."""
RUNTIME_BYTES = {"llamacpp": 285e6, "transformers": 480e6, "vllm": 1050e6, "awq": 735e6, "gptq": 895e6}
"""Resident memory of an interpreter with an engine's libraries and no model; `awq`, `gptq`: transformers with
GPTQModel and its layers. Measured: torch 2.13 (CPU), transformers 5.19, vLLM 0.32, llama-cpp-python 0.3.36, CPython
3.11, x86-64."""
CUDA_CONTEXT_BYTES = 600e6
"""What a CUDA context and its libraries take of a GPU's memory, by common report; not measured here."""


class Point(NamedTuple):
    """Sequences in memory at once."""

    tokens: int
    """Of each sequence, prompt and new ones."""
    batch: int
    prompt_tokens: int


@dataclass(frozen=True)
class Need:
    """One variant in one engine. Bytes; None where the pair cannot run."""

    variant: str
    backend: str
    options: dict[str, Any]
    disk_bytes: int
    """All weight tensors as stored: what `Artifact.disk_bytes` will be."""
    bits_per_weight: float
    weights_bytes: int | None = None
    """In the engine's memory."""
    kv_cache_bytes: int | None = None
    workspace_bytes: int | None = None
    runtime_bytes: int | None = None
    need_bytes: int | None = None
    """The sum of the four."""
    fits: bool | None = None
    fits_context_tokens: int | None = None
    """The longest context that would fit, where this one does not."""
    fallbacks: tuple[str, ...] = ()
    """Tensors that get another type than the mixture means for them."""
    notes: tuple[str, ...] = ()
    unsupported: str | None = None


@dataclass(frozen=True)
class Plan:
    """A recipe's needs on a memory of a given size."""

    recipe: str
    model: str
    parameters: int
    context_tokens: int
    """Of the longest sequence: prompt and new tokens."""
    batch: int
    """The largest."""
    device: str
    """`cpu` or `cuda`."""
    memory_bytes: int
    disk_bytes: int
    """Of everything the recipe makes, the prepared base and the conversion included."""
    free_disk_bytes: int
    needs: tuple[Need, ...]
    """Each at the point that needs most."""
    points: tuple[Point, ...] = ()


def need_of(
    shape: Shape, variant: Variant, choice: BackendChoice, tokens: int, batch: int, prompt: int, window: int, cuda: bool
) -> Need:
    """What one variant needs in one engine for `batch` sequences of `tokens`, and to score windows of `window`."""
    import importlib

    stored, types, fallbacks = stored_bytes(shape, variant, choice.name)
    bits = round(stored * 8 / shape.parameters, 4)
    need = Need(variant.name, choice.name, choice.options, stored, bits, fallbacks=tuple(fallbacks))
    module = importlib.import_module(BACKENDS[choice.name])
    kind = "gguf" if choice.name == "llamacpp" and variant.method == "base" else _format(variant)
    reason = module.unsupported(Artifact(variant.name, variant.method, kind, "", "", 0, 0), cuda)
    reason = reason or limits_of(variant).get(choice.name)
    if reason is None and hasattr(module, "refuses"):
        reason = module.refuses(choice.options, cuda)
    reason = _undivided(shape, variant) or reason
    if reason:
        return replace(need, unsupported=reason)
    if choice.name == "llamacpp":
        weights, workspace = _llamacpp(shape, stored, types, batch, window, prompt, cuda, choice.options)
    elif choice.name == "vllm":
        weights, workspace = _vllm(shape, variant, stored, batch, window, prompt, choice.options)
    else:
        weights, workspace = _transformers(shape, variant, stored, batch, window, prompt, cuda, choice.options)
    cache = kv_cache_bytes(shape, choice, tokens, batch, cuda, variant.method in ("awq", "gptq"))
    quantized = choice.name == "transformers" and variant.method in ("awq", "gptq")
    runtime = CUDA_CONTEXT_BYTES if cuda else RUNTIME_BYTES.get(variant.method if quantized else choice.name, 0)
    notes = []
    if shape.sliding_window:
        notes.append(f"layers with a sliding window of {shape.sliding_window} may keep less than this KV cache")
    if kind == "gguf" and choice.name == "transformers":
        notes.append("a GGUF is de-quantized when transformers loads it")
    return replace(
        need,
        weights_bytes=int(weights),
        kv_cache_bytes=int(cache),
        workspace_bytes=int(workspace),
        runtime_bytes=int(runtime),
        need_bytes=int(weights + cache + workspace + runtime),
        notes=tuple(notes),
    )


def stored_bytes(shape: Shape, variant: Variant, backend: str) -> tuple[int, dict[str, str], list[str]]:
    """Bytes of a variant's tensors on disk, their types (of a GGUF), and which of them fell back."""
    if variant.method == "gguf" or (variant.method == "base" and backend == "llamacpp"):
        # llama.cpp's base has 16 bits even where the base has 32.
        kind = variant.options.get("type") or ("BF16" if shape.dtype == "float32" else DTYPE_TYPES[shape.dtype])
        imatrix = bool(variant.options.get("imatrix"))
        types, fell = types_of(kind, shape.tensors, shape.traits, imatrix)
        return sum(tensor_bytes(types[tensor.name], tensor) for tensor in shape.tensors), types, sorted(fell)
    if variant.method == "base":
        return shape.parameters * DTYPE_BYTES[shape.dtype], {}, []
    return sum(_packed(tensor, variant) for tensor in shape.tensors), {}, []


def kv_cache_bytes(
    shape: Shape, choice: BackendChoice, tokens: int, batch: int, cuda: bool, packed: bool = False
) -> float:
    """The formula of the module docstring, with the engine's rounding of tokens and its type of values;
    `packed`: AWQ or GPTQ, which transformers computes in 16 bits everywhere."""
    width = KV_BYTES.get(str(choice.options.get("kv_cache")), 2.0)
    if choice.name == "llamacpp":
        tokens = -(-tokens // CONTEXT_STEP) * CONTEXT_STEP
    elif choice.name == "vllm":
        tokens = -(-tokens // VLLM_BLOCK_TOKENS) * VLLM_BLOCK_TOKENS
    if choice.name == "transformers" and not packed:
        width = _compute_bytes(choice.options, shape, cuda)
    values = shape.latent if shape.latent else 2 * shape.traits.kv_heads * shape.head_dim
    return values * shape.traits.layers * tokens * batch * width


def _format(variant: Variant) -> str:
    return "safetensors" if variant.method == "base" else variant.method


def _packed(tensor: NamedShape, variant: Variant) -> int:
    """Bytes of one tensor in an AWQ or GPTQ checkpoint; what is no linear layer of a decoder layer has 16 bits.

    AWQ "gemm": codes int32 [in, out / 8], zeros int32 [groups, out / 8], scales float16 [groups, out]. GPTQ v1: codes
    int32 [in x bits / 32, out], zeros int32 [groups, out x bits / 32], scales the same, g_idx int32 [in].
    """
    kept = variant.options.get("modules_to_not_convert") or ()
    if not _linear(tensor) or any(_LINEARS[tensor.name.split(".")[2]].endswith(name.split(".")[-1]) for name in kept):
        return tensor.weights * 2
    out, row = tensor.shape
    bits = int(variant.options.get("bits", 4))
    size = int(variant.options.get("group_size", 128))
    groups = 1 if size == -1 else -(-row // size)
    total = row * out * bits // 8 + groups * out * bits // 8 + groups * out * 2
    return total + (row * 4 if variant.method == "gptq" else 0)


def _undivided(shape: Shape, variant: Variant) -> str | None:
    """Why AWQ or GPTQ cannot be made of a shape: a linear layer whose inputs its groups do not divide."""
    size = int(variant.options.get("group_size", 128))
    if variant.method not in ("awq", "gptq") or variant.options.get("engine", "workbench") != "workbench" or size == -1:
        return None
    columns = {tensor.shape[1] for tensor in shape.tensors if _linear(tensor)}
    if all(count % size == 0 for count in columns):
        return None
    possible = map(str, group_sizes(columns))
    return f"group_size {size} does not divide the inputs of every layer; take {' or '.join([*possible, '-1'])}"


def _linear(tensor: NamedShape) -> bool:
    """Whether it is a matrix of a decoder layer, which AWQ and GPTQ quantize."""
    return tensor.layer is not None and len(tensor.shape) == 2 and tensor.name.split(".")[2] in _LINEARS


_LINEARS = {
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_qkv": "qkv_proj",
    "attn_output": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}


def _llamacpp(
    shape: Shape,
    stored: int,
    types: dict[str, str],
    batch: int,
    window: int,
    prompt: int,
    cuda: bool,
    options: dict[str, Any],
) -> tuple[float, float]:
    """llama.cpp's weights and workspace.

    A processor's weights are the mapped file, and a second copy of what is repacked. The graph's buffer is as wide
    as its widest step for a micro-batch: the logits, or the MLP. A processor touches no more of it than it uses.
    """
    width = min(UBATCH_TOKENS, max(batch * prompt, window, batch))
    scored = -(-window // 2) if window else 0
    logits = max(scored, batch) * shape.vocab_size * 4.0
    widest = max(shape.vocab_size + shape.hidden, 2 * shape.inner + 3 * shape.hidden)
    if cuda:
        return stored, width * widest * 4 + logits
    repacked = sum(
        tensor_bytes(types[t.name], t)
        for t in shape.tensors
        if types[t.name] in REPACKED and len(t.shape) == 2 and t.shape[0] % 8 == 0 and t.layer is not None
    )
    touched = max(logits + width * shape.hidden * 4, width * (2 * shape.inner + 3 * shape.hidden) * 4)
    return stored + (repacked if options.get("repack", True) else 0), touched + logits + SCORE_CHUNK_BYTES


def _transformers(
    shape: Shape,
    variant: Variant,
    stored: int,
    batch: int,
    window: int,
    prompt: int,
    cuda: bool,
    options: dict[str, Any],
) -> tuple[float, float]:
    """transformers' weights and workspace: a layer's activations of a whole prompt, and the scored logits."""
    width = 4 if cuda is False else 2
    weights: float = stored
    if variant.method in ("base", "gguf"):
        width = _compute_bytes(options, shape, cuda)
        weights = shape.parameters * width
    tokens = max(batch * prompt, window)
    activations = tokens * (3 * shape.inner + 4 * shape.hidden) * width
    logits = (-(-window // 2) if window else 0) * shape.vocab_size * (width + 4.0)
    return weights, max(activations, logits) + SCORE_CHUNK_BYTES


def _vllm(
    shape: Shape, variant: Variant, stored: int, batch: int, window: int, prompt: int, options: dict[str, Any]
) -> tuple[float, float]:
    """vLLM's need, not what it reserves: weights in its dtype, activations of a batch of prompts, logits in float32."""
    width = DTYPE_BYTES.get(str(options.get("dtype", "auto")), 2)
    weights = shape.parameters * width if variant.method == "base" else stored
    tokens = max(batch * prompt, window)
    logits = max(window, batch) * shape.vocab_size * 4.0 * 2
    return weights, tokens * (3 * shape.inner + 4 * shape.hidden) * width + logits


def _compute_bytes(options: dict[str, Any], shape: Shape, cuda: bool) -> int:
    """Bytes a value in transformers: as `backends/transformers.py` chooses the dtype."""
    chosen = str(options.get("dtype", "auto"))
    if chosen != "auto":
        return DTYPE_BYTES[chosen]
    return DTYPE_BYTES[shape.dtype] if cuda and options.get("device") != "cpu" else 4
