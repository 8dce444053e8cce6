"""GGUF files that others made, measured beside ours: which of ten files of one name is to be trusted?

A file is compared with what llama.cpp's converter makes of the base, key by key and tensor by tensor
(`base/found.py` says what is refused), and is then an artifact like ours. A plan reads its header alone.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError, short
from workbench.records import MadeVariant, VariantRequest, from_json, to_json
from workbench.shape import Shape, Stored
from workbench.worker import Progress
from workbench.worker.base import found
from workbench.worker.base.gguf_file import PART, field_of, open_parts, parts_of
from workbench.worker.base.hub import download_gguf, fetch_fronts, is_offline
from workbench.worker.methods import Making

SHORTHAND = "path"
AXES = ("file", "path")
WRITES: tuple[str, ...] = ("gguf",)
LIBRARY = "gguf"
TAGS: tuple[str, ...] = ("gguf",)

SIZES = re.compile(
    r"\.(block_count|embedding_length|(expert_(shared_)?)?feed_forward_length|expert_count|attention\.head_count(_kv)?"
    r"|vocab_size)$"
)
"""Keys that say the same as shapes."""
COMPARED = re.compile(r"tokenizer\.ggml\.(model|pre|add_\w+|(bos|eos|eot|padding|unknown)_token_id)")
"""Keys beside the architecture's own that are compared."""
OPTIONAL = re.compile(r"^rope_f")
"""Tensors that older converters did not write; the frequencies are then a key's."""
OF_THE_MAKER = re.compile(r"(general|quantize)\.(?!alignment)")
SPLIT = "it reads no GGUF file that is split: join this one with llama.cpp's `llama-gguf-split --merge`"
LONGEST = 300
"""Letters of an entry of a header that are kept."""


@dataclass(frozen=True)
class Options:
    """A GGUF file that somebody else made, measured as it is; its path alone may stand in place of the options."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True}

    hub: str = ""
    """A repository on the Hugging Face hub, `owner/name`, that holds `file`."""
    file: str = ""
    """The file in the hub's repository; of one that is split, the first part."""
    revision: str = ""
    """A branch, tag or commit of the hub's repository (default `main`)."""
    path: str = ""
    """A file on this machine, relative to the recipe; of one that is split, the first part."""


def default_name(options: Options) -> str:
    """Owner of the repository, and the file's name."""
    return found.default_name(options.hub, PART.sub("", _name(options)).removesuffix(".gguf"))


def check(options: Options) -> None:
    """Refuse, when the recipe is read, what can be no GGUF file."""
    found.check_place("file", options.hub, options.path, options.revision)
    if bool(options.hub) != bool(options.file):
        raise UserError("file: `hub` and `file` go together: the repository, and the GGUF file in it")
    if not _name(options).endswith(".gguf"):
        raise UserError(f"file: {short(_name(options))} is no .gguf file; a folder of AWQ or GPTQ is a `checkpoint`")
    if len(_name(options)) > 150 or {"..", "/"} & {*Path(options.file).parts}:
        raise UserError(f"file: '{short(options.file or options.path)}' is no name of a file in a repository")
    part = PART.search(_name(options))
    if part and int(part[1]) != 1:
        raise UserError(f"file: {short(_name(options))} is part {int(part[1])} of {int(part[2])}: name the first")


def _name(options: Options) -> str:
    return Path(options.file or options.path).name


def limits(options: Options) -> dict[str, str]:
    """What no engine reads is known once the file is there."""
    return {}


def making(options: Options, cuda: bool) -> Making:
    """Found, and compared with the base's own GGUF file."""
    return Making(
        "gguf",
        function="workbench.worker.methods.file:adopt",
        headers="workbench.worker.methods.file:headers",
        file_name=_name(options),
        label="found",
    )


def sizes(shape: Shape, options: Options, form: str) -> Stored:
    """As its header says, which a plan asks `headers` for."""
    return Stored(0, refused="its header was not read")


def adopt(payload: object, progress: Progress) -> object:
    """Worker for a `VariantRequest`: links to a GGUF file that is compared with the base's, `source`. Returns
    `MadeVariant`; `UserError` for a file that is not whole, or of another model."""
    request: VariantRequest = from_json(VariantRequest, payload)
    options: Options = from_json(Options, request.options)
    first, commit = Path(options.path), ""
    if options.hub:
        revision = options.revision or "main"
        first, commit = download_gguf(options.hub, revision, options.file, is_offline(), progress)
    readers, (base,) = open_parts(first), open_parts(Path(str(request.source)))
    warnings = _compared(base, readers, first.name)
    files = parts_of(first)
    header = {key: _kept(field.contents()) for key, field in readers[0].fields.items() if OF_THE_MAKER.match(key)}
    about: dict[str, object] = {"file": first.name, "hub": options.hub, "revision": commit, "header": header}
    about["sha256"] = found.checksums(files, progress, bool(options.hub))
    for name, file in zip(parts_of(Path(request.out)), files, strict=True):
        found.link(name, file)
    tensors = _tensors(readers)
    return to_json(
        MadeVariant(
            {tensor.name: tensor.tensor_type.name for tensor in tensors},
            disk_bytes=sum(int(tensor.n_bytes) for tensor in tensors),
            warnings=[found.told(options.hub, commit, first.name, _importance(header)), *warnings],
            provenance={
                "found": about,
                "limits": _limits(readers),
                "options": found.stated(request.options),
            },
        )
    )


