"""From any source of a base model to one Hugging Face directory that every method and engine reads.

A base comes from a hub repository (`hub`), a local directory or a file inside an installed Python package
(`sources`), a GGUF file (`dequantize`), or a bare configuration (`random_weights`). `prepare` checks what it finds
(`checkpoint`) and, where asked, rewrites it as the same function with other weights (`equivalent`). What is
already a directory is used in place; nothing is copied, so a base from a hub costs no disk twice.

Rejected: leaving each engine to read each kind of source. A variant would then be compared with a base that
went through another reader.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

from workbench.disk import disk_faults, expanded
from workbench.errors import UserError
from workbench.front_matter import stated_licence
from workbench.records import BaseRequest, PreparedBase, from_json, to_json
from workbench.records import digest as short_digest
from workbench.worker import Progress
from workbench.worker.base import adapter, text_part
from workbench.worker.base.alone import alone
from workbench.worker.base.checkpoint import (
    CONFIG_FILES,
    PICKLES,
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    checked_config,
    main_dtype,
    only_pickles,
    parameters_of,
    read_model,
)
from workbench.worker.base.config_json import context_tokens, text_config, window_tokens
from workbench.worker.base.dequantize import Dequantized, dequantized_directory
from workbench.worker.base.equivalent import write_equivalent
from workbench.worker.base.floats import plain_dtype, quantized_types, write_plain
from workbench.worker.base.gguf_file import present_parts
from workbench.worker.base.hub import download, is_offline
from workbench.worker.base.random_weights import config_of, random_directory
from workbench.worker.base.sources import (
    BaseSource,
    content_digest,
    distribution_of,
    named_source,
    source_of,
    stamps,
)
from workbench.worker.base.whole import check_finite, check_tokenizer, check_whole

PREPARE_VERSION = 1
"""Version of the bytes that `prepare` writes for a given source. Raise it when they change."""

CHECKS_VERSION = 6
"""Version of what `prepare` refuses. Raise it, and every base is looked at anew, though its bytes and digest stay."""


def prepare(payload: object, progress: Progress) -> object:
    """Worker for a `BaseRequest`: make the base ready to read. Returns a `PreparedBase` that says what it is.

    `out` is written only if the source is not already a Hugging Face directory of the model alone, or `equivalent` is
    asked for. Raises `UserError` for all that a user can mend.
    """
    request: BaseRequest = from_json(BaseRequest, payload)
    out, equivalent, remote_code = Path(request.out), request.equivalent, request.allow_remote_code
    offline = request.offline or is_offline()
    out.mkdir(parents=True, exist_ok=True)
    source = source_of(request.source)
    merged = out / ".merged" if equivalent else out
    plain = out / ".plain" if equivalent or source.adapter else out

    with disk_faults(out):
        path, revision, license_name, made = _directory(source, plain, remote_code, offline, progress)
        config, tensors = read_model(path, remote_code)
        dtype, rewritten, whole = plain_dtype(config, tensors), list[str](), ""
        stored_in = quantized_types(config, tensors)
        # What was drawn at random is measured for speed alone.
        text = None if source.config else text_part.of(config)
        if dtype:
            raw = out / ".raw" if text else plain
            rewritten = write_plain(path, config, tensors, raw, progress)
            path = raw
            config, tensors = read_model(path, remote_code)
        if text:
            whole = "" if dtype or equivalent else str(path.absolute())
            text |= {"dtype": dtype} if dtype else {}
            rewritten += text_part.write(path, config, text, tensors, plain, progress)
            path = plain
            config, tensors = read_model(path, remote_code)
        path, warnings = alone(path, config, tensors, plain)
        config = checked_config(path, remote_code)
        adapted = ""
        if source.adapter:
            folder = adapter.fetch(named_source(source.adapter), offline, progress)
            warnings += adapter.merge(path, tensors, folder, merged, remote_code, progress)
            license_name, path = license_name or stated_licence(path / "README.md"), merged
            adapted, (config, tensors) = (
                content_digest(adapter.files_of(folder), progress),
                read_model(path, remote_code),
            )
        if equivalent:
            write_equivalent(path, config, tensors, equivalent["hidden"], equivalent["seed"], out, progress)
            license_name = license_name or stated_licence(path / "README.md")
            path = out
            config, tensors = read_model(out, remote_code)
        for scratch in {plain, merged, out / ".raw"} - {out}:
            shutil.rmtree(scratch, ignore_errors=True)
        vocab_size = int(text_config(config)["vocab_size"])
        check_whole(path, config, tensors, remote_code)
        check_tokenizer(path, vocab_size, remote_code)
        check_finite(tensors, progress)

    counted = parameters_of(config, tensors)
    identity = {"version": PREPARE_VERSION, "content": revision, "equivalent": equivalent}
    if made and made.carried:
        # What version 1 made of such a file was another model.
        identity["carried"] = made.carried
    if dtype:
        identity["dtype"] = dtype
    if text:
        identity["part"] = "text"
    if adapted:
        identity["adapter"] = adapted
    prepared = PreparedBase(
        path=str(path),
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        dtype=main_dtype(counted),
        parameters=sum(math.prod(t.shape) for t in counted.values()),
        weight_bytes=sum(t.size_bytes for t in counted.values()),
        architecture=config["architectures"][0],
        vocab_size=vocab_size,
        context_length=context_tokens(config),
        sliding_window=window_tokens(config),
        tokenizer=any((path / name).is_file() for name in VOCABULARY_FILES),
        license=license_name or stated_licence(path / "README.md"),
        revision=revision,
        whole=whole,
        warnings=(made.warnings if made else []) + rewritten + warnings,
        # An equivalent's weights are other numbers, on nobody's grid, and so are most of a merged adapter's.
        quantized_types=[] if equivalent or adapted else made.quantized_types if made else stored_in,
    )
    return to_json(prepared)


def identify(source: object) -> str:
    """A cheap name for the present state of a source, for a cache key: nothing is downloaded or read through.

    Files are known by name, size and time of change; a hub repository by its revision as written, so that a
    branch name stands for whatever it pointed at when the base was prepared.
    """
    return f"v{PREPARE_VERSION}.{CHECKS_VERSION}:{_state(source_of(source))}"


def _state(source: BaseSource) -> str:
    if source.adapter:
        return f"{_state(replace(source, adapter=''))}+{_state(named_source(source.adapter))}"
    if source.hub:
        return f"hub:{source.hub}@{source.revision}"
    if source.package:
        return f"package:{source.package}=={distribution_of(source.package).version}/{source.file or ''}"
    if source.config:
        tokenizer = _state(named_source(source.tokenizer)) if source.tokenizer else None
        facts = {"config": config_of(source.config), "seed": source.seed, "tokenizer": tokenizer}
        return f"config:{short_digest(facts)}"
    path, _ = source.located()
    # By the name that it was given by: a link's target may have another, as in the hub's cache.
    parts = present_parts(expanded(source.path)) if source.path and path.is_file() else []
    state = [stamps(part) for part in parts] if len(parts) > 1 else stamps(path)
    return f"path:{path}:{short_digest(state)}"


def _directory(
    source: BaseSource, out: Path, remote_code: bool, offline: bool, progress: Progress
) -> tuple[Path, str, str | None, Dequantized | None]:
    """A Hugging Face directory for the source, the revision or digest of its content, its license, and what was made
    of a GGUF file."""
    if source.hub:
        path = download(source.hub, source.revision, offline, progress)
        return path, path.name, None, None
    if source.config:
        return *random_directory(source, out, remote_code, offline, progress), None
    path, license_name = source.located()
    if path.is_dir():
        files = sorted({tensor.file for tensor in read_model(path, remote_code)[1].values()})
        files += [path / n for n in (*CONFIG_FILES[:2], *TOKENIZER_FILES) if (path / n).is_file()]
        return path, content_digest(files, progress), license_name, None
    if path.suffix.lower() in PICKLES:
        raise only_pickles(path, [path.name])
    if path.suffix.lower() != ".gguf":
        raise UserError(
            f"{path} is a file but not a GGUF file. Name a Hugging Face directory (with config.json and "
            "*.safetensors) or a .gguf file."
        )
    made = dequantized_directory(path, out, progress)
    return out, content_digest([path], progress), made.license or license_name, made
