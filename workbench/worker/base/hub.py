"""A hub repository's safetensors, configuration and tokenizer, fetched into the hub's own cache.

The cache is the hub client's, shared with every other program of the user, so what is there is not fetched
twice and nothing is copied. Most of this module is what can go wrong on the way, each with what to do about it.

Rejected: fetching whole repositories (many hold the weights two or three times, in other formats).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import UserError, did_you_mean, importing
from workbench.worker import Progress
from workbench.worker.base.checkpoint import (
    CONFIG_FILES,
    MISTRAL_FORMAT,
    PICKLES,
    TOKENIZER_FILES,
    StoredTensor,
    checked_config,
    only_pickles,
    read_model,
)
from workbench.worker.base.gguf_file import header_bytes, parts_of

ReadModel = Callable[[Path, bool], tuple[dict[str, Any], dict[str, StoredTensor]]]
FRONT_BYTES = 1 << 20
MOST_FRONT_BYTES = 1 << 26
"""Of a GGUF file that are asked for first, and at the most; the header of 150,000 tokens has eight times the first."""

BLOB = re.compile("[0-9a-f]{64}")
"""The name of a large file in the cache of the hub's client: its SHA-256."""
REACH_S = 8.0
"""Seconds in which a hub that can be reached has answered; its client would try for half a minute."""


