"""The quarter of an hour of `docs/first-table.md`, walked: a first table, a model and a text of one's own, a choice,
and the chosen one served by the printed command and asked a question. Commands as typed, engines as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import ROOT

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody's, with the repository's recipes."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    return folder


def surroundings(place: Path, home: Path) -> dict[str, str]:
    # A TMPDIR of our own: its lock is not that of a run that goes on beside these tests.
    own = {"WORKBENCH_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "120", "TMPDIR": str(place)}
    return os.environ | own | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def typed(place: Path, home: Path, line: str) -> str:
    """What a line of the page prints; it must succeed."""
    words = [sys.executable, "-m", "workbench.cli", *shlex.split(line)[1:]]
    answer = subprocess.run(
        words, cwd=place, env=surroundings(place, home), capture_output=True, text=True, timeout=1500
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@contextlib.contextmanager
def served(command: str, place: Path, home: Path) -> Iterator[str]:
    """The address of a server that a printed command starts, on a port that is free here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = shlex.split(re.sub(r"--port \d+", f"--port {port}", command))
    with open(place / "server.log", "w") as log:
        server = subprocess.Popen(
            words,
            cwd=place,
            env=surroundings(place, home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert server.poll() is None, (place / "server.log").read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def asked(address: str, prompt: str) -> str:
    """The continuation of a prompt, by the protocol that all three engines' servers speak."""
    with urllib.request.urlopen(f"{address}/v1/models", timeout=300) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def test_the_lines_walked_here_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "first-table.md").read_text()
    for line in (
        *("workbench doctor", "workbench run recipes/tiny.yaml", "workbench plan mine.yaml --memory 24GiB"),
        *("workbench run mine.yaml", "workbench recommend --recipe mine", "/v1/completions"),
        *("calibration: {source: {file: my-text.txt}", "gptq: {group_size: 128}", "workbench report -o report.html"),
    ):
        assert line in page, line


def test_a_quarter_of_an_hour(place: Path, real_home: Path, real_base: Path) -> None:
    assert "llamacpp" in typed(place, real_home, "workbench doctor")
    first = typed(place, real_home, "workbench run recipes/tiny.yaml --backend llamacpp --variant gguf-Q8_0")
    assert "gguf-Q8_0" in first and "KLD" in first

    shutil.copytree(real_base, place / "my-model")
    text = "\n\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    (place / "my-text.txt").write_text(text)
    (place / "mine.yaml").write_text(
        "base: {path: my-model}\n"
        "variants: [{gguf: Q4_0}]\n"
        "evaluation: {source: {file: my-text.txt}, windows: 2, window: 128}\n"
        "workload: {prompt_tokens: 32, new_tokens: 8, repeats: 1}\n"
        'backends: {vllm: {variants: [base], enforce_eager: true}, llamacpp: {variants: ["gguf-*"]}}\n'
    )
    assert "gguf-Q4_0" in typed(place, real_home, "workbench plan mine.yaml --memory 24GiB --context 2048")
    own = typed(place, real_home, "workbench run mine.yaml")
    assert "my-model" in own and "gguf-Q4_0" in own and "failed" not in own

    # By vLLM, whose server is installed with it; llama.cpp's own is not.
    choice = typed(place, real_home, "workbench recommend --recipe mine --memory 16GiB --backend vllm")
    assert "Choice: base on vllm" in choice
    told = re.search(r"Serve it with.*:\n((?:.*\\\n)*.*)", choice)
    assert told, choice
    command = told[1].replace("\\\n", " ")
    assert "my-model" in command and "127.0.0.1" in command
    with served(command, place, real_home) as address:
        answer = asked(address, "A week has seven")
    assert "days" in answer, answer

    typed(place, real_home, "workbench report -o report.html")
    assert "gguf-Q4_0" in (place / "report.html").read_text()
