"""AWQ, GPTQ and compressed-tensors checkpoints that others made, measured beside ours.

A folder of safetensors is compared with the base's own, tensor by tensor: what is packed by the sizes that it unpacks
to (`base/found.py` says what is refused). It is then an artifact like ours, and AWQ and GPTQ are carried to GGUF as
ours are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import UserError, short
from workbench.records import MadeVariant, VariantRequest, from_json, to_json
from workbench.shape import Shape, Stored
from workbench.worker import Progress
from workbench.worker.base import found
from workbench.worker.base.checkpoint import (
    FILES,
    StoredTensor,
    checked_config,
    checked_weights,
    parameters_of,
    read_json,
    read_model,
)
from workbench.worker.base.config_json import text_config
from workbench.worker.base.hub import download, fetch_headers, is_offline
from workbench.worker.base.sources import local_path
from workbench.worker.ggml.carry import PARTS, Packed
from workbench.worker.methods import Making, awq, compressed_tensors, gptq, grouped
from workbench.worker.tokens.spelling import checkpoint_spelling

SHORTHAND = "path"
AXES = ("hub", "path")
WRITES = awq.WRITES
"""The first stands for GPTQ and compressed-tensors too: which one it is, the artifact says."""
LIBRARY = "transformers"
TAGS: tuple[str, ...] = ()

OPTIONAL = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors that follow from the configuration."""
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
FUNCTION = ("rope_theta", "rope_scaling", "rms_norm_eps", "sliding_window", "hidden_act", "tie_word_embeddings")
"""Entries of a configuration that are refused, and told, where they are not the base's."""


@dataclass(frozen=True)
class Options:
    """An AWQ, GPTQ or compressed-tensors checkpoint that somebody else made, measured as it is; its folder alone may
    stand in place of the options."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    hub: str = ""
    """A repository on the Hugging Face hub, `owner/name`."""
    revision: str = ""
    """A branch, tag or commit of the hub's repository (default `main`)."""
    path: str = ""
    """A folder on this machine, relative to the recipe."""


def default_name(options: Options) -> str:
    """Owner and name of the repository, or the folder's name."""
    owner, _, name = options.hub.rpartition("/")
    return found.default_name(owner, name or Path(options.path).name)


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what is in no place."""
    found.check_place("checkpoint", options.hub, options.path, options.revision)
    if options.path.endswith(".gguf"):
        raise UserError(f"checkpoint: {short(options.path)} is no folder; a GGUF file is a `file`")


def limits(options: Options) -> dict[str, str]:
    """What no engine reads is known once the checkpoint is there."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """Found, and compared with the base's directory."""
    return Making(
        "base",
        function="workbench.worker.methods.checkpoint:adopt",
        headers="workbench.worker.methods.checkpoint:headers",
        label="found",
        carried=grouped.making("awq", awq.Options()).carried,
    )


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """As its headers say, which a plan asks `headers` for."""
    return Stored(0, refused="its headers were not read")


def adopt(payload: object, progress: Progress) -> object:
    """Worker for a `VariantRequest`: a folder of links to a checkpoint that is compared with the base's. Returns
    `MadeVariant`; `UserError` for what is not whole, of no such kind, or of another model."""
    request: VariantRequest = from_json(VariantRequest, payload)
    options: Options = from_json(Options, request.options)
    remote_code, commit = request.allow_remote_code, ""
    if options.hub:
        folder = download(options.hub, options.revision or "main", is_offline(), progress)
        commit = folder.name
    else:
        folder = local_path(options.path)
    name = options.hub or folder.name
    config, tensors = _read(folder, remote_code)
    how = scheme(config, name)
    base, theirs = Path(request.base), unpacked(tensors, how, name)
    base_config, base_tensors = read_model(base, remote_code)
    warnings = _compared(base_config, config, name)
    ours = {key: list(each.shape) for key, each in parameters_of(base_config, base_tensors).items()}
    warnings += found.check_shapes(ours, theirs, name, OPTIONAL)
    ids = list(range(int(text_config(base_config)["vocab_size"])))
    words = [checkpoint_spelling(str(each), ids) for each in (base, folder)]
    if words[0]:
        warnings += found.respelt(words[0], words[1] or [], name)
    warnings += found.other_template(*map(_template, (base, folder)))
    weights = sorted({tensor.file for tensor in tensors.values()})
    out = Path(request.out)
    out.mkdir(exist_ok=True)
    for file in (*weights, *(file for file in folder.iterdir() if file.name in FILES and file.is_file())):
        found.link(out / file.name, file)
    header = {key: value for key, value in config["quantization_config"].items() if not isinstance(value, dict)}
    about: dict[str, object] = {"hub": options.hub, "revision": commit, "header": header | {"by": _packer(config)}}
    about["sha256"] = found.checksums(weights, progress, bool(options.hub))
    kind = how.tensor_type
    return to_json(
        MadeVariant(
            {key: tensors[key].dtype if key in tensors else kind for key in theirs},
            warnings=[
                found.told(options.hub, commit, "" if commit else folder.name, f"; by {_packer(config)}"),
                *warnings,
            ],
            provenance={
                "found": about,
                "limits": how.limits,
                "options": found.stated(request.options) | how.stated,
            },
            format=how.method,
        )
    )


