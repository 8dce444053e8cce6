"""Rows in object storage, through fsspec: each writer appends to files of its own."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any

from workbench.errors import UserError, install_with

SEGMENT_BYTES = 4 * 2**20
"""A writer begins another file beyond this: each row uploads the whole file again."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""Packages for object storage, which has no folders to be made: `makedirs` would make a misspelt bucket."""

_written: dict[tuple[str, int], tuple[str, bytes]] = {}
"""The file that this process writes in a folder, and what it holds; by (folder's URL, process)."""


def append_remote(folder: str, name: str, line: bytes, stamp: str) -> None:
    stem = name.removesuffix(".jsonl")
    slot = (f"{folder}/{stem}", os.getpid())
    before, content = _written.get(slot, ("", b""))
    if len(content) > SEGMENT_BYTES:
        before, content = "", b""
    content += line
    with _reaching(folder, "write"):
        files, path = _file_system(folder)
        new = f"{path}/{stem}-{re.sub(r'[^0-9]', '', stamp)[:14]}-{uuid.uuid4().hex[:12]}.jsonl"
        if not PACKAGES.get(folder.partition("://")[0]):
            files.makedirs(path, exist_ok=True)
        files.pipe_file(new, content)
        _written[slot] = new, content
        if before:
            files.rm_file(before)


def remote_contents(url: str, name: str, segments: str) -> list[tuple[str, bytes]]:
    with _reaching(url, "read"):
        files, path = _file_system(url)
        path = path.rstrip("/")
        # A writer may replace its file between the listing and the reading of it.
        for attempt in range(5):
            files.invalidate_cache()
            if path.endswith(".jsonl"):
                found = [path]
            else:
                patterns = (name, segments, f"*/{name}", f"*/{segments}")
                found = [file for pattern in patterns for file in sorted(files.glob(f"{path}/{pattern}"))]
            try:
                return [(files.unstrip_protocol(file), files.cat_file(file)) for file in found]
            except FileNotFoundError:
                if path.endswith(".jsonl") or attempt == 4:
                    raise
    return []


def _file_system(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise install_with(f"what reads {url}", "pip install fsspec") from None
    files, path = fsspec.core.url_to_fs(url)
    return files, str(path)


@contextlib.contextmanager
def _reaching(url: str, what: str) -> Iterator[None]:
    """Every file system raises errors of its own; what they have in common is the place, and who must act."""
    scheme = url.partition("://")[0]
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = PACKAGES.get(scheme)
        if package is None:
            raise UserError(f"{url}: cannot {what} rows there: {brief(error)}") from error
        raise install_with(f"what reaches {scheme}://", f"pip install {package}") from error
    except FileNotFoundError as error:
        raise UserError(f"{url}: cannot {what} rows there: no such file or bucket. Check the URL") from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol" in str(error):
            raise UserError(f"{url}: unknown kind of URL '{scheme}'. Use a folder or s3://bucket/folder") from error
        raise UserError(
            f"{url}: cannot {what} rows there ({type(error).__name__}: {brief(error)}). Check the URL, your "
            "credentials and what they permit, or name another --results"
        ) from error


def brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
