"""Upload an artifact with its card to the hub, in one commit; the only thing here that sends anything anywhere.

Refused where the base's licence forbids it or is not known, unless the person says so. What is uploaded is the
artifact's own files and the card: safetensors or GGUF, tokenizer and configuration, never code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from workbench.errors import UserError, importing
from workbench.front_matter import stated_licence
from workbench.home import local
from workbench.hub import card as cards
from workbench.hub.licences import known_licence, refusal
from workbench.records import Row

ALLOWED = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model", ".md")


def path_of(row: Row) -> Path:
    """Where a row's artifact is on this machine. Raises `UserError` if it is gone."""
    path = local(row.artifact.path)
    if not os.path.exists(path):  # nor can it, where the row names what is no path
        raise UserError(
            f"{path}: the files of {row.artifact.variant} are not there (another machine's, or cleaned away). "
            "Make them again with `workbench quantize RECIPE`"
        )
    return path


def licence_of(row: Row, rows: Sequence[Row]) -> str | None:
    """The licence that the base's own card states, beside the base or in the package that brought it."""
    for each in rows:
        if each.base == row.base and each.artifact.method == "base" and each.artifact.format == "safetensors":
            stated = stated_licence(local(each.artifact.path) / "README.md")
            if stated:
                return stated
    source = row.artifact.provenance.get("source") or {}
    if source.get("hub"):
        return _of_hub_cache(source["hub"])
    if source.get("package"):
        return _of_package(source["package"])
    return None


def push(
    rows: Sequence[Row],
    row: Row,
    repository: str,
    *,
    licence: str | None = None,
    author: str = "",
    private: bool = False,
    anyway: bool = False,
) -> str:
    """Upload; the URL of the commit.

    Raises `UserError` if the licence is in the way and `anyway` was not said, if the repository's name is none, or
    if the hub refuses.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"{repository}: write the repository as OWNER/NAME")
    if row.artifact.provenance.get("found"):
        raise UserError(f"not pushed: {row.artifact.variant} was made by others, and is theirs to publish")
    if row.artifact.provenance.get("loaded"):
        raise UserError(
            f"not pushed: {row.artifact.variant} is the base's own files, quantized only as they are loaded"
        )
    licence = licence or licence_of(row, rows)
    reason = refusal(licence, row.base)
    if reason and not anyway:
        raise UserError(f"not pushed: {reason}. Name it with --licence ID, or say --anyway")
    path = path_of(row)
    with importing("huggingface_hub", "pip install huggingface_hub"):
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    foreign = [file.name for file in files if file.suffix not in ALLOWED]
    if foreign:
        raise UserError(f"not pushed: {path} holds what is neither weights nor configuration: {', '.join(foreign)}")
    root = path.parent if path.is_file() else path
    text = cards.card(rows, row, licence, author)
    operations = [
        huggingface_hub.CommitOperationAdd(str(file.relative_to(root)), str(file))
        for file in files
        if file.relative_to(root) != Path("README.md")
    ]
    operations.append(huggingface_hub.CommitOperationAdd("README.md", text.encode()))
    notice = notice_of(licence)
    if notice:
        operations.append(huggingface_hub.CommitOperationAdd("Notice", notice.encode()))
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=f"{row.artifact.variant} of {row.base}")
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(f"{repository}: not pushed, HF_HUB_OFFLINE is set: unset it for this command") from None
        # The hub's library hands its HTTP client's errors on, and which client that is changes.
        if type(error).__module__.split(".")[0].rstrip("2") in ("httpx", "httpcore", "requests", "urllib3"):
            raise UserError(f"{repository}: not pushed, the hub cannot be reached ({said}): try again") from None
        if not isinstance(error, HfHubHTTPError | LocalTokenNotFoundError | OSError | ValueError):
            raise
        raise UserError(f"{repository}: the hub refused ({said}). Check `hf auth whoami` and the name") from error
    return str(done.commit_url)


def notice_of(licence: str | None) -> str | None:
    """The text of the file named "Notice" that some licences want beside the weights."""
    known = known_licence(licence)
    for ask in known.asks if known else ():
        quoted = re.search(r'named "Notice": "(.*)"$', ask) or re.search(r'^keep "(.*)" in a text file named', ask)
        if quoted:
            return quoted[1] + "\n"
    return None


def _of_hub_cache(repository: str) -> str | None:
    """From the card in the hub's own cache, if it was ever downloaded; nothing is asked of the hub."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(repository, "README.md")
    except ValueError:  # not the name of a repository
        return None
    return stated_licence(Path(found)) if isinstance(found, str) else None


def _of_package(name: str) -> str | None:
    """The SPDX expression of an installed package that ships a model."""
    import importlib.metadata

    try:
        stated = importlib.metadata.metadata(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    words = [stated[field] for field in ("License-Expression", "License") if field in stated]
    known = known_licence(words[0]) if words else None
    return known.id if known else None
