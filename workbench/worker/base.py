"""From any source of a base model to one Hugging Face directory that every method and engine reads.

A base comes from a hub repository, a local directory, a GGUF file (de-quantized), a file inside an installed
Python package, or a bare configuration (random weights). `prepare` checks it and, where asked, rewrites it as
an exact equivalent: the same function of its tokens with weights that sit on no quantization grid and with
sizes that the K-quants and group 128 divide. What is already a directory is used in place; nothing is copied.

Weights are safetensors or GGUF; pickled weights run code when they are loaded and are refused. Sizes come from
the files' headers, so checking a 16 GB base reads a few kilobytes of it (hashing it reads all, once).

Rejected: loading the model in transformers to rewrite it (needs twice its memory; one tensor at a time needs
one tensor), and saving with transformers' own config writer (readers built on transformers 4 do not know
`rope_parameters` and fall back to a rope theta of 10000 without a word).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import UserError, did_you_mean, install_with, unknown
from workbench.records import digest as short_digest

PREPARE_VERSION = 1
"""Of the bytes that `prepare` writes for a given source. Raise it when they change."""

SHARD_BYTES = 2_000_000_000
SOURCES = ("hub", "path", "gguf", "package", "config")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
CONFIG_FILES = ("config.json", "generation_config.json", "README.md")
DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""GGUF pre-tokenizers that take every digit alone before GPT-2's splitting; transformers' GGUF reader "
"leaves that out."""
MISTRAL_FORMAT = "consolidated"
"""Prefix of weight files that repeat the model in Mistral's own layout."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
NOT_WEIGHTS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.masked_bias")

Progress = Callable[[float, float, str], Any]


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: what a safetensors header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


# --- entry points -------------------------------------------------------------------------------


def prepare(payload: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Make the base ready to read, and say what it is.

    `payload`: `source` (one of `SOURCES`, see the module), `equivalent` (`{"seed", "hidden"}` or null), `out` (an
    empty directory, written only if the source is not already a Hugging Face directory, or `equivalent` is
    asked for), `allow_remote_code`, `offline`.

    Returns `path`, `architecture`, `dtype`, `parameters` and `weight_bytes` (tied embeddings once), `revision`,
    `vocab_size`, `context_length` (tokens), `license`, `tokenizer` (whether it has one), and `digest`, which changes
    whenever a weight does.
    Raises `UserError` for all that a user can mend.
    """
    source, out = payload["source"], Path(payload["out"])
    equivalent, remote_code = payload.get("equivalent"), bool(payload.get("allow_remote_code"))
    offline = bool(payload.get("offline")) or _is_offline()
    out.mkdir(parents=True, exist_ok=True)
    plain = out / ".plain" if equivalent else out

    with _disk_faults(out):
        path, revision, license_name = _directory(source, plain, remote_code, offline, progress)
        config = _checked_config(path, remote_code)
        tensors = _checked_weights(path)
        if equivalent:
            _write_equivalent(path, config, tensors, equivalent, out, progress)
            license_name = license_name or _license(path)
            shutil.rmtree(plain, ignore_errors=True)
            path = out
            config, tensors = _checked_config(out, remote_code), _checked_weights(out)

    counted = _counted(config, tensors)
    identity = {"version": PREPARE_VERSION, "content": revision, "equivalent": equivalent}
    return {
        "path": str(path),
        "architecture": config["architectures"][0],
        "dtype": _main_dtype(counted),
        "parameters": sum(math.prod(t.shape) for t in counted.values()),
        "weight_bytes": sum(t.size_bytes for t in counted.values()),
        "revision": revision,
        "vocab_size": int(_text_config(config)["vocab_size"]),
        "context_length": _context_length(config),
        "license": license_name or _license(path),
        "tokenizer": any((path / name).is_file() for name in VOCABULARY_FILES),
        "digest": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
    }


def identify(source: dict[str, Any]) -> str:
    """A cheap name for the present state of a source, for a cache key: nothing is downloaded or read through.

    Files are known by name, size and time of change; a hub repository by its revision as written, so that a
    branch name stands for whatever it pointed at when the base was prepared.
    """
    return f"v{PREPARE_VERSION}:{_state(source)}"


def _state(source: dict[str, Any]) -> str:
    kind = _kind(source)
    if kind == "hub":
        return f"hub:{source['hub']}@{source.get('revision') or 'main'}"
    if kind == "package":
        distribution = _distribution(source["package"])
        return f"package:{source['package']}=={distribution.version}/{source.get('file') or ''}"
    if kind == "config":
        tokenizer = source.get("tokenizer")
        facts = {
            "config": _config_of(source["config"]),
            "seed": int(source.get("seed") or 0),
            "tokenizer": _state(_tokenizer_source(tokenizer)) if tokenizer else None,
        }
        return f"config:{short_digest(facts)}"
    path = _local_path(source[kind])
    return f"path:{path}:{short_digest(_stamps(path))}"


# --- sources ------------------------------------------------------------------------------------


