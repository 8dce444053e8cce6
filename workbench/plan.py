"""What a recipe will need before any of it is made: bytes of weights, KV cache and workspace, and what fits.

Pure arithmetic on a shape, which a worker reads from `config.json` and headers (`worker/shape.py`); no weights are
fetched and nothing is loaded. Weights are exact (each method's layout, and llama.cpp's own rules of which
tensor gets which type, in `mixtures.py`). The KV cache is

    2 x layers x kv_heads x head_dim x tokens x bytes a value

and the workspace what the widest step of a forward keeps at once. What an engine's libraries and an interpreter
take beside that (`RUNTIME_BYTES`) is measured, not derived. `benchmarks/plan_vs_measured.py` compares a plan with
stored rows.

Rejected: a safety factor over everything. It would hide an error, and tell people to buy twice the memory.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from workbench.errors import UserError, WorkFailed, did_you_mean
from workbench.home import home
from workbench.machine import isolate
from workbench.mixtures import Tensor, Traits, tensor_bytes, types_of
from workbench.recipe import BackendChoice, Recipe, limits_of
from workbench.records import Artifact, Variant, to_json
from workbench.worker.backends import BACKENDS
from workbench.worker.methods import group_sizes

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
DTYPE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F32"}
UBATCH_TOKENS = 512
"""Tokens that llama.cpp computes at once (`backends/llamacpp.py`)."""
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
SCORE_CHUNK_BYTES = 4 << 20
"""Working memory of one pass of `worker/quality.py` on a processor."""


class Point(NamedTuple):
    """Sequences in memory at once."""

    tokens: int
    """Of each sequence, prompt and new ones."""
    batch: int
    prompt_tokens: int


@dataclass(frozen=True)
class Shape:
    """A base as far as memory goes."""

    tensors: tuple[Tensor, ...]
    """Under GGUF's names; tied embeddings once."""
    traits: Traits
    hidden: int
    head_dim: int
    inner: int
    """Channels between the two halves of an MLP."""
    vocab_size: int
    context_tokens: int
    """0 if the configuration does not say."""
    dtype: str
    sliding_window: int | None = None
    latent: int | None = None
    """Values a token and layer, where keys and values are kept compressed (multi-head latent attention)."""

    @property
    def parameters(self) -> int:
        """Weights, tied embeddings once."""
        return sum(tensor.weights for tensor in self.tensors)


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


def make(
    recipe: Recipe, *, memory_bytes: int | None = None, context: int | None = None, batch: int | None = None,
    cuda: bool | None = None, shape: Shape | None = None,
) -> Plan:  # fmt: skip
    """The plan of a recipe, for this machine unless told otherwise.

    `context`: tokens of a sequence, prompt and new ones; `batch`: sequences at once; by default every point of the
    workload is looked at. `shape`: the base's, where it was read before. Raises `UserError` for a context longer
    than the model's, or a GPU that is not here.
    """
    from workbench.machine.identity import has_cuda, machine

    here = machine()
    cuda = has_cuda() if cuda is None else cuda
    if memory_bytes is None:
        if cuda and not here["gpus"]:
            raise UserError("--device cuda: there is no GPU here; say how much memory it has: --memory 24GiB")
        memory_bytes = min(gpu["memory_bytes"] for gpu in here["gpus"]) if cuda else here["memory_bytes"]
    shape = shape or shape_of(_read(recipe), f"{recipe.path}: base")
    load = recipe.workload
    for value, name in ((context, "context"), (batch, "batch")):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1")
    points = [Point(prompt_tokens + load.new_tokens, many, prompt_tokens) for prompt_tokens, many in load.points]
    if load.requests:
        points += [Point(load.prompt_tokens + load.longest_answer, many, load.prompt_tokens) for many in load.batches]
    if context is not None or batch is not None:
        tokens = load.longest if context is None else context
        points = [Point(tokens, load.batch if batch is None else batch, min(max(load.prompts), tokens))]
    longest = max(point.tokens for point in points)
    check_context(longest, shape.context_tokens, f"{recipe.path}: {'--context' if context else 'workload'}")
    window = recipe.evaluation.window if recipe.evaluation else 0
    needs = []
    for choice in recipe.backends:
        for variant in recipe.variants:
            if choice.takes(variant.name):
                each = [need_of(shape, variant, choice, *point, window, cuda) for point in points]
                place = max(range(len(points)), key=lambda i: each[i].need_bytes or 0)
                needs.append(_fitted(each[place], shape, variant, choice, points[place], window, cuda, memory_bytes))
    return Plan(
        recipe=recipe.name, model=recipe.model, parameters=shape.parameters, context_tokens=longest,
        batch=max(point.batch for point in points), points=tuple(points),
        device="cuda" if cuda else "cpu", memory_bytes=int(memory_bytes), disk_bytes=_all_disk(recipe, shape),
        free_disk_bytes=shutil.disk_usage(_existing(home())).free, needs=tuple(needs),
    )  # fmt: skip


