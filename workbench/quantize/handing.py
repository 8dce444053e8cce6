"""Artifacts copied to where somebody wants them, under plain names."""

from __future__ import annotations

import glob
import re
import shutil
from dataclasses import replace
from pathlib import Path

from workbench.disk import disk_faults, need_room, remove
from workbench.errors import UserError
from workbench.records import Artifact

FIRST_PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")
"""The name of a GGUF file that is split; the other parts lie beside it."""


def copy_to(folder: Path, artifact: Artifact) -> Path:
    """The artifact's copy in `folder`, called after model and variant; left as it is if it is there already.

    A copy and not a link, since whoever edits it must not edit the cache. Raises `UserError` where something else has
    that name, and for a full disk.
    """
    source = Path(artifact.path)
    if split := FIRST_PART.fullmatch(source.name):
        for number in range(2, int(split[2]) + 1):
            part = source.with_name(f"{split[1]}-{number:05}-of-{split[2]}.gguf")
            copy_to(folder, replace(artifact, path=str(part)))
    for beside in source.parent.glob(f"{glob.escape(source.name)}.*"):
        # Written under its name: what tells `llama-quantize` the types of a mixture.
        copy_to(folder, replace(artifact, path=str(beside)))
    target, half = folder / source.name, folder / f".{source.name}.partial"
    if target.exists():
        if _files(target) != _files(source):
            raise UserError(f"{target}: something else is there already; remove it, or name another --output")
        return target
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        need_room(folder, sum(size for size, _ in _files(source).values()))
        remove(half)
        if source.is_dir():
            shutil.copytree(source, half)
        else:
            shutil.copy2(source, half)
        half.rename(target)
    return target


def _files(path: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the content of a file, or of each in a folder; a copy has those of what it was made of."""
    found = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return {
        str(each.relative_to(path)): (status.st_size, status.st_mtime_ns) for each in found if (status := each.stat())
    }