def _directory(
    source: dict[str, Any], out: Path, remote_code: bool, offline: bool, progress: Progress
) -> tuple[Path, str, str | None]:
    """A Hugging Face directory for the source, the revision or digest of its content, and its license."""
    kind = _kind(source)
    if kind == "hub":
        path = _download(source["hub"], source.get("revision") or "main", offline, progress)
        return path, path.name, None
    if kind == "config":
        return _random_directory(source, out, remote_code, offline, progress)
    if kind == "package":
        path, license_name = _package_file(source["package"], source.get("file"))
    else:
        path, license_name = _local_path(source[kind]), None
    if path.is_dir():
        _checked_config(path, remote_code)
        files = sorted({t.file for t in _checked_weights(path).values()})
        files += [path / n for n in (*CONFIG_FILES[:2], *TOKENIZER_FILES) if (path / n).is_file()]
        return path, _content_digest(files, progress), license_name
    if path.suffix.lower() in PICKLES:
        raise _pickled(path, [path.name])
    if path.suffix.lower() != ".gguf":
        raise UserError(
            f"{path} is a file but not a GGUF file. Name a Hugging Face directory (with config.json and "
            "*.safetensors) or a .gguf file."
        )
    from_file = _dequantized_directory(path, out, progress)
    return out, _content_digest([path], progress), from_file or license_name


def _kind(source: dict[str, Any]) -> str:
    if isinstance(source, dict):
        for kind in SOURCES:
            if source.get(kind):
                return kind
        for key in source:
            raise unknown("base source", key, SOURCES)
    raise UserError(f"the base has no source. Give one of: {', '.join(SOURCES)}.")


def _local_path(value: str | os.PathLike[str]) -> Path:
    path = Path(value).expanduser()
    if path.exists():
        return path.resolve()
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, beside) if beside else f"There is no directory {path.parent} either."
    if hint.startswith("Known"):
        hint = f"Nothing in {path.parent} has a name like it."
    raise UserError(f"base path {path} does not exist. {hint}")


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _content_digest(files: list[Path], progress: Progress) -> str:
    """SHA-256 over the names, sizes and content of files."""
    total = sum(p.stat().st_size for p in files) or 1
    whole, done = hashlib.sha256(), 0
    for path in files:
        one = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(1 << 24):
                one.update(block)
                done += len(block)
                progress(done, total, f"reading {path.name}")
        whole.update(f"{path.name}\0{path.stat().st_size}\0{one.hexdigest()}\n".encode())
    return whole.hexdigest()


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise install_with(f"the package '{name}' that holds the base", f"pip install {name}") from None


