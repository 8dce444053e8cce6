"""The command in the tests' own process: an interpreter of its own for each would take most of the fast tests' time."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from tests.places import ROOT
from workbench import cli
from workbench.worker.backends import BACKENDS


def command(
    *words: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What `workbench WORDS` says in `folder`, and its exit code, by the function that the console script calls.

    `environment`: the whole of it. Any exception but `SystemExit` fails the test.
    """
    own = dict(os.environ if environment is None else environment)
    engines = {name: module for name, module in BACKENDS.items() if name != "fake"}
    if own.get("WORKBENCH_FAKE_BACKEND"):
        engines["fake"] = "workbench.worker.backends.fake"
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code = 0
    with (
        patch.dict(os.environ, own, clear=True),
        patch.dict(BACKENDS, engines, clear=True),
        patch.object(sys, "argv", ["workbench", *words]),
        patch.object(tempfile, "tempdir", own.get("TMPDIR")),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code is None or isinstance(stop.code, int), stop.code
            code = stop.code or 0
    told = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(words, code, *told)
