"""The one pass over the base: AWQ, GPTQ and the importance matrix from the same Gram matrices.

For each decoder layer: read its weights from the memory-mapped safetensors, push the hidden states of all
calibration tokens through transformers' own layer class, accumulate G = mean(x x^T) for each distinct linear input,
let every variant quantize the layer from it, write, free, go on. The base is read once whatever the number of
variants. What is in memory is a layer, its Grams and a batch of activations; the hidden states of all tokens lie
in two memory-mapped files that take turns as a layer's input and output. Since only one layer is ever on the
device, a model larger than the device's memory needs no other arrangement.

What a layer is called with (masks, rotary embeddings, sliding windows) is not written here: a model without layers
is built by transformers, recorders are put in the layers' places, and its own `forward` is run once for each
length of window.

The checkpoint's shards are laid out before the first layer: all sizes follow from the configuration, so a full
disk shows at once, each tensor is written once at its final place, and work that was interrupted after layer n
goes on at layer n + 1 with the same bytes as if it had not been.

Precision: matrix products of the forward pass take bfloat16 inputs where the processor multiplies them natively
(twice as fast; the residual stream, norms and Grams stay float32), else float32. Rejected: the quantized layers'
outputs as the next layer's inputs. It needs a pass for every variant and ties them to each other.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import UserError, unknown
from workbench.records import digest
from workbench.worker.architectures import LAYERS, WAY_OUT, Architecture, Layer, describe
from workbench.worker.checkpoint import CONFIG_FILES, TOKENIZER_FILES, read_header
from workbench.worker.saving import for_both_readers

CALIBRATE_VERSION = 1
"""Of the bytes this pass writes for given inputs. Raise it when they change: older half-done work is then not used."""

SHARD_BYTES = 5_000_000_000
ACTIVATIONS = 2**23
"""Numbers in the widest activation of one batch: 32 MiB in float32."""
GRAM_BLOCK = 256
"""Only the blocks on and above the diagonal of a Gram matrix are multiplied out."""
FEWEST_TOKENS = 128
COPY_BYTES = 64_000_000
"""Unquantized tensors are converted and written in pieces of this size."""

STORED_BYTES = {"F16": 2, "BF16": 2, "I32": 4}
METHODS = ("awq", "gptq")

Progress = Callable[[float, float, str], Any]


def run(payload: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Worker: make all calibrated variants of a base in one pass.

    Payload: `base` (directory), `tokens` (JSON file `{"windows": [[id, ...], ...]}`), `tokens_digest`, `variants`
    (`name`, `method`, `options`, `out`: a directory, empty or with interrupted work), `imatrix_out` (file or null),
    `state` (directory that an interrupted run goes on from), `device` (`auto`, `cpu`, `cuda`, `cuda:1`), `threads`,
    `seed`, and optionally `precision` (`auto`, `float32`, `bfloat16`).

    Returns `seconds` by phase, `peak_rss_bytes`, `variants` (name -> `seconds`, `tensor_errors`, `tensor_types`,
    `warnings`), `imatrix`, `device`, `precision`. Raises `UserError` for input that cannot be calibrated on.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    started = time.perf_counter()
    if payload.get("threads"):
        torch.set_num_threads(int(payload["threads"]))
    torch.manual_seed(int(payload.get("seed") or 0))
    device = _device(payload.get("device") or "auto")
    precision = _precision(payload.get("precision") or "auto", device)
    base = _Base.open(Path(payload["base"]))
    windows = _windows(payload["tokens"], base)
    variants = [_Variant.prepare(entry, base) for entry in payload["variants"]]
    architecture = base.architecture
    _check_shapes(base, variants)

    work = _Work.open(Path(payload["state"]), _key(payload, base, device, precision), windows, base, variants)
    seconds = work.seconds
    with torch.inference_mode(), _disk_faults(work.folder):
        model = _Skeleton(base, windows, device)
        if work.layer == 0:
            with _timed(seconds, "read"):
                model.embed(work.hidden(0))
        units = _Units(progress, base.layers, len(model.batches), variants, work.layer)
        for index in range(work.layer, base.layers):
            with _timed(seconds, "read"):
                tensors = base.layer(index, device)
            grams = _forward(model, architecture, index, tensors, work, precision, seconds, units)
            layer = Layer(index, tensors, grams, architecture)
            work.keep_importance(index, grams, payload["imatrix_out"] is not None)
            for variant in variants:
                units.text(f"layer {index + 1} of {base.layers}: {variant.name}")
                with _timed(seconds, variant.name):
                    made, errors, warnings = variant.module.quantize(layer, variant.options)
                    _synchronize(device)
                with _timed(seconds, "write"):
                    prefix = f"{LAYERS}.{index}."
                    for name, tensor in made.items():
                        variant.checkpoint.write(prefix + name, tensor)
                del made
                variant.errors |= {prefix + name: value for name, value in errors.items()}
                variant.warnings += warnings
                units.step(variant.cost)
            del layer, tensors, grams
            work.finished(index, variants)
        with _timed(seconds, "write"):
            for variant in variants:
                _finish(variant, base)
        imatrix = None
        if payload["imatrix_out"] is not None:
            imatrix = work.write_imatrix(Path(payload["imatrix_out"]), base, windows, payload["tokens_digest"])
    seconds["total"] = seconds.get("total", 0.0) + time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if windows.tokens < base.widest:
        note = (
            f"{windows.tokens} calibration tokens are fewer than the widest layer's {base.widest} inputs: "
            "its Gram matrix is singular and the result leans on the damping; take more"
        )
        for variant in variants:
            variant.warnings.append(note)
    return {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "device": str(device),
        "precision": precision,
        "variants": {
            variant.name: {
                "seconds": seconds.get(variant.name, 0.0),
                "tensor_errors": variant.errors,
                "tensor_types": variant.tensor_types(),
                "warnings": variant.warnings,
            }
            for variant in variants
        },
        "imatrix": imatrix,
    }


# --- what comes in ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Base:
    """The base's directory as its headers describe it; tensors are read when asked for."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    files: dict[str, Path]
    """Tensor -> the file it lies in."""
    shapes: dict[str, tuple[int, ...]]
    layers: int
    vocabulary: int

    @classmethod
    def open(cls, folder: Path) -> _Base:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder}: no config.json; the base must be a Hugging Face directory") from None
        architecture = describe(config)
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            for name, tensor in read_header(file).items():
                files[name], shapes[name] = file, tuple(tensor.shape)
        base = cls(
            folder, config, architecture, files, shapes, int(config["num_hidden_layers"]), int(config["vocab_size"])
        )
        for index in range(base.layers):
            for linear in architecture.linears:
                name = f"{LAYERS}.{index}.{linear}.weight"
                if name not in shapes:
                    raise UserError(
                        f"{folder}: tensor '{name}' is missing: not a plain {architecture.model_type} model. {WAY_OUT}."
                    )
        return base

    @property
    def widest(self) -> int:
        """The most inputs of any linear layer."""
        return max(self.shapes[f"{LAYERS}.0.{name}.weight"][1] for name in self.architecture.linears)

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding; configurations that leave it out mean the class's default."""
        return "lm_head.weight" not in self.files or bool(self.config.get("tie_word_embeddings"))

    def read(self, name: str) -> Any:
        """A tensor in the dtype it is stored in."""
        from safetensors import safe_open

        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def layer(self, index: int, device: Any) -> dict[str, Any]:
        """A decoder layer's tensors in float32 on the device, by their names inside the layer."""
        import torch
        from safetensors import safe_open

        prefix = f"{LAYERS}.{index}."
        tensors: dict[str, Any] = {}
        wanted = sorted(name for name in self.files if name.startswith(prefix) and not _derived(name))
        for path in sorted({self.files[name] for name in wanted}):
            # Opened anew each time: closing drops the mapping, and with it what was paged in.
            with safe_open(path, framework="pt") as file:
                for name in wanted:
                    if self.files[name] == path:
                        tensor = file.get_tensor(name).to(device=device, dtype=torch.float32, copy=True)
                        tensors[name.removeprefix(prefix)] = tensor
        return tensors