def _package_file(package: str, file: str | None) -> tuple[Path, str | None]:
    """A file that an installed package brought along, and the package's license."""
    distribution = _distribution(package)
    names = [
        str(f) for f in distribution.files or [] if str(f).lower().endswith((".gguf", ".safetensors", "config.json"))
    ]
    if not file:
        ggufs = [n for n in names if n.lower().endswith(".gguf")]
        if len(ggufs) != 1:
            raise UserError(
                f"package '{package}' holds {len(ggufs)} GGUF files; name one with `file:`. {did_you_mean('', ggufs)}"
            )
        file = ggufs[0]
    path = Path(str(distribution.locate_file(file)))
    if not path.exists():
        raise unknown("file", file, names, f"package '{package}' {distribution.version}")
    facts = distribution.metadata
    license_name = facts.get("License-Expression") or facts.get("License")
    # Some packages paste the whole text into the field; a license's name is one short line.
    short = license_name if license_name and "\n" not in license_name and len(license_name) < 64 else None
    return path.resolve(), short


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def _download(repo: str, revision: str, offline: bool, progress: Progress, weights: bool = True) -> Path:
    """A snapshot of a hub repository's safetensors, configuration and tokenizer, in the hub's own cache."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise install_with("huggingface_hub", "pip install huggingface_hub") from None

    patterns = [*TOKENIZER_FILES, *CONFIG_FILES, *(["*.safetensors", "*.safetensors.index.json"] if weights else [])]
    where = f"hub repository '{repo}' at '{revision}'"
    by_hand = f"fetch it elsewhere with `hf download {repo}` and give the directory as `path:`"
    progress(0, 1, f"fetching {repo}")
    try:
        path = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            # Sub-folders hold other formats (onnx/, original/); `consolidated` repeats all weights once more.
            ignore_patterns=["*/*", f"{MISTRAL_FORMAT}*"],
            local_files_only=offline,
        )
    except errors.GatedRepoError:
        raise UserError(
            f"{where} is gated: accept its license on its page on the hub, then set HF_TOKEN to a token of "
            f"that account; or {by_hand}."
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{where}: the repository has no such revision. Use a branch, a tag or a full commit sha."
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{where} does not exist, or is private: check the spelling, or set HF_TOKEN to a token that may read it."
        ) from None
    except errors.HFValidationError:
        raise UserError(
            f"'{repo}' is not a repository's name. Write `owner/name`, or use `path:` for a local directory."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if offline:
            raise UserError(
                f"{where} is not in the local cache and the hub is off (HF_HUB_OFFLINE or `offline`): "
                f"unset it, or {by_hand}."
            ) from None
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error))[:120]
        raise UserError(
            f"{where} cannot be reached ({reason}): check the connection and HF_TOKEN, or {by_hand}."
        ) from None
    except (errors.HfHubHTTPError, ConnectionError, TimeoutError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:120]
        raise UserError(f"{where} cannot be fetched ({reason}): try again, set HF_TOKEN, or {by_hand}.") from None
    progress(1, 1, f"fetched {repo}")
    found = Path(path)
    if weights and not any(found.glob("*.safetensors")):
        held = _hub_files(repo, revision, offline)
        pickled = [n for n in held if n.endswith(PICKLES)]
        if pickled:
            raise _pickled(where, pickled)
        if any(n.endswith(".gguf") for n in held):
            raise UserError(
                f"{where} holds only GGUF files: fetch one with `hf download {repo} NAME.gguf` and give it as `path:`."
            )
        raise UserError(
            f"{where} holds no *.safetensors: it is not a model's repository, or the download was cut short."
        )
    return found


def _hub_files(repo: str, revision: str, offline: bool) -> list[str]:
    import huggingface_hub

    try:
        return [] if offline else huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # only to word an error better: whatever it is, the error itself is already certain
        return []


def _pickled(where: str | Path, names: list[str]) -> UserError:
    return UserError(
        f"{where} holds only pickled weights ({', '.join(sorted(names)[:3])}), which can run code when "
        "loaded: "
        "safetensors and GGUF only. Use a revision with *.safetensors, or convert it where you trust it."
    )


# --- checks -------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}): the file is damaged or cut short. Fetch it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, not an object. Fetch it again.")
    return value


def _checked_config(path: Path, remote_code: bool) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if ggufs:
            raise UserError(f"{path} has no config.json but GGUF files: name one, as in `path: {path / ggufs[0]}`.")
        raise UserError(f"{path} has no config.json: it is not a Hugging Face model directory, or is incomplete.")
    config = _read_json(file)
    tokenizer = path / "tokenizer_config.json"
    if not remote_code:
        for name, content in ((file, config), (tokenizer, _read_json(tokenizer) if tokenizer.is_file() else {})):
            if content.get("auto_map"):
                raise UserError(
                    f"{name} asks to run the model's own Python code (`auto_map`), which is off. If you "
                    "trust it, "
                    "set `allow_remote_code: true` in the recipe."
                )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise UserError(f"{file}: this model is already quantized ({method}). Give the unquantized model as the base.")
    if not config.get("architectures"):
        raise UserError(f"{file} names no `architectures`: it is not a causal language model's configuration.")
    if "vocab_size" not in _text_config(config):
        raise UserError(f"{file} has no `vocab_size`: it is not a causal language model's configuration.")
    return config


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Where a multimodal configuration keeps its language model's sizes."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" not in config else config


def _context_length(config: dict[str, Any]) -> int:
    text = _text_config(config)
    return next((int(text[key]) for key in CONTEXT_KEYS if text.get(key)), 0)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; `UserError` if the file is damaged or cut short.

    Layout: eight bytes of little-endian header length, that much JSON, then the data; a tensor's
    `data_offsets` count from the end of the header, and the data fill the file exactly.
    """
    size_bytes = path.stat().st_size
    damaged = f"{path} is not a whole safetensors file"
    with path.open("rb") as handle:
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size_bytes - 8, 100_000_000):
            raise UserError(f"{damaged}: its header does not fit into its {size_bytes} bytes. Fetch it again.")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Tensor(path, h["dtype"], tuple(h["shape"]), h["data_offsets"][1] - h["data_offsets"][0])
                for name, h in header.items()
            }
            end = max((h["data_offsets"][1] for h in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise UserError(f"{damaged}: its header cannot be read. Fetch it again.") from None
    if 8 + length + end != size_bytes:
        state = "truncated" if size_bytes < 8 + length + end else "longer than its header says"
        raise UserError(f"{path} is {state}: {size_bytes} bytes, should be {8 + length + end}. Fetch it again.")
    return tensors


def _checked_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a model directory by name, every shard present and whole."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return read_header(path / "model.safetensors")
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no `weight_map`. Fetch it again.")
        shards = sorted(set(weight_map.values()))
        # A shard's name comes from a file: it may not lead out of the directory.
        missing = [s for s in shards if Path(s).name != s or not (path / s).is_file()]
        if missing:
            raise UserError(
                f"{path} is incomplete: {len(missing)} of {len(shards)} shards are missing "
                f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}). Fetch them again."
            )
        tensors = {name: t for shard in shards for name, t in read_header(path / shard).items()}
        absent = sorted(set(weight_map) - set(tensors))
        if absent:
            raise UserError(
                f"{path}: its index names {len(absent)} tensors that no shard holds ({absent[0]}, ...). Fetch it again."
            )
        return tensors
    loose = sorted(p for p in path.glob("*.safetensors") if not p.name.startswith(MISTRAL_FORMAT))
    if len(loose) == 1:
        return read_header(loose[0])
    if loose:
        raise UserError(
            f"{path} has {len(loose)} *.safetensors but no model.safetensors.index.json: it is incomplete. "
            "Fetch it again."
        )
    pickled = [p.name for p in path.iterdir() if p.suffix.lower() in PICKLES]
    if pickled:
        raise _pickled(path, pickled)
    raise UserError(f"{path} has no *.safetensors: it is incomplete, or not a model. Safetensors and GGUF only.")