def advice(recipe: Recipe, choice: BackendChoice, name: str) -> str:
    """For a job that ran out of memory: what the plan says it needs, and the batch that would fit; empty if nothing."""
    try:
        shape = shape_of(_read(recipe), f"{recipe.path}: base")
        made = make(recipe, shape=shape)
        need = next(n for n in made.needs if (n.variant, n.backend, n.options) == (name, choice.name, choice.options))
        if need.need_bytes is None:
            return ""
        said = (
            f"; by the plan a batch of {made.batch} needs {_size(need.need_bytes)} of {_size(made.memory_bytes)} here"
        )
        if need.fits:
            return said
        low, high = 0, made.batch
        while low < high:
            middle = (low + high + 1) // 2
            tried = make(recipe, batch=middle, shape=shape).needs[made.needs.index(need)]
            low, high = (middle, high) if tried.fits else (low, middle - 1)
    except (UserError, WorkFailed, StopIteration):
        return ""
    what = f"a batch of {low}" if low else "no batch, but fewer tokens or a smaller variant"
    return f"{said}, and {what} would fit"


def check_context(tokens: int, context_tokens: int, where: str) -> None:
    """Refuse sequences that are longer than the model takes."""
    if context_tokens and tokens > context_tokens:
        raise UserError(
            f"{where}: sequences of {tokens:,} tokens are longer than the model's context of {context_tokens:,}: "
            f"use fewer `prompt_tokens` or `new_tokens`"
        )


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
        need, weights_bytes=int(weights), kv_cache_bytes=int(cache), workspace_bytes=int(workspace),
        runtime_bytes=int(runtime), need_bytes=int(weights + cache + workspace + runtime), notes=tuple(notes),
    )  # fmt: skip


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