@dataclass(frozen=True)
class _Windows:
    """The calibration tokens, flat, and where each window begins."""

    ids: Any
    lengths: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass
class _Variant:
    name: str
    module: Any
    options: Any
    checkpoint: _Checkpoint
    errors: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def prepare(cls, entry: dict[str, Any], base: _Base) -> _Variant:
        import importlib

        if entry["method"] not in METHODS:
            raise unknown("method", entry["method"], METHODS, entry["name"])
        module = importlib.import_module(f"workbench.worker.methods.{entry['method']}")
        options = module.Options(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry["options"].items()})
        module.check(options)
        if options.engine != "workbench":
            raise UserError(f"{entry['name']}: `engine: {options.engine}` does not take part in the calibration pass")
        return cls(entry["name"], module, options, _Checkpoint(Path(entry["out"]), _plan(base, module, options)))

    @property
    def cost(self) -> float:
        """Its share of a layer's time, the forward pass and Grams being 1; only for the progress bar."""
        return 0.8 if getattr(self.options, "rounding", "nearest") == "compensated" else 0.5

    def tensor_types(self) -> dict[str, str]:
        """What each tensor of the base became."""
        kinds = {}
        for name, (kind, _) in self.checkpoint.plan.items():
            if name.endswith(".qweight"):
                kinds[name.removesuffix(".qweight") + ".weight"] = self.module.tensor_type(self.options)
            elif not name.endswith((".qzeros", ".scales", ".g_idx")):
                kinds[name] = kind
        return kinds


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no safetensors files; the base must be a Hugging Face directory of them")
    return files