def is_offline() -> bool:
    """Whether the environment forbids asking the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def _why_not(offline: bool) -> str:
    """Why the hub is not asked, and what to do about it; empty where it can be."""
    if offline:
        return "the hub is off (HF_HUB_OFFLINE or `offline`): unset it"
    _client()
    constants, utils = (importlib.import_module(f"huggingface_hub.{name}") for name in ("constants", "utils"))
    reason = [f"no answer in {REACH_S:.0f} s"]

    def ask() -> None:
        try:
            utils.get_session().head(constants.ENDPOINT, timeout=REACH_S)
            reason[0] = ""
        except Exception as error:  # its client's, which differ by version
            reason[0] = re.sub(r"\s+", " ", str(error))[:120]

    # In a thread: to look up a name may take longer than any limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_S)
    return f"the hub cannot be reached ({reason[0]}): check the connection" if reason[0] else ""


def download(
    repo: str, revision: str, offline: bool, progress: Progress, weights: bool = True, also: Sequence[str] = ()
) -> Path:
    """A snapshot of a hub repository's safetensors, configuration, tokenizer and what is named, in the hub's own
    cache."""
    huggingface_hub = _client()
    patterns = [
        *also,
        *TOKENIZER_FILES,
        *CONFIG_FILES,
        *(["*.safetensors", "*.safetensors.index.json"] if weights else []),
    ]
    where = f"hub repository '{repo}' at '{revision}'"
    progress(0, 1, f"fetching {repo}")
    why_not = _why_not(offline)
    with _hub_faults(repo, revision, why_not):
        path = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            # Sub-folders hold other formats (onnx/, original/); `consolidated` repeats all weights once more.
            ignore_patterns=["*/*", f"{MISTRAL_FORMAT}*"],
            local_files_only=bool(why_not),
        )
    found = Path(path)
    files = sorted(found.glob("*.safetensors")) if weights else []
    for number, file in enumerate(files):
        progress(number, len(files), f"reading {file.name}")
        _check_blob(file.resolve())
    progress(1, 1, f"fetched {repo}")
    if weights and not any(found.glob("*.safetensors")):
        held = _hub_files(repo, revision, bool(why_not))
        pickled = [n for n in held if n.endswith(PICKLES)]
        if pickled:
            raise only_pickles(where, pickled)
        if any(n.endswith(".gguf") for n in held):
            raise UserError(
                f"{where} holds only GGUF files: fetch one with `hf download {repo} NAME.gguf` and give it as `path:`."
            )
        raise UserError(
            f"{where} holds no *.safetensors: it is not a model's repository, or the download was cut short."
        )
    return found


def download_gguf(repo: str, revision: str, name: str, offline: bool, progress: Progress) -> tuple[Path, str]:
    """A GGUF file of a repository, with all its parts, in the hub's own cache: the first's path, and the commit."""
    commit, files, why_not = revision, list[Path](), _why_not(offline)
    for part in map(str, parts_of(Path(name))):
        progress(0, 1, f"fetching {part} of {repo}")
        with _hub_faults(repo, revision, why_not, part):
            file = _client().hf_hub_download(repo, part, revision=commit, local_files_only=bool(why_not))
        files.append(Path(file).absolute())
        _check_blob(files[-1].resolve())
        commit = files[0].parents[len(Path(name).parts) - 1].name
    return files[0], commit


def fetch_fronts(repo: str, revision: str, name: str, offline: bool, folder: Path) -> Path:
    """A GGUF file's header, and those of its parts, without their weights: in `folder`, in files of the same sizes that
    hold nothing behind it. By range requests, but for what the hub's cache holds; the first's path."""
    hub, paths = _client(), list[Path]()
    why_not: str | None = None
    for part in map(str, parts_of(Path(name))):
        paths.append(folder / Path(part).name)
        held = hub.try_to_load_from_cache(repo, part, revision=revision)
        if isinstance(held, str):
            paths[-1].symlink_to(held)
            continue
        why_not = _why_not(offline) if why_not is None else why_not
        with _hub_faults(repo, revision, why_not, part):
            if why_not:
                raise hub.errors.OfflineModeIsEnabled
            url = hub.hf_hub_url(repo, part, revision=revision)
            size_bytes, have = int(hub.get_hf_file_metadata(url).size or 0), 0
            with open(paths[-1], "w+b") as file:
                file.truncate(size_bytes)
                while have < min(size_bytes, MOST_FRONT_BYTES) and have < _header_end(paths[-1]):
                    wanted = min(max(FRONT_BYTES, 4 * have), size_bytes)
                    ranged = hub.utils.build_hf_headers() | {"range": f"bytes={have}-{wanted - 1}"}
                    answer = hub.utils.get_session().get(url, headers=ranged)
                    hub.utils.hf_raise_for_status(answer)
                    file.seek(have)
                    file.write(answer.content[: wanted - have])
                    file.flush()
                    have = wanted
    return paths[0]


def _header_end(path: Path) -> float:
    try:
        return header_bytes(path)
    except Exception:  # whatever a header that is not there yet leads to
        return math.inf


def _check_blob(blob: Path) -> None:
    """The hub names large files by their SHA-256, and its client's cache keeps the name; nobody else looks at it again.

    Raises `UserError` for a file that is not what it is called.
    """
    if BLOB.fullmatch(blob.name):
        with open(blob, "rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != blob.name:
                raise UserError(f"{blob} is not what the hub holds (cut short, or spoiled): delete it, and run again")


def _hub_files(repo: str, revision: str, offline: bool) -> list[str]:
    try:
        return [] if offline else list(_client().HfApi().list_repo_files(repo, revision=revision))
    except Exception:  # only to word an error better: whatever it is, the error itself is already certain
        return []


def fetch_headers(
    repo: str, revision: str, offline: bool, remote_code: bool, read: ReadModel = read_model
) -> tuple[dict[str, Any], dict[str, StoredTensor] | None]:
    """A repository's `config.json`, and what its headers say of every tensor, without its weights. `read` reads a
    directory.

    What a snapshot in the hub's cache holds is read from there; else the headers are fetched by range requests, a
    few hundred KB a file. None where the cache holds only the configuration and the hub cannot be asked.
    """
    huggingface_hub, why_not = _client(), _why_not(offline)
    with _hub_faults(repo, revision, why_not):
        cached = bool(why_not)
        file = Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision, local_files_only=cached))
        if any(file.parent.glob("*.safetensors")):
            return read(file.parent, remote_code)
        config = checked_config(file.parent, remote_code)
        if why_not:
            return config, None
        try:
            found = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
        except huggingface_hub.errors.NotASafetensorsRepoError:
            raise UserError(f"hub repository '{repo}' holds no safetensors. Use a revision that does.") from None
    return config, {
        name: StoredTensor(Path(part), info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for part, header in found.files_metadata.items()
        for name, info in header.tensors.items()
    }


def _client() -> Any:
    with importing("huggingface_hub", "pip install huggingface_hub"):
        import huggingface_hub
    return huggingface_hub


@contextlib.contextmanager
def _hub_faults(repo: str, revision: str, why_not: str, file: str = "") -> Iterator[None]:
    """What can go wrong between here and a hub, each as a `UserError` with what to do; `why_not`: why it is not
    asked, `file`: the one that is wanted."""
    from huggingface_hub import errors

    where = f"hub repository '{repo}' at '{revision}'"
    by_hand = f"fetch it elsewhere with `hf download {repo}` and give it as `path:`"
    try:
        yield
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
    except errors.RemoteEntryNotFoundError as error:
        near = did_you_mean(
            file, [name for name in _hub_files(repo, revision, bool(why_not)) if name.endswith(".gguf")]
        )
        raise UserError(f"{where} holds no '{file or str(error)[:120]}'. {near}".rstrip()) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if why_not:
            raise UserError(f"{where} is not in the local cache, and {why_not}, or {by_hand}.") from None
        reason = re.sub(r"\s+", " ", str(error.__cause__ or error))[:120]
        raise UserError(
            f"{where} cannot be reached ({reason}): check the connection and HF_TOKEN, or {by_hand}."
        ) from None
    except (errors.HfHubHTTPError, ConnectionError, TimeoutError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:120]
        raise UserError(f"{where} cannot be fetched ({reason}): try again, set HF_TOKEN, or {by_hand}.") from None