def _counted(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that count as parameters: no buffers, and a tied output matrix once."""
    tied = _text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    has_input = any("embed" in name or name.endswith("wte.weight") for name in tensors)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(NOT_WEIGHTS) and not (tied and has_input and name.endswith("lm_head.weight"))
    }


def _main_dtype(tensors: dict[str, Tensor]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    main = max(sizes, key=lambda dtype: sizes[dtype])
    return DTYPES.get(main, main.lower())


def _license(path: Path) -> str | None:
    """The license that a model card's front matter names."""
    card = path / "README.md"
    if not card.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    fields = (
        dict(re.findall(r"^(license(?:_name)?):\s*['\"]?([^'\"\n]+?)['\"]?\s*$", match[1], re.MULTILINE))
        if match
        else {}
    )
    return fields.get("license_name") if fields.get("license") == "other" else fields.get("license")


@contextmanager
def _disk_faults(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a line about it."""
    try:
        yield
    except OSError as error:
        if error.errno == 28:
            free_gb = shutil.disk_usage(out).free / 1e9
            raise UserError(
                f"no space left on the disk of {out} ({free_gb:.1f} GB free): free some, or set "
                "WORKBENCH_HOME to a larger disk."
            ) from None
        raise
    except Exception as error:  # safetensors raises its own type and keeps the system's words
        if "No space left" in str(error):
            raise UserError(
                f"no space left on the disk of {out}: free some, or set WORKBENCH_HOME to a larger disk."
            ) from None
        raise


def _need_space(out: Path, need_bytes: int) -> None:
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < need_bytes:
        raise UserError(
            f"preparing the base needs {need_bytes / 1e9:.1f} GB in {out}, which has "
            f"{free_bytes / 1e9:.1f} GB free: "
            "free some, or set WORKBENCH_HOME to a larger disk."
        )


# --- writing ------------------------------------------------------------------------------------


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def for_both_readers(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that transformers 4 and 5 both read: `rope_theta` and `rope_scaling` beside `rope_parameters`,
    `torch_dtype` beside `dtype`. Rope parameters that differ by layer type have no older form and stay as they are.
    """
    config = dict(config)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type", "default") != "default":
            # Newer readers let `rope_scaling` win over `rope_parameters`, so it must say all of it.
            config["rope_scaling"] = dict(rope)
    elif config.get("rope_theta") and not rope:
        scaling = config.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        config["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": config["rope_theta"]}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype:
        config["dtype"] = config["torch_dtype"] = dtype
    return config


def _write_weights(
    out: Path, shapes: dict[str, tuple[int, ...]], dtype: str, make: Callable[[str], Any], progress: Progress, text: str
) -> None:
    """Write tensors one shard at a time, sharded and indexed as transformers does; `make(name)` gives "
    "each."""
    import torch
    from safetensors.torch import save_file

    item_bytes = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    sizes = {name: math.prod(shape) * item_bytes for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    total = sum(sizes.values())
    _need_space(out, total)
    weight_map, done = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for name in names:
            tensor = make(name)
            if tuple(tensor.shape) != shapes[name]:
                raise AssertionError(f"{name} came out as {tuple(tensor.shape)}, planned {shapes[name]}")
            content[name] = tensor.to(getattr(torch, dtype)).contiguous()
            weight_map[name] = file
            done += sizes[name]
            progress(done, total, text)
        save_file(content, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_side_files(source: Path, out: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _write_card(out: Path, name: str, license_name: str | None, text: str) -> None:
    """A model card: converters take the model's name and license from it."""
    head = [f"license: {license_name.lower()}"] if license_name else []
    (out / "README.md").write_text(
        "\n".join(["---", *head, f"model_name: {name}", "---", "", text, ""]), encoding="utf-8"
    )


# --- GGUF ---------------------------------------------------------------------------------------


def _open_gguf(path: Path) -> Any:
    """A GGUF file's reader, all tensors inside the file."""
    try:
        import gguf
    except ImportError:
        raise install_with("gguf", "pip install gguf") from None
    size_bytes = path.stat().st_size
    with path.open("rb") as handle:
        if handle.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (it does not begin with 'GGUF'). Fetch it again.")
    cut = UserError(
        f"{path} is truncated or damaged: its {size_bytes} bytes do not hold the tensors it lists. Fetch it again."
    )
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError):
        raise cut from None
    if any(int(t.data_offset) + int(t.n_bytes) > size_bytes for t in reader.tensors):
        raise cut
    parts = reader.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise UserError(
            f"{path} is one part of {int(parts.contents())}: join them with llama.cpp's `llama-gguf-split "
            "--merge` first."
        )
    if not reader.tensors or reader.get_field("general.architecture") is None:
        raise UserError(f"{path} holds no model: no tensors, or no `general.architecture`.")
    return reader


def _field(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _dequantized_directory(path: Path, out: Path, progress: Progress) -> str | None:
    """Write a GGUF file as a Hugging Face directory; returns the license the file names.

    float32 where the file is quantized, so that nothing is rounded twice; else the file's own type.
    Architectures: those that transformers reads with `gguf_file=`.
    """
    reader = _open_gguf(path)
    architecture = str(_field(reader, "general.architecture"))
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    dtype = "float32" if set(types) - {"F32", "F16", "BF16"} else DTYPES[max(types, key=lambda t: types[t])]
    parameters = sum(int(t.n_elements) for t in reader.tensors)
    out.mkdir(parents=True, exist_ok=True)
    _need_space(out, parameters * (4 if dtype == "float32" else 2))

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    progress(0, 4, f"reading {path.name}")
    try:
        AutoConfig.from_pretrained(**where)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(
            f"{path}: transformers cannot read GGUF files of the architecture '{architecture}' ({reason}). "
            "Use the model's safetensors."
        ) from None
    progress(1, 4, f"de-quantizing {path.name}")
    loaded = AutoModelForCausalLM.from_pretrained(
        **where, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    progress(2, 4, "writing safetensors")
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    scaling = _rope_scaling(path, reader, architecture, config)
    if scaling:
        config.rope_parameters = {**(config.rope_parameters or {}), **scaling}
    # The loaded model remembers that it was a GGUF and refuses to be saved; one built from its config does not.
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True, strict=False)
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(out, safe_serialization=True, max_shard_size=SHARD_BYTES)
    progress(3, 4, "writing the tokenizer")
    saved = _read_json(out / "config.json")
    for key in ("_name_or_path", "_model_name_or_path"):
        saved.pop(key, None)
    saved["dtype"] = dtype
    _write_json(out / "config.json", for_both_readers(saved))
    _save_tokenizer(tokenizer, reader, out, _context_length(saved))
    license_name = _field(reader, "general.license")
    name = re.sub(r"[.-](?:I?Q\d\w*|B?F16|F32)$", "", path.stem, flags=re.IGNORECASE)
    kinds = ", ".join(sorted(types))
    _write_card(out, name, license_name, f"De-quantized from `{path.name}` ({kinds}) to {dtype} by the Workbench.")
    progress(4, 4, f"de-quantized {path.name}")
    return license_name


def _rope_scaling(path: Path, reader: Any, architecture: str, config: Any) -> dict[str, Any] | None:
    """Rope scaling that the file has and transformers' GGUF reader leaves out; else None.

    llama.cpp stores Llama 3's scaling as a tensor of divisors, one a frequency (`rope_freqs.weight`). The
    formula that made them is public (Llama 3.1's model code), so its one free parameter, the factor, is
    read off the largest divisor and the result is compared with the whole tensor.
    """
    import numpy as np

    present = getattr(config, "rope_parameters", None) or {}
    if present.get("rope_type", "default") != "default":
        return None
    divisors = next(
        (np.asarray(t.data, dtype=np.float64) for t in reader.tensors if t.name == "rope_freqs.weight"), None
    )
    kind = _field(reader, f"{architecture}.rope.scaling.type", "none")
    factor = _field(reader, f"{architecture}.rope.scaling.factor")
    original = _field(reader, f"{architecture}.rope.scaling.original_context_length")
    lost = UserError(
        f"{path}: its rope scaling cannot be carried into a Hugging Face configuration. Use the model's safetensors."
    )
    if divisors is not None and not np.allclose(divisors, 1):
        original = int(original or 8192)
        scaling = {
            "rope_type": "llama3",
            "factor": float(round(float(divisors.max()), 3)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        theta = float(_field(reader, f"{architecture}.rope.freq_base", 10000.0))
        if not np.allclose(llama3_divisors(theta, 2 * len(divisors), scaling), divisors, rtol=1e-3):
            raise lost
        return scaling
    if kind == "none" or not factor or float(factor) == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and original:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    raise lost


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> Any:
    """What Llama 3.1 divides each of the `head_dim / 2` rope frequencies by."""
    import numpy as np

    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _save_tokenizer(tokenizer: Any, reader: Any, out: Path, context_length: int) -> None:
    """Save a GGUF's tokenizer in the form that transformers 4 and 5, vLLM and llama.cpp's converter all "
    "load."""
    model = _field(reader, "tokenizer.ggml.model", "")
    pre = _field(reader, "tokenizer.ggml.pre", "")
    # llama.cpp's own defaults for a file that does not say.
    by_default = model == "llama" or pre in ("llama3", "llama-v3", "llama-bpe")
    adds_bos = bool(_field(reader, "tokenizer.ggml.add_bos_token", by_default))
    if pre in DIGIT_SPLITTERS:
        from tokenizers import pre_tokenizers

        # No merge joins digits, so this only shows where spaces precede one ("  3"); 0.1 % of a text's tokens differ.
        steps = [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bos = tokenizer.bos_token
    if adds_bos and bos and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        from tokenizers.processors import Sequence, TemplateProcessing

        template = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        before = tokenizer.backend_tokenizer.post_processor
        tokenizer.backend_tokenizer.post_processor = Sequence([before, template]) if before else template
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = _read_json(file)
    for key in ("is_local", "local_files_only", "backend", "gguf_file"):
        config.pop(key, None)
    # The class's name in transformers 5 is unknown to readers built on 4; this one both know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = context_length or config.get("model_max_length")
    template_file = out / "chat_template.jinja"
    if template_file.is_file():
        config["chat_template"] = template_file.read_text(encoding="utf-8")
    _write_json(file, config)


# --- random weights -----------------------------------------------------------------------------


def _config_of(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        config = value
    else:
        path = _local_path(value)
        config = _read_json(path / "config.json" if path.is_dir() else path)
    if not config.get("model_type"):
        raise UserError("base.config has no `model_type` (such as llama): transformers cannot tell what to build.")
    return config


def _tokenizer_source(value: Any) -> dict[str, Any]:
    """A tokenizer given as a source, a local path, or a hub repository's name."""
    if isinstance(value, dict):
        return value
    local = Path(value).expanduser()
    is_path = local.exists() or str(value).startswith((".", "/", "~")) or str(value).count("/") != 1
    return {"path": value} if is_path else {"hub": value}


def _random_directory(
    source: dict[str, Any], out: Path, remote_code: bool, offline: bool, progress: Progress
) -> tuple[Path, str, str | None]:
    """A model of a given shape with random bfloat16 weights, never whole in memory."""
    if source.get("init", "random") != "random":
        raise unknown("init", str(source["init"]), ["random"], "base")
    given = _config_of(source["config"])
    if given.get("auto_map") and not remote_code:
        raise UserError(
            "base.config asks to run the model's own Python code (`auto_map`), which is off (`allow_remote_code`)."
        )
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    if given["model_type"] not in CONFIG_MAPPING:
        raise unknown("model_type", given["model_type"], CONFIG_MAPPING.keys(), "base.config")
    fields = {
        k: v
        for k, v in given.items()
        if k not in ("transformers_version", "quantization_config", "torch_dtype", "dtype")
    }
    try:
        config = AutoConfig.for_model(**fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever impossible sizes led to, in whichever layer's constructor
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise UserError(
            f"base.config describes no causal language model that transformers can build ({reason})."
        ) from None
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if any(len(shape) > 2 for shape in names.values()):
        # transformers fuses experts in memory and splits them in files; the fused names are not a checkpoint's.
        raise UserError(
            "base.config: random weights of mixtures of experts are not supported. Use a dense model's shape."
        )
    std = float(getattr(config, "initializer_range", None) or 0.02)
    seed = int(source.get("seed") or 0)

    def make(name: str) -> Any:
        if name.endswith("bias"):
            return torch.zeros(names[name])
        if len(names[name]) < 2:
            return torch.ones(names[name])
        # One generator a tensor: a tensor's values do not depend on the others or on their order.
        mixed = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        return torch.randn(names[name], generator=generator, dtype=torch.float32) * std

    out.mkdir(parents=True, exist_ok=True)
    _write_weights(out, names, "bfloat16", make, progress, "writing random weights")
    saved = config.to_dict()
    for key in ("_name_or_path", "_model_name_or_path"):
        saved.pop(key, None)
    saved["architectures"] = [type(model).__name__]
    saved["dtype"] = "bfloat16"
    _write_json(out / "config.json", for_both_readers(saved))
    _write_json(
        out / "generation_config.json",
        {k: saved[k] for k in ("bos_token_id", "eos_token_id") if saved.get(k) is not None},
    )
    tokenizer_id = None
    if source.get("tokenizer"):
        tokenizer_id = _bring_tokenizer(_tokenizer_source(source["tokenizer"]), out, saved, offline, progress)
    _write_card(
        out, f"random-{given['model_type']}", None, f"Random weights of a shape, seed {seed}. Its text means nothing."
    )
    content = {"config": given, "seed": seed, "tokenizer": tokenizer_id}
    return out, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), None


def _bring_tokenizer(
    source: dict[str, Any], out: Path, config: dict[str, Any], offline: bool, progress: Progress
) -> str:
    """Put another model's tokenizer beside these weights; returns what identifies it."""
    from transformers import AutoTokenizer

    kind = _kind(source)
    if kind == "hub":
        path = _download(source["hub"], source.get("revision") or "main", offline, progress, weights=False)
    elif kind == "package":
        path, _ = _package_file(source["package"], source.get("file"))
    else:
        path = _local_path(source[kind])
    if path.is_file():
        reader = _open_gguf(path)
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        _save_tokenizer(tokenizer, reader, out, _context_length(config))
        identity = str(path.stat().st_size)
    else:
        found = [path / n for n in TOKENIZER_FILES if (path / n).is_file()]
        if not found:
            raise UserError(
                f"{path} holds no tokenizer (tokenizer.json, tokenizer.model, ...). Name a directory that does."
            )
        _copy_side_files(path, out, TOKENIZER_FILES)
        tokenizer = AutoTokenizer.from_pretrained(str(out))
        identity = _content_digest(found, progress)
    size, vocab_size = len(tokenizer), int(_text_config(config)["vocab_size"])
    if size > vocab_size:
        raise UserError(
            f"base.config: vocab_size {vocab_size} is smaller than the tokenizer's {size} tokens. Set "
            f"vocab_size to {size} or more."
        )
    return identity


# --- the exact equivalent -----------------------------------------------------------------------

# For each weight of a Llama layer: what its rows and columns run over, the factors that its rows are multiplied
# by, and those that its columns are divided by. A product of the two along any path through the layer is one.
_LAYER = {
    "input_layernorm": ("hidden", None, "attention_in", None),
    "self_attn.q_proj": ("heads", "hidden", None, "attention_in"),
    "self_attn.k_proj": ("kv_heads", "hidden", None, "attention_in"),
    "self_attn.v_proj": ("kv_heads", "hidden", "value", "attention_in"),
    "self_attn.o_proj": ("hidden", "heads", None, "value_of_head"),
    "post_attention_layernorm": ("hidden", None, "mlp_in", None),
    "mlp.gate_proj": ("mlp", "hidden", None, "mlp_in"),
    "mlp.up_proj": ("mlp", "hidden", "up", "mlp_in"),
    "mlp.down_proj": ("hidden", "mlp", None, "up"),
}
# The final norm is not rescaled: what follows it may be the tied embedding, which is also read at the input.
_OUTER = {
    "model.embed_tokens": ("vocab", "hidden", None, None),
    "model.norm": ("hidden", None, None, None),
    "lm_head": ("vocab", "hidden", None, None),
}


def _write_equivalent(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    equivalent: dict[str, Any],
    out: Path,
    progress: Progress,
) -> None:
    """Write a Llama model that computes the same function with other weights and wider, zero-padded sizes.

    1. Every channel of a layer's two RMSNorms is multiplied by a random factor in [0.7, 1.4] and the columns of
       the linear layers that read it are divided by it; the rows of v_proj against the columns of o_proj
       (each KV head's factors repeated for the query heads that share it) and those of up_proj against
       down_proj likewise: attention mixes positions but not channels, and SwiGLU is linear in `up`.
    2. Hidden size, heads and KV heads grow by one ratio, new entries zero; the MLP grows to a multiple of 256 if
       it is not one. A mean of squares over n' > n channels of which n are alive is n/n' of the old one,
       so RMSNorm's weight is multiplied by sqrt(n/n') and its epsilon by n/n'.

    All in float64, stored as float32.
    """
    import torch
    from safetensors import safe_open

    old, new = _equivalent_sizes(config, int(equivalent["hidden"]))
    seed, shrink = int(equivalent["seed"]), old["hidden"] / new["hidden"]
    group = old["heads"] // old["kv_heads"]
    head_dim = old["head_dim"]

    def width(sizes: dict[str, int], axis: str) -> int:
        return sizes[axis] * head_dim if axis in ("heads", "kv_heads") else sizes[axis]

    layer_factors: dict[int, dict[str, Any]] = {}

    def factors(layer: int) -> dict[str, Any]:
        if layer not in layer_factors:
            layer_factors.clear()  # tensors come layer by layer
            layer_factors[layer] = equivalent_factors(seed, layer, old, group, head_dim)
        return layer_factors[layer]

    def row_of(name: str) -> tuple[str, str | None, str | None, str | None, int | None, str]:
        stem, _, kind = name.rpartition(".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if match and match[2] in _LAYER:
            return (*_LAYER[match[2]], int(match[1]), kind)
        if stem in _OUTER:
            return (*_OUTER[stem], None, kind)
        raise UserError(f"{path}: an exact equivalent of '{name}' is not known. Drop `equivalent` from the recipe.")

    shapes = {}
    tied = config.get("tie_word_embeddings", False) and "model.embed_tokens.weight" in tensors
    for name in sorted(tensors, key=_layer_order):
        if name.endswith(NOT_WEIGHTS) or (tied and name == "lm_head.weight"):
            continue
        rows, columns, *_, kind = row_of(name)
        shape = (width(new, rows), width(new, columns)) if columns and kind == "weight" else (width(new, rows),)
        shapes[name] = shape

    def make(name: str) -> Any:
        rows, columns, multiply, divide, layer, kind = row_of(name)
        with safe_open(tensors[name].file, framework="pt") as handle:
            weight = handle.get_tensor(name).to(torch.float64)
        expected = (width(old, rows), width(old, columns)) if columns and kind == "weight" else (width(old, rows),)
        if tuple(weight.shape) != expected:
            raise UserError(
                f"{path}: {name} has shape {tuple(weight.shape)}, its config.json means {expected}. The "
                "model is damaged."
            )
        if multiply and layer is not None:
            factor = factors(layer)[multiply]
            weight = weight * (factor[:, None] if weight.ndim == 2 else factor)
        if divide and layer is not None and weight.ndim == 2:
            weight = weight / factors(layer)[divide][None, :]
        if name.rpartition(".")[0].endswith("norm"):
            weight = weight * math.sqrt(shrink)
        padded = torch.zeros(shapes[name], dtype=torch.float64)
        padded[tuple(slice(0, n) for n in weight.shape)] = weight
        return padded

    _write_weights(out, shapes, "float32", make, progress, "writing the exact equivalent")
    changed = {
        **config,
        "hidden_size": new["hidden"],
        "num_attention_heads": new["heads"],
        "num_key_value_heads": new["kv_heads"],
        "head_dim": head_dim,
        "intermediate_size": new["mlp"],
        "rms_norm_eps": config["rms_norm_eps"] * shrink,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": "float32",
    }
    changed.pop("torch_dtype", None)
    _write_json(out / "config.json", for_both_readers(changed))
    _copy_side_files(path, out, ("generation_config.json", *TOKENIZER_FILES))
    card = path / "README.md"
    name = (
        re.search(r"^model_name:\s*(.+)$", card.read_text(encoding="utf-8"), re.MULTILINE) if card.is_file() else None
    )
    _write_card(
        out,
        name[1].strip() if name else path.name,
        _license(path),
        f"The same function as its source (seed {seed}): channels rescaled against each other, hidden size "
        f"{old['hidden']} padded with zeros to {new['hidden']}. Made by the Workbench so that no weight "
        "sits on an "
        "older quantization's grid and every block size divides every row.",
    )


def _layer_order(name: str) -> tuple[int, str]:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


def _equivalent_sizes(config: dict[str, Any], hidden: int) -> tuple[dict[str, int], dict[str, int]]:
    """The model's sizes and those of its equivalent of a given hidden size."""
    architecture = config["architectures"][0]
    if architecture != "LlamaForCausalLM":
        raise UserError(
            f"`equivalent` is known for LlamaForCausalLM only; this base is {architecture}. Drop it from the recipe."
        )
    if config.get("hidden_act", "silu") != "silu" or config.get("pretraining_tp", 1) not in (0, 1):
        raise UserError(
            "`equivalent` needs a plain Llama model (hidden_act silu, pretraining_tp 1). Drop it from the recipe."
        )
    heads = int(config["num_attention_heads"])
    mlp = int(config["intermediate_size"])
    old = {
        "hidden": int(config["hidden_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "mlp": mlp,
        "vocab": int(config["vocab_size"]),
    }
    grown = {axis: old[axis] * hidden / old["hidden"] for axis in ("heads", "kv_heads")}
    if hidden < old["hidden"] or any(n != int(n) for n in grown.values()):
        step = old["hidden"] // math.gcd(old["hidden"], old["kv_heads"])
        fits = [h for h in range(old["hidden"], 8 * old["hidden"] + 1, step) if h % 256 == 0][:3]
        raise UserError(
            f"equivalent.hidden {hidden} does not fit hidden size {old['hidden']}, {heads} heads and "
            f"{old['kv_heads']} KV heads, "
            f"which must grow by one ratio.{' Possible: ' + ', '.join(map(str, fits)) + '.' if fits else ''}"
        )
    new = {**old, "hidden": hidden, **{axis: int(n) for axis, n in grown.items()}, "mlp": -(-mlp // 256) * 256}
    return old, new


def equivalent_factors(seed: int, layer: int, sizes: dict[str, int], group: int, head_dim: int) -> dict[str, Any]:
    """One layer's random factors in [0.7, 1.4], float64, a vector for each use named in `_LAYER`."""
    import numpy as np
    import torch

    rng = np.random.default_rng([seed, layer])
    counts = {
        "attention_in": sizes["hidden"],
        "mlp_in": sizes["hidden"],
        "value": sizes["kv_heads"] * head_dim,
        "up": sizes["mlp"],
    }
    drawn = {use: torch.from_numpy(rng.uniform(0.7, 1.4, n)) for use, n in counts.items()}
    drawn["value_of_head"] = drawn["value"].view(-1, head_dim).repeat_interleave(group, dim=0).flatten()
    return drawn