def headers(payload: object, progress: Progress) -> object:
    """Worker for a `found.HeadersRequest`: what a plan wants to know of a file."""
    request: found.HeadersRequest = from_json(found.HeadersRequest, payload)
    options, shape = from_json(Options, request.options), request.shape
    with tempfile.TemporaryDirectory() as folder:
        try:
            first = Path(options.path)
            if options.hub:
                revision = options.revision or "main"
                first = fetch_fronts(options.hub, revision, options.file, is_offline(), Path(folder))
            readers = open_parts(first)
            tensors = _tensors(readers)
            theirs = _shapes(tensors)
            ours = {
                each.name: each.shape for each in shape.tensors if len(theirs.get(each.name, ())) == len(each.shape)
            }
            # Of its tensors: a layer that predicts further tokens is none of its configuration's.
            layers = len({each.layer for each in shape.tensors} - {None})
            found.check_counts(_counts(theirs), (shape.vocab_size, layers), first.name)
            found.check_shapes(ours, {name: theirs[name] for name in ours}, first.name, OPTIONAL)
        except UserError as problem:
            return {"gguf": to_json(Stored(0, refused=str(problem).replace(f"{folder}/", "")))}
        kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
        size_bytes = sum(int(tensor.n_bytes) for tensor in tensors)
        return {"gguf": to_json(Stored(size_bytes, kinds, limits=_limits(readers)))}


def _tensors(readers: list[Any]) -> list[Any]:
    """Those of all parts."""
    return [tensor for reader in readers for tensor in reader.tensors]


def _limits(readers: list[Any]) -> dict[str, str]:
    """Backend name -> why that engine cannot load the file."""
    return dict.fromkeys(("transformers", "vllm"), SPLIT) if len(readers) > 1 else {}


def _compared(base: Any, readers: list[Any], name: str) -> list[str]:
    """Warnings of what is not as in the base's own file; `UserError` where it is another model."""
    first = readers[0]
    kinds = [str(field_of(reader, "general.architecture")) for reader in (base, first)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{name} is of the architecture '{kinds[1]}', the base of '{kinds[0]}'. {found.ADVICE}")
    ours, theirs = _shapes(base.tensors), _shapes(_tensors(readers))
    found.check_counts(_counts(theirs), _counts(ours), name)
    warnings = []
    for key, field in base.fields.items():
        if not (key.startswith(f"{kinds[0]}.") or COMPARED.fullmatch(key)):
            continue
        a, b = field.contents(), field_of(first, key)
        near = isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-6)
        if b is None or a == b or near:
            continue
        said = f"its '{key}' is {short(b)}, the base's {short(a)}"
        if SIZES.search(key):
            raise UserError(f"{name} is not of the base's shape: {said}. {found.ADVICE}")
        warnings.append(said)
    warnings += found.check_shapes(ours, theirs, name, OPTIONAL)
    words, others = (field_of(reader, "tokenizer.ggml.tokens") or [] for reader in (base, first))
    warnings += found.respelt(words, others, name) if words else []
    template, other = (field_of(reader, "tokenizer.chat_template") for reader in (base, first))
    return warnings + found.other_template(template, other)


def _shapes(tensors: list[Any]) -> dict[str, list[int]]:
    """Shapes by name, rows first."""
    return {tensor.name: [int(side) for side in reversed(tensor.shape.tolist())] for tensor in tensors}


def _counts(shapes: dict[str, list[int]]) -> tuple[int, int]:
    """Tokens of the vocabulary, and decoder layers."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    return shapes.get("token_embd.weight", [0])[0], len(layers)


def _kept(value: Any) -> object:
    """An entry of a header, as far as a row has room for it."""
    if isinstance(value, list):
        return [_kept(each) for each in value[:10]]
    return value if isinstance(value, int | bool) else short(value, LONGEST)


def _importance(header: dict[str, object]) -> str:
    """What the header says of an importance matrix."""
    file, of = (header.get(f"quantize.imatrix.{key}") for key in ("file", "dataset"))
    if not file and not of:
        return "; its header names no importance matrix"
    name, text = (short(Path(str(each or "of no name")).name) for each in (file, of))
    return f"; importance matrix {name}" + (f" of {text}" if of else "")