def shape_of(read: dict[str, Any], where: str) -> Shape:
    """What `worker/shape.py` answered, in the plan's terms. Raises `UserError` for a shape it cannot tell."""
    config = read["config"]
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    try:
        hidden, layers = int(text["hidden_size"]), int(text["num_hidden_layers"])
        heads = int(text["num_attention_heads"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: its config.json does not say {error}: the plan needs a decoder's sizes") from None
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    kind = str(text.get("model_type", "?"))
    experts = int(text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 0)
    if read["tensors"] is None:
        tensors = _tensors_of(text, kind, where)
    elif read["naming"] == "gguf":
        tensors = [Tensor(name, tuple(shape)) for name, shape in read["tensors"].items()]
    else:
        tensors = _renamed(read["tensors"])
    compressed = text.get("kv_lora_rank")
    window = text.get("sliding_window") if text.get("use_sliding_window", True) else None
    return Shape(
        tensors=tuple(tensors),
        traits=Traits(layers, heads, kv_heads, experts, kind),
        hidden=hidden, head_dim=head_dim, inner=int(text.get("intermediate_size") or 4 * hidden),
        vocab_size=int(text.get("vocab_size") or 0),
        context_tokens=int(text.get("max_position_embeddings") or 0), dtype=read["dtype"],
        sliding_window=int(window) if window else None,
        latent=int(compressed) + int(text.get("qk_rope_head_dim") or 0) if compressed else None,
    )  # fmt: skip


def objects(plan: Plan) -> list[dict[str, Any]]:
    """One flat object a variant and engine, SI units, None where a pair cannot run."""
    top = {
        "recipe": plan.recipe, "base": plan.model, "device": plan.device, "context_tokens": plan.context_tokens,
        "batch": plan.batch, "memory_bytes": plan.memory_bytes,
    }  # fmt: skip
    return [top | to_json(asdict(need)) for need in plan.needs]


def json_text(plan: Plan) -> str:
    """`objects` as a JSON list."""
    return json.dumps(objects(plan), indent=2, allow_nan=False) + "\n"


def terminal(plan: Plan) -> str:
    """A table for people, with what does not fit, cannot run or falls back in footnotes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    axis = any("kv_cache" in need.options and need.options["kv_cache"] not in (None, "auto") for need in plan.needs)
    left = ["variant", "backend", *(["kv cache"] if axis else [])]
    for heading in left:
        grid.add_column(heading, no_wrap=True)
    for heading in ("bpw", "disk", "weights", "KV cache", "workspace", "runtime", "need"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("fits", no_wrap=True)
    grid.add_column("note", no_wrap=True)
    footnotes: dict[str, int] = {}
    for need in plan.needs:
        words = list(need.notes)
        if need.unsupported:
            words.append(need.unsupported)
        if need.fallbacks:
            words.append(_fallback_words(need))
        if need.fits is False:
            fitting = need.fits_context_tokens
            words.append(f"a context of {fitting:,} tokens would fit" if fitting else "does not fit at any context")
        marks = ",".join(str(footnotes.setdefault(word, len(footnotes) + 1)) for word in words)
        sizes = (need.weights_bytes, need.kv_cache_bytes, need.workspace_bytes, need.runtime_bytes, need.need_bytes)
        grid.add_row(
            need.variant, need.backend, *([str(need.options.get("kv_cache") or "auto")] if axis else []),
            f"{need.bits_per_weight:.2f}", _size(need.disk_bytes), *map(_size, sizes),
            "cannot run" if need.unsupported else "yes" if need.fits else "NO", marks,
        )  # fmt: skip
    sequences = " or ".join(dict.fromkeys(f"{point.batch} x {point.tokens:,}" for point in plan.points))
    console = Console(highlight=False, width=160)
    with console.capture() as captured:
        console.print(
            f"{plan.model}: {plan.parameters / 1e6:,.1f} million weights; {sequences} tokens; "
            f"{_size(plan.memory_bytes)} of {'GPU' if plan.device == 'cuda' else 'host'} memory\n"
        )
        console.print(grid)
        console.print(f"\ndisk for all of it: {_size(plan.disk_bytes)}, {_size(plan.free_disk_bytes)} free")
        if plan.disk_bytes > plan.free_disk_bytes:
            console.print("  not enough: make room, or set WORKBENCH_HOME to a larger disk")
        for text, number in footnotes.items():
            console.print(f"[{number}] {text}", markup=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n")) + "\n"


FORMATS = {"terminal": terminal, "json": json_text}


def _read(recipe: Recipe) -> dict[str, Any]:
    """Ask a worker for the shape; it takes a moment of one core, so it does not wait for the machine."""
    payload = {
        "source": recipe.base.source(recipe.path.parent),
        "equivalent": recipe.base.equivalent.model_dump() if recipe.base.equivalent else None, "offline": False,
    }  # fmt: skip
    folder = home() / "logs" / f"plan-{time.time_ns()}"
    reply = isolate.call("workbench.worker.shape:read", payload, workdir=folder, time_limit_s=600)
    value = isolate.answer(reply, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return dict(value)


def _fitted(
    need: Need, shape: Shape, variant: Variant, choice: BackendChoice, point: Point, window: int, cuda: bool,
    memory_bytes: float,
) -> Need:  # fmt: skip
    """Whether it fits, and if not, the longest context that would."""
    if need.need_bytes is None:
        return need
    # Tensor parallelism divides weights and cache; what it repeats on each GPU is small.
    memory_bytes *= int(choice.options.get("tensor_parallel") or 1)
    if need.need_bytes <= memory_bytes:
        return replace(need, fits=True)
    low, high = 0, point.tokens
    while low < high:
        middle = (low + high + 1) // 2
        prompt_tokens = min(point.prompt_tokens, middle)
        tried = need_of(shape, variant, choice, middle, point.batch, prompt_tokens, window, cuda)
        if tried.need_bytes is not None and tried.need_bytes <= memory_bytes:
            low = middle
        else:
            high = middle - 1
    return replace(need, fits=False, fits_context_tokens=low or None)


def _all_disk(recipe: Recipe, shape: Shape) -> int:
    """Everything a recipe writes: the base where it is rewritten, one conversion, each variant once."""
    total = 0 if recipe.base.hub is None and recipe.base.path else shape.parameters * DTYPE_BYTES[shape.dtype]
    if any(v.method == "gguf" for v in recipe.variants) or any(c.name == "llamacpp" for c in recipe.backends):
        total += shape.parameters * DTYPE_BYTES[shape.dtype]
        if shape.dtype == "float32":
            total += stored_bytes(shape, Variant("base", "base"), "llamacpp")[0]
    return total + sum(stored_bytes(shape, v, "")[0] for v in recipe.variants if v.method != "base")


def _existing(folder: Any) -> Any:
    while not folder.exists():
        folder = folder.parent
    return folder


def _format(variant: Variant) -> str:
    return "safetensors" if variant.method == "base" else variant.method


def _packed(tensor: Tensor, variant: Variant) -> int:
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


def _linear(tensor: Tensor) -> bool:
    """Whether it is a matrix of a decoder layer, which AWQ and GPTQ quantize."""
    return tensor.layer is not None and len(tensor.shape) == 2 and tensor.name.split(".")[2] in _LINEARS


_LINEARS = {
    "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_qkv": "qkv_proj", "attn_output": "o_proj",
    "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip


def _llamacpp(
    shape: Shape, stored: int, types: dict[str, str], batch: int, window: int, prompt: int, cuda: bool,
    options: dict[str, Any],
) -> tuple[float, float]:  # fmt: skip
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
    shape: Shape, variant: Variant, stored: int, batch: int, window: int, prompt: int, cuda: bool,
    options: dict[str, Any],
) -> tuple[float, float]:  # fmt: skip
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


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20)) if value >= 2**p or p == 20)
    return f"{value / 2**power:.2f} {unit}" if power == 30 else f"{value / 2**power:.0f} {unit}"


def _fallback_words(need: Need) -> str:
    kinds: dict[str, int] = {}
    for name in need.fallbacks:
        kinds[re.sub(r"^blk\.\d+\.", "", name)] = kinds.get(re.sub(r"^blk\.\d+\.", "", name), 0) + 1
    listed = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in kinds.items())
    return f"{need.variant}: rows no multiple of 256, so another type for {listed}"


_NAMES = (
    (r"model\.embed_tokens\.", "token_embd."), (r"lm_head\.", "output."), (r"model\.norm\.", "output_norm."),
    (r"\.self_attn\.q_proj\.", ".attn_q."), (r"\.self_attn\.k_proj\.", ".attn_k."),
    (r"\.self_attn\.v_proj\.", ".attn_v."), (r"\.self_attn\.o_proj\.", ".attn_output."),
    (r"\.self_attn\.qkv_proj\.", ".attn_qkv."), (r"\.self_attn\.q_norm\.", ".attn_q_norm."),
    (r"\.self_attn\.k_norm\.", ".attn_k_norm."), (r"\.mlp\.gate_proj\.", ".ffn_gate."),
    (r"\.mlp\.up_proj\.", ".ffn_up."), (r"\.mlp\.gate_up_proj\.", ".ffn_up."), (r"\.mlp\.down_proj\.", ".ffn_down."),
    (r"\.mlp\.gate\.|\.block_sparse_moe\.gate\.", ".ffn_gate_inp."), (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."), (r"\.pre_feedforward_layernorm\.", ".ffn_norm."),
)  # fmt: skip
_EXPERT = re.compile(
    r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight"
)
_EXPERT_NAMES = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps",
}  # fmt: skip


def _renamed(tensors: dict[str, Sequence[int]]) -> list[Tensor]:
    """Hugging Face's names in GGUF's; a layer's experts become one tensor, as the converter writes them."""
    gemma = any("pre_feedforward_layernorm" in name for name in tensors)
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        expert = _EXPERT.fullmatch(name)
        if expert:
            layer = expert[1].rpartition(".")[2]
            whole = f"blk.{layer}.{_EXPERT_NAMES[expert[2]]}.weight"
            found[whole] = (found.get(whole, (0,))[0] + 1, *shape)
            continue
        new = name.replace(".language_model.", ".") if ".language_model." in name else name
        for pattern, word in _NAMES:
            if gemma and "post_attention_layernorm" in new:
                new = new.replace("post_attention_layernorm", "post_attention_norm")
            new = re.sub(pattern, word, new)
        found[re.sub(r"^model\.layers\.(\d+)\.", r"blk.\1.", new)] = tuple(shape)
    return [Tensor(name, shape) for name, shape in found.items()]


DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Decoders whose tensors follow from a configuration alone."""


def _tensors_of(config: dict[str, Any], kind: str, where: str) -> list[Tensor]:
    """The tensors of a dense decoder by its configuration."""
    if kind not in DENSE:
        raise UserError(
            f"{where}: the tensors of a '{kind}' do not follow from its config.json here. {did_you_mean(kind, DENSE)} "
            "Give the base as `hub:` or `path:`, whose files say them"
        )
    hidden, layers, heads = (int(config[k]) for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    inner, vocab_size = int(config["intermediate_size"]), int(config["vocab_size"])
    queries, keys = heads * head_dim, kv_heads * head_dim
    found = {"token_embd.weight": (vocab_size, hidden), "output_norm.weight": (hidden,)}
    # Gemma ties unless its configuration says otherwise.
    if not config.get("tie_word_embeddings", kind.startswith("gemma")):
        found["output.weight"] = (vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    if kind == "phi3":
        layer |= {"attn_qkv.weight": (queries + 2 * keys, hidden), "ffn_up.weight": (2 * inner, hidden)}
    else:
        layer |= {
            "attn_q.weight": (queries, hidden), "attn_k.weight": (keys, hidden), "attn_v.weight": (keys, hidden),
            "ffn_gate.weight": (inner, hidden), "ffn_up.weight": (inner, hidden),
        }  # fmt: skip
    layer |= {"attn_output.weight": (hidden, queries), "ffn_down.weight": (hidden, inner)}
    if kind == "qwen2" or config.get("attention_bias"):
        layer |= {"attn_q.bias": (queries,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
    if config.get("attention_bias") and kind in ("llama", "qwen3"):
        layer["attn_output.bias"] = (hidden,)
    if config.get("mlp_bias"):
        layer |= {"ffn_gate.bias": (inner,), "ffn_up.bias": (inner,), "ffn_down.bias": (hidden,)}
    if kind in ("qwen3", "gemma3_text"):
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    if kind.startswith("gemma"):
        layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    for index in range(layers):
        found |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    return [Tensor(name, shape) for name, shape in found.items()]