def _derived(name: str) -> bool:
    """Buffers that old exporters saved and that the configuration determines."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"))


def _windows(path: str, base: _Base) -> _Windows:
    import torch

    content = json.loads(Path(path).read_text(encoding="utf-8"))["windows"]
    for number, window in enumerate(content):
        if not window:
            raise UserError(f"calibration window {number} is empty; take other calibration text")
        for token in window:
            if not isinstance(token, int) or not 0 <= token < base.vocabulary:
                raise UserError(
                    f"calibration window {number} holds token {token!r}, outside the vocabulary of {base.vocabulary}: "
                    "the calibration was made with another model's tokenizer"
                )
    lengths = [len(window) for window in content]
    if sum(lengths) < FEWEST_TOKENS:
        raise UserError(
            f"the calibration has {sum(lengths)} tokens; at least {FEWEST_TOKENS} are needed and {32 * 512} are usual"
        )
    longest = base.config.get("max_position_embeddings")
    if isinstance(longest, int) and max(lengths) > longest:
        raise UserError(
            f"a calibration window has {max(lengths)} tokens and the model's context {longest}: take shorter windows"
        )
    # Equal lengths together: a batch holds windows of one length, and the sums do not depend on the order.
    content.sort(key=len)
    return _Windows(torch.tensor([t for w in content for t in w], dtype=torch.int64), sorted(lengths))


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:0")) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}': torch sees {torch.cuda.device_count()} CUDA devices here; take `cpu`")
    return device


def _precision(name: str, device: Any) -> str:
    import torch

    if name != "auto":
        if name not in ("float32", "bfloat16"):
            raise unknown("precision", name, ("auto", "float32", "bfloat16"))
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None) or (lambda: False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None) or (lambda: False)
    return "bfloat16" if native() or amx() else "float32"


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the forward pass ---------------------------------------------------------------------------


class _Skeleton:
    """transformers' model without its layers: embeds tokens, and knows what each layer is called with."""

    def __init__(self, base: _Base, windows: _Windows, device: Any) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.device, self.windows = device, windows
        self.config = AutoConfig.from_pretrained(base.folder)
        self.config.use_cache = False
        attention = {"attn_implementation": base.architecture.attention, "dtype": torch.float32}
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(self.config, **attention)
        self.layers = whole.model.layers
        width = max(base.widest, self.config.hidden_size)
        self.batches = _batches(windows.lengths, width)

        # Only the rows of tokens that occur, renumbered: an embedding of 128,256 x 4,096 is 2 GB in float32.
        occurring, self.renumbered = torch.unique(windows.ids, return_inverse=True)
        small = AutoConfig.from_pretrained(base.folder)
        small.use_cache = False
        small.num_hidden_layers = 0
        small.vocab_size = len(occurring)
        small.pad_token_id = None
        self.model = AutoModelForCausalLM.from_config(small, **attention).model
        rows = base.read("model.embed_tokens.weight")[occurring].to(torch.float32)
        self.model.embed_tokens.weight = torch.nn.Parameter(rows, requires_grad=False)
        self.model.norm = torch.nn.Identity()
        self.model.config.num_hidden_layers = base.layers
        self.model.layers = torch.nn.ModuleList(_recorder() for _ in range(base.layers))
        self.model.eval()
        self.calls: dict[int, list[dict[str, Any]]] = {}
        for length in sorted(set(windows.lengths)):
            self._run(self.renumbered[:length].view(1, length))
            self.calls[length] = [
                {key: _moved(value, device) for key, value in recorder.seen[1].items()}
                for recorder in self.model.layers
            ]

    def _run(self, ids: Any) -> Any:
        self.model(input_ids=ids, use_cache=False)
        return self.model.layers[0].seen[0]

    def embed(self, hidden: Any) -> None:
        """Write the first layer's input for all windows, [tokens, hidden]."""
        for start, count, length in self.batches:
            ids = self.renumbered[start : start + count * length].view(count, length)
            hidden[start : start + count * length] = self._run(ids).reshape(count * length, -1)

    def layer(self, index: int, tensors: dict[str, Any], precision: str) -> Any:
        """A decoder layer with its weights in place, ready to be called; frees nothing of `tensors`."""
        import torch

        layer = self.layers[index]
        narrow = torch.bfloat16 if precision == "bfloat16" else torch.float32
        state = {name: tensor.to(narrow) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}
        missing, extra = layer.load_state_dict(state, strict=False, assign=True)
        unset = [name for name, buffer in layer.named_buffers() if buffer.is_meta]
        if missing or extra or unset:
            raise UserError(
                f"layer {index} lacks what transformers expects: {', '.join([*missing, *extra, *unset])}. {WAY_OUT}."
            )
        return layer.eval()

    def release(self, index: int) -> None:
        """Drop a layer's weights."""
        self.layers[index].to("meta")