def headers(payload: object, progress: Progress) -> object:
    """Worker for a `found.HeadersRequest`: what a plan wants to know of a checkpoint."""
    request: found.HeadersRequest = from_json(found.HeadersRequest, payload)
    options, shape = from_json(Options, request.options), request.shape
    name = options.hub or Path(options.path).name
    try:
        remote_code, revision = request.allow_remote_code, options.revision or "main"
        if options.hub:
            config, told = fetch_headers(options.hub, revision, is_offline(), remote_code, _read)
        else:
            config, told = _read(local_path(options.path), remote_code)
        if told is None:
            raise UserError(f"{name}: its headers are not in the hub's cache, and the hub cannot be asked for them")
        tensors = told
        how, text = scheme(config, name), text_config(config)
        unpacked(tensors, how, name)
        counts = int(text["vocab_size"]), int(text.get("num_hidden_layers") or 0)
        found.check_counts(counts, (shape.vocab_size, shape.traits.layers), name)
        if text.get("hidden_size") not in (None, shape.hidden):
            raise UserError(f"{name} has {text['hidden_size']} channels, the base {shape.hidden}. {found.ADVICE}")
    except UserError as problem:
        return {form: to_json(Stored(0, refused=str(problem))) for form in WRITES}
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    stored = {key: each for key, each in tensors.items() if not (tied and key == "lm_head.weight")}
    forms = {how.method: Stored(sum(each.size_bytes for each in stored.values()))}
    if how.method == "compressed-tensors":
        return {how.method: to_json(forms[how.method])} | {
            form: to_json(Stored(0, refused=compressed_tensors.CARRIED)) for form in WRITES[1:] if form != how.method
        }
    forms |= {
        "compressed-tensors": grouped.compressed_sizes(shape, how.options, how.quantizes(tensors)),
        "gguf": grouped.carried_sizes(shape, how.options, how.quantizes(tensors), how.kind),
        "mlx": grouped.mlx_sizes(shape, how.options, how.quantizes(tensors)),
        "whole": forms[how.method],
    }
    return {form: to_json(replace(each, limits=how.limits)) for form, each in forms.items()}


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is packed: `options` as our own method of that name has them, or of compressed-tensors what was
    written."""

    method: str
    options: Any

    @property
    def tensor_type(self) -> str:
        """What a packed tensor is called in an artifact's record."""
        if self.method == "compressed-tensors":
            return str(self.options.kind)
        return grouped.tensor_type(self.options)

    @property
    def stated(self) -> dict[str, object]:
        """What a configuration says of it."""
        if self.method == "compressed-tensors":
            return {
                "bits": self.options.bits,
                "weights": self.options.kind,
                "inputs": self.options.inputs or "as they are",
            }
        names = (
            ("bits", "group_size", "zero_point") if self.method == "awq" else ("bits", "group_size", "sym", "desc_act")
        )
        return {name: getattr(self.options, name) for name in names}

    @property
    def limits(self) -> dict[str, str]:
        """Backend name -> why that engine cannot load it."""
        if self.method == "compressed-tensors":
            return dict.fromkeys(("llamacpp", "mlx"), compressed_tensors.CARRIED)
        return awq.limits(self.options) if self.method == "awq" else gptq.limits(self.options)

    @property
    def kind(self) -> str:
        """llama.cpp's type with the same codes; empty if there is none."""
        return "Q4_1" if self.method == "awq" else gptq.container_of(self.options)

    def quantizes(self, tensors: Mapping[str, StoredTensor]) -> Any:
        """Whether a linear layer, by its full name, is packed in these."""
        return lambda options, linear: f"{linear}.qweight" in tensors


