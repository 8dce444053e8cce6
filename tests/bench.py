"""Whole commands in a place of their own. `bench(...)` calls the console script's function in this process, which saves
starting an interpreter each time; `bench.typed(...)` and `bench.start(...)` are processes, for what only those have:
signals, pipes, two at once. Workers are processes always.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.command import command
from tests.places import ROOT


@dataclass(frozen=True)
class Bench:
    """One place to work in: a cache, a folder of results, a model, and the command."""

    home: Path
    folder: Path
    model: Path
    before: tuple[str, ...] = ()
    """Words before the command: `small_disk` makes them."""

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def environment(self, **more: str) -> dict[str, str]:
        # A TMPDIR of our own: its lock is not that of a run that goes on beside these tests.
        own = {"WORKBENCH_HOME": str(self.home), "WORKBENCH_FAKE_BACKEND": "1", "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **own, "TMPDIR": str(self.home.parent), "PYTHONPATH": str(ROOT), "COLUMNS": "200", **more}

    def recipe(self, file: str = "r", **parts: Any) -> str:
        """Write a recipe; by default the base and a Q8_0 on the fake engine, nothing scored."""
        whole = {
            "base": {"path": str(self.model)},
            "model": "Tiny",
            "variants": [{"gguf": "Q8_0"}],
            "workload": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 2},
            "backends": {"fake": {}},
            **parts,
        }
        path = self.folder / f"{file}.yaml"
        path.write_text(yaml.safe_dump({key: part for key, part in whole.items() if part is not None}))
        return str(path)

    def place(self, words: tuple[str, ...]) -> list[str]:
        """Where rows go, for the commands that read or write some."""
        return (
            []
            if words[0] in ("quantize", "plan", "schema", "doctor", "clean", "cache")
            else ["--results", str(self.results)]
        )

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.before, sys.executable, "-m", "workbench.cli", *words, *self.place(words)],
            cwd=self.folder,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The command in this process."""
        assert not self.before, "words before the command need a process: `typed`"
        return command(*words, *self.place(words), folder=self.folder, environment=self.environment(**more))

    def typed(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own."""
        child = self.start(*words, **more)
        try:
            out, err = child.communicate(timeout=300)
        finally:
            child.kill()
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    def rows(self) -> list[dict[str, Any]]:
        """Every line ever stored, in order; not the half of one that is being written."""
        files = sorted(self.results.glob("*/rows.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().split("\n")[:-1]]

    def measured(self) -> list[str]:
        """Variants that were measured, sorted: jobs run in a random order."""
        return sorted(row["artifact"]["variant"] for row in self.rows() if row["error"] is None)

    def workers(self) -> list[psutil.Process]:
        """Processes of ours that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and str(self.home) in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait_for(self, true: Callable[[], bool], child: subprocess.Popen[str]) -> None:
        limit = time.monotonic() + 120
        while not true():
            assert time.monotonic() < limit and child.poll() is None, "it never came to that"
            time.sleep(0.02)
