"""Rows in object storage, through fsspec: each writer appends to files of its own."""

from __future__ import annotations

import os
import re
import uuid

from workbench.storage import file_system, make_folder, reaching

SEGMENT_BYTES = 4 * 2**20
"""A writer begins another file beyond this: each row uploads the whole file again."""

_written: dict[tuple[str, int], tuple[str, bytes]] = {}
"""The file that this process writes in a folder, and what it holds; by (folder's URL, process)."""


def append_remote(folder: str, name: str, line: bytes, stamp: str) -> None:
    stem = name.removesuffix(".jsonl")
    slot = (f"{folder}/{stem}", os.getpid())
    before, content = _written.get(slot, ("", b""))
    if len(content) > SEGMENT_BYTES:
        before, content = "", b""
    content += line
    with reaching(folder, "write rows", "--results"):
        files, path = file_system(folder)
        new = f"{path}/{stem}-{re.sub(r'[^0-9]', '', stamp)[:14]}-{uuid.uuid4().hex[:12]}.jsonl"
        make_folder(files, folder, path)
        files.pipe_file(new, content)
        _written[slot] = new, content
        if before:
            files.rm_file(before)


def try_remote(folder: str) -> None:
    """Write a file and remove it again."""
    with reaching(folder, "write rows", "--results"):
        files, path = file_system(folder)
        make_folder(files, folder, path)
        probe = f"{path}/{uuid.uuid4().hex}.tried"
        files.pipe_file(probe, b"\n")
        files.rm_file(probe)


def remote_contents(url: str, name: str, segments: str) -> list[tuple[str, bytes]]:
    with reaching(url, "read rows", "--results"):
        files, path = file_system(url)
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