def scheme(config: Mapping[str, Any], name: str) -> Scheme:
    """How a `config.json` says that its weights are packed. `UserError` for what is none of them, and for layouts that
    engines differ in."""
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        raise UserError(
            f"{name} is no quantized checkpoint: its config.json has no `quantization_config`. Give a folder of AWQ, "
            "GPTQ or compressed-tensors; an unquantized model is a `base`"
        )
    method = said.get("quant_method")
    if method == "compressed-tensors":
        return Scheme(method, compressed_tensors.read(said, name))
    layout = said.get("version", "gemm") if method == "awq" else said.get("checkpoint_format") or "gptq"
    if (method, str(layout).lower()) not in (("awq", "gemm"), ("gptq", "gptq")):
        raise UserError(
            f"{name} is packed as {short(method)} ({short(layout)}): what is read here is awq (gemm), gptq (gptq) and "
            "compressed-tensors"
        )
    # The words of the first AWQ checkpoints.
    bits, size = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
    widths = (4,) if method == "awq" else (2, 3, 4, 8)
    if bits not in widths or type(size) is not int or (size < 1 and size != -1):
        raise UserError(
            f"{name}: its quantization_config has bits {short(bits)} and group_size {short(size)}. Fetch it again"
        )
    if method == "awq":
        return Scheme("awq", awq.Options(group_size=size, zero_point=bool(said.get("zero_point", True))))
    signs = {key: bool(said.get(key, key == "sym")) for key in ("sym", "desc_act")}
    options: gptq.Options = from_json(gptq.Options, {"bits": bits, "group_size": size, **signs})
    return Scheme("gptq", options)


def _read(folder: Path, remote_code: bool) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """A folder's configuration, and its tensors by name, of whole files."""
    return checked_config(folder, remote_code), checked_weights(folder)


def unpacked(tensors: Mapping[str, StoredTensor], how: Scheme, name: str) -> dict[str, list[int]]:
    """Shapes of what the tensors unpack to, by the base's names."""
    if how.method == "compressed-tensors":
        return compressed_tensors.unpacked({key: each.shape for key, each in tensors.items()}, how.options, name)
    stems = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if not stems:
        raise UserError(f"{name} is no quantized checkpoint: none of its tensors ends in `.qweight`. Fetch it again")
    parts = {f"{stem}.{part}" for stem in stems for part in PARTS}
    packed = {stem: Packed(stem, tensors, None if how.method == "awq" else how.options.bits) for stem in stems}
    shapes = {key: list(each.shape) for key, each in tensors.items() if key not in parts}
    for stem, each in packed.items():
        for part in ("scales", "qzeros"):
            if f"{stem}.{part}" not in tensors:
                raise UserError(f"{name}: tensor {stem}.{part} is missing. Fetch it again")
        shapes[f"{stem}.weight"] = [each.outputs, each.columns]
    return shapes


def _compared(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> list[str]:
    """Warnings of entries of the configuration that are not the base's; `UserError` for another model's."""
    if ours["architectures"][0] != theirs["architectures"][0]:
        kinds = theirs["architectures"][0], ours["architectures"][0]
        raise UserError(f"{name} is of the architecture {kinds[0]}, the base of {kinds[1]}. {found.ADVICE}")
    # Older readers' words beside today's.
    a, b = ({**(text.get("rope_parameters") or {}), **text} for text in map(text_config, (ours, theirs)))
    counts = [(int(each["vocab_size"]), int(each.get("num_hidden_layers") or 0)) for each in (b, a)]
    found.check_counts(counts[0], counts[1], name)
    warnings = []
    for key in (*SIZES, *FUNCTION):
        if key in a and key in b and a[key] != b[key]:
            said = f"its `{key}` is {short(b[key])}, the base's {short(a[key])}"
            if key in SIZES:
                raise UserError(f"{name} is not of the base's shape: {said}. {found.ADVICE}")
            warnings.append(said)
    return warnings


def _template(folder: Path) -> object:
    """The chat template that a folder brings."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    said = read_json(settings).get("chat_template") if settings.is_file() else None
    return said if isinstance(said, str | None) else json.dumps(said, sort_keys=True)


def _packer(config: Mapping[str, Any]) -> str:
    """Who packed it, as far as the configuration says."""
    meta = config["quantization_config"].get("meta")
    by = meta.get("quantizer") if isinstance(meta, dict) else None
    return short(", ".join(map(str, by)) if isinstance(by, list) else by or "a packer that it does not name")