def _recorder() -> Any:
    import torch

    class Recorder(torch.nn.Module):
        """Stands in a layer's place, lets hidden states through and remembers how it was called."""

        seen: tuple[Any, dict[str, Any]]

        def forward(self, hidden_states: Any, **arguments: Any) -> Any:
            self.seen = (hidden_states, arguments)
            return hidden_states

    return Recorder()


def _moved(value: Any, device: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    return value


def _batches(lengths: list[int], width: int) -> list[tuple[int, int, int]]:
    """(first token, windows, tokens of each) of batches of equal windows that keep activations small."""
    batches, start, place = [], 0, 0
    while place < len(lengths):
        length = lengths[place]
        most = max(1, ACTIVATIONS // (width * length))
        count = 1
        while count < most and place + count < len(lengths) and lengths[place + count] == length:
            count += 1
        batches.append((start, count, length))
        start, place = start + count * length, place + count
    return batches


def _forward(
    model: _Skeleton, architecture: Architecture, index: int, tensors: dict[str, Any], work: _Work, precision: str,
    seconds: dict[str, float], units: _Units,
) -> dict[str, Any]:  # fmt: skip
    """Push all tokens through a layer; returns its Gram matrices and leaves its outputs in `work`."""
    import torch

    device = model.device
    grams: dict[str, Any] = {}
    state = {"start": 0, "length": 1, "gram_s": 0.0}

    def watch(name: str) -> Callable[..., None]:
        def before(module: Any, inputs: tuple[Any, ...]) -> None:
            begun = _now(device)
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).to(torch.float32)
            if name not in grams:
                grams[name] = torch.zeros(x.shape[1], x.shape[1], device=device)
            _accumulate(grams[name], x)
            if not bool(torch.isfinite(grams[name].diagonal()).all()):
                bad = (~torch.isfinite(x).all(1)).nonzero()
                row = int(bad[0]) if len(bad) else 0
                sample = work.window_at(int(state["start"]) + row)
                raise UserError(
                    f"layer {index}: the input of {name} is not finite, first in calibration sample {sample}"
                    + ("" if precision == "float32" else "; try `precision: float32`")
                    + ". The base's weights may be damaged."
                )
            state["gram_s"] += _now(device) - begun

        return before

    layer = model.layer(index, tensors, precision)
    hooks = [
        layer.get_submodule(group.linears[0]).register_forward_pre_hook(watch(group.linears[0]))
        for group in architecture.groups
    ]
    begun = _now(device)
    source, target = work.hidden(index), work.hidden(index + 1)
    last = index + 1 == work.layers
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            for start, count, length in model.batches:
                units.text(f"layer {index + 1} of {work.layers}: forward pass")
                state["start"] = start
                piece = slice(start, start + count * length)
                x = source[piece].to(device).view(count, length, -1)
                out = layer(x, **model.calls[length][index])
                out = out[0] if isinstance(out, tuple) else out
                if not last:
                    target[piece] = out.reshape(count * length, -1).to(device="cpu", dtype=torch.float32)
                units.step(1 / len(model.batches))
    finally:
        for hook in hooks:
            hook.remove()
        model.release(index)
    for gram in grams.values():
        _mirror(gram)
        gram.div_(work.tokens)
    spent = _now(device) - begun
    seconds["gram"] = seconds.get("gram", 0.0) + state["gram_s"]
    seconds["forward"] = seconds.get("forward", 0.0) + spent - state["gram_s"]
    return grams


def _accumulate(gram: Any, x: Any) -> None:
    """Add x^T x to the blocks on and above the diagonal; x [tokens, in]."""
    size = gram.shape[0]
    step = max(GRAM_BLOCK, size // 8)
    for start in range(0, size, step):
        gram[start : start + step, start:].addmm_(x[:, start : start + step].t(), x[:, start:])


def _mirror(gram: Any) -> None:
    """Copy the upper triangle onto the lower, so that the matrix is symmetric to the last bit."""
    size = gram.shape[0]
    step = max(GRAM_BLOCK, size // 8)
    for start in range(0, size, step):
        stop = min(start + step, size)
        gram[stop:, start:stop] = gram[start:stop, stop:].t()
        block = gram[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).t())


def _now(device: Any) -> float:
    _synchronize(device)
    return time.perf_counter()


# --- what goes out ------------------------------------------------------------------------------


class _Checkpoint:
    """A safetensors checkpoint laid out in advance: every tensor has its place before the first is known."""

    def __init__(self, out: Path, plan: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        self.out, self.plan = out, plan
        shards: list[list[str]] = [[]]
        filled = self.total_bytes = 0
        for name, (kind, shape) in plan.items():
            size = STORED_BYTES[kind] * math.prod(shape)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            self.total_bytes += size
        self.places: dict[str, tuple[Path, int]] = {}
        self.heads: dict[Path, tuple[bytes, int]] = {}
        for number, names in enumerate(shards, 1):
            one = len(shards) == 1
            file = out / ("model.safetensors" if one else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in names:
                kind, shape = plan[name]
                end = offset + STORED_BYTES[kind] * math.prod(shape)
                header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
                offset = end
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            head = struct.pack("<Q", len(text)) + text
            self.heads[file] = (head, len(head) + offset)
            for name in names:
                self.places[name] = (file, len(head) + header[name]["data_offsets"][0])

    def laid_out(self) -> bool:
        """Whether the files are there with this very layout."""
        for file, (head, size) in self.heads.items():
            if not file.is_file() or file.stat().st_size != size:
                return False
            with file.open("rb") as stream:
                if stream.read(len(head)) != head:
                    return False
        return True

    def lay_out(self) -> None:
        """Reserve the files, so that a full disk shows before the work and not after it."""
        self.out.mkdir(parents=True, exist_ok=True)
        for file, (head, size) in self.heads.items():
            file.unlink(missing_ok=True)
            _reserve(file, size)
            with file.open("r+b") as stream:
                stream.write(head)

    def write(self, name: str, tensor: Any, offset_rows: int = 0) -> None:
        """Write a tensor, or some of its rows from `offset_rows` on, to its place."""
        import torch

        kind, shape = self.plan[name]
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}[kind]
        stored = tensor.to(dtype).contiguous().cpu()
        if tuple(stored.shape[1:]) != shape[1:]:
            raise AssertionError(f"{name} came out as {tuple(stored.shape)}, planned {shape}")
        if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise UserError(
                f"tensor '{name}' does not fit {kind} (its largest entry is {float(tensor.abs().max()):.3g}); "
                f"{WAY_OUT}."
            )
        file, place = self.places[name]
        place += offset_rows * math.prod(shape[1:]) * STORED_BYTES[kind]
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(memoryview(stored.view(torch.uint8).numpy() if stored.dim() else stored.numpy()).cast("B"))


def _plan(base: _Base, module: Any, options: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a variant's checkpoint, in the order written: name -> (dtype, shape)."""
    kept = {"float16": "F16", "bfloat16": "BF16"}[base.architecture.dtype]
    linears = set(base.architecture.linears)
    plan: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name in sorted(base.files, key=_layer_order):
        if _derived(name) or (name == "lm_head.weight" and base.tied):
            continue
        shape = base.shapes[name]
        parts = name.removeprefix(f"{LAYERS}.").split(".", 1)
        inside = parts[1].removesuffix(".weight") if name.startswith(f"{LAYERS}.") else ""
        if inside in linears and module.quantizes(options, name.removesuffix(".weight")):
            for suffix, entry in module.stored(options, inside, *shape).items():
                plan[f"{name.removesuffix('weight')}{suffix}"] = entry
        else:
            plan[name] = (kept, shape)
    return plan


def _layer_order(name: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest."""
    if name.startswith(f"{LAYERS}."):
        return int(name.removeprefix(f"{LAYERS}.").split(".", 1)[0]), name
    return (-1, name) if "embed" in name else (10**9, name)


def _check_shapes(base: _Base, variants: list[_Variant]) -> None:
    """Refuse group sizes and shapes that a checkpoint cannot hold, naming the layer and what would work."""
    linears = {name: base.shapes[f"{LAYERS}.0.{name}.weight"] for name in base.architecture.linears}
    common = math.gcd(*(columns for _, columns in linears.values()))
    possible = [str(size) for size in (16, 32, 64, 128, 256, 512) if common % size == 0]
    for variant in variants:
        size, bits = variant.options.group_size, variant.options.bits
        unit = 32 // math.gcd(bits, 32)
        for name, (rows, columns) in linears.items():
            where = f"{variant.name}: {LAYERS}.0.{name} ({rows} x {columns})"
            if not variant.module.quantizes(variant.options, f"{LAYERS}.0.{name}"):
                continue
            if size != -1 and columns % size:
                advice = f"take {', '.join(possible)} or -1" if possible else "take -1 (whole rows)"
                raise UserError(f"{where}: group_size {size} does not divide its {columns} inputs; {advice}")
            if rows % unit or columns % unit:
                raise UserError(f"{where}: {bits} bits are stored {unit} at a time, which does not divide its sizes")


def _finish(variant: _Variant, base: _Base) -> None:
    """Write what no layer holds: embeddings, norms, configuration, tokenizer, index."""
    import torch
    from safetensors import safe_open

    out, checkpoint = variant.checkpoint.out, variant.checkpoint
    for name in checkpoint.plan:
        if name.startswith(f"{LAYERS}."):
            continue
        with safe_open(base.files[name], framework="pt") as file:
            source = file.get_slice(name)
            shape = source.get_shape()
            rows = max(1, COPY_BYTES // (4 * max(1, math.prod(shape[1:])))) if shape else 1
            for start in range(0, shape[0], rows):
                checkpoint.write(name, source[start : start + rows].to(torch.float32), start)
    if len(checkpoint.heads) > 1:
        weight_map = {name: file.name for name, (file, _) in sorted(checkpoint.places.items())}
        index = {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)
    for name in (*TOKENIZER_FILES, *CONFIG_FILES):
        if (base.folder / name).is_file():
            shutil.copyfile(base.folder / name, out / name)
    config = {key: value for key, value in base.config.items() if key not in ("dtype", "torch_dtype")}
    config["dtype"] = base.architecture.dtype
    quantization = variant.module.quantization_config(variant.options)
    config["quantization_config"] = quantization
    if base.tied:
        config["tie_word_embeddings"] = True
    _write_json(out / "config.json", for_both_readers(config))
    if variant.module.FORMAT == "gptq":
        _write_json(out / "quantize_config.json", quantization)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _reserve(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(stream.fileno(), 0, size)
        else:
            stream.truncate(size)


@contextmanager
def _disk_faults(folder: Path) -> Iterator[None]:
    """Turn a full disk into a line about it."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space left on the disk of {folder}: free some, or set WORKBENCH_HOME to a larger disk. "
            "The finished layers are kept."
        ) from None


# --- interrupted work ---------------------------------------------------------------------------


class _Work:
    """What an interrupted run needs to go on: the next layer's number and input, and what was noted so far."""

    def __init__(self, folder: Path, key: str, windows: _Windows, base: _Base) -> None:
        self.folder, self.key = folder, key
        self.windows, self.tokens, self.layers = windows, windows.tokens, base.layers
        self.width = int(base.config["hidden_size"])
        self.layer = 0
        self.seconds: dict[str, float] = {}
        self.base = base
        self.mapped: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path, key: str, windows: _Windows, base: _Base, variants: list[_Variant]) -> _Work:
        work = cls(folder, key, windows, base)
        note = work._note()
        whole = all(variant.checkpoint.laid_out() for variant in variants)
        size = work.tokens * work.width * 4
        files = [folder / f"hidden-{turn}.bin" for turn in (0, 1)]
        if note and whole and all(file.is_file() and file.stat().st_size == size for file in files):
            work.layer, work.seconds = note["layer"], note["seconds"]
            for variant in variants:
                variant.errors = note["errors"][variant.name]
                variant.warnings = note["warnings"][variant.name]
            return work
        with _disk_faults(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "progress.json").unlink(missing_ok=True)
            for variant in variants:
                variant.checkpoint.lay_out()
            for file in files:
                _reserve(file, size)
        return work

    def _note(self) -> dict[str, Any] | None:
        try:
            note = json.loads((self.folder / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note if note.get("key") == self.key else None

    def hidden(self, layer: int) -> Any:
        """The input of a layer for all tokens, float32 [tokens, hidden], mapped; two files take turns."""
        import torch

        turn = layer % 2
        if turn not in self.mapped:
            count = self.tokens * self.width
            flat = torch.from_file(
                str(self.folder / f"hidden-{turn}.bin"), shared=True, size=count, dtype=torch.float32
            )
            self.mapped[turn] = flat.view(self.tokens, self.width)
        return self.mapped[turn]

    def window_at(self, token: int) -> int:
        """Which window a token of the flat list is in."""
        for number, length in enumerate(self.windows.lengths):
            token -= length
            if token < 0:
                return number
        return len(self.windows.lengths) - 1

    def finished(self, layer: int, variants: list[_Variant]) -> None:
        """Note that a layer is done and written; whoever is interrupted after this goes on with the next."""
        note = {
            "key": self.key, "layer": layer + 1, "seconds": self.seconds,
            "errors": {variant.name: variant.errors for variant in variants},
            "warnings": {variant.name: variant.warnings for variant in variants},
        }  # fmt: skip
        fresh = self.folder / "progress.json.new"
        fresh.write_text(json.dumps(note), encoding="utf-8")
        os.replace(fresh, self.folder / "progress.json")

    def keep_importance(self, layer: int, grams: dict[str, Any], wanted: bool) -> None:
        """Store the diagonals of a layer's Gram matrices."""
        from safetensors.torch import save_file

        if wanted:
            diagonals = {name: gram.diagonal().contiguous().cpu() for name, gram in grams.items()}
            save_file(diagonals, self.folder / f"importance-{layer:05d}.safetensors")

    def write_imatrix(self, out: Path, base: _Base, windows: _Windows, dataset: str) -> dict[str, Any]:
        """The importance matrix from the stored diagonals; `entries` and `bytes` of what was written."""
        from safetensors.torch import load_file

        from workbench.worker import imatrix

        means = {}
        for layer in range(base.layers):
            diagonals = load_file(self.folder / f"importance-{layer:05d}.safetensors")
            for group in base.architecture.groups:
                for name in group.linears:
                    tensor = imatrix.tensor_name(layer, base.architecture.gguf[name])
                    means[tensor] = diagonals[group.linears[0]].numpy()
        out.parent.mkdir(parents=True, exist_ok=True)
        imatrix.write(
            out,
            means,
            tokens=windows.tokens,
            windows=len(windows.lengths),
            window=max(windows.lengths),
            dataset=dataset,
        )
        return {"path": str(out), "entries": len(means), "bytes": out.stat().st_size}


def _key(payload: dict[str, Any], base: _Base, device: Any, precision: str) -> str:
    """Of everything that determines the bytes: work noted under another key is not gone on with."""
    import torch
    import transformers

    files = sorted(set(base.files.values()))
    return digest(
        [
            CALIBRATE_VERSION, payload["tokens_digest"], base.config, precision, device.type, torch.get_num_threads(),
            [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
            [[v["name"], v["method"], v["options"]] for v in payload["variants"]],
            payload["imatrix_out"] is not None, torch.__version__, transformers.__version__,
        ]
    )  # fmt: skip


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - begun


class _Units:
    """Work done and to do, in forward passes of one layer; every layer costs the same."""

    def __init__(self, progress: Progress, layers: int, batches: int, variants: list[_Variant], done: int) -> None:
        self.progress = progress
        layer = 1.0 + sum(variant.cost for variant in variants)
        self.total, self.done, self.words = layers * layer, done * layer, ""

    def text(self, words: str) -> None:
        self.words = words
        self.progress(self.done, self.total, words)

    def step(self, amount: float) -> None:
        self.done += amount
        self.progress(self.done, self.total, self.words)
