"""An engine's own server for one artifact: started here, asked over HTTP, ended with this worker.

It stays in the worker's session, which the parent ends as a whole, however the parent itself ends. It listens on
loopback, on a port that was free, and answers under a name that no other server has: an answer in another name is a
fault. What an `Engine` of one adds is how it is scored and how it completes, by the requests that its server knows;
both begin with token ids, so that every engine gets the same.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from workbench.records import Job, Machine, Row

LOG = Path("server.log")
"""In the worker's folder, which is kept if the worker fails."""
POLL_S = 0.1
LAST_WORDS = 1500
"""Characters of its log that a failure tells."""
ANSWER_S = 600.0
# Whatever proxy the environment names: this machine is asked directly.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotScored(Exception):
    """Why a server is not asked for quality: a reason in its row, which has speeds all the same."""


class Server:
    """A server that is up; what there is to know of it. `words`: its command, with any port."""

    HEALTH = "/health"
    """What it answers at once it is up."""
    BY_LENGTH = False
    """Whether it tells neither ids nor usage while it answers: see `Dialect.by_length`."""
    GREEDY: Mapping[str, object] = {}
    """What a chat needs beside a temperature of 0 to be answered with the likeliest tokens."""

    def __init__(self, words: list[str], name: str, settings: Mapping[str, object]) -> None:
        port = _free_port()
        words[words.index("--port") + 1] = str(port)
        self._root = f"http://127.0.0.1:{port}"
        self.name, self.url, self._settings = name, f"{self._root}/v1", settings
        with LOG.open("wb") as log:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        while not _answers(f"{self._root}{self.HEALTH}"):
            self.check()
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises `RuntimeError` with its last words if it has ended."""
        if (code := self._process.poll()) is not None:
            words = " ".join(LOG.read_text(errors="replace")[-LAST_WORDS:].split())
            raise RuntimeError(f"the server ended with code {code}; its last words: {words[-300:]}")

    def settings(self) -> dict[str, object]:
        """What it was told to run with."""
        return dict(self._settings)

    def spell(self, ids: list[int]) -> list[str | None] | None:
        """Not asked: the artifact is that of the engine's own process, which was."""
        return None

    def prompt(self, ids: list[int]) -> tuple[str | list[int], int]:
        """What it is timed with in the place of these ids, and how many tokens that has: the ids themselves."""
        return ids, len(ids)

    def chat(self, messages: list[str], new_tokens: list[int]) -> list[str]:
        """What it answers to each message, in its own template. Raises `NotScored` where it does not chat."""
        pairs = zip(messages, new_tokens, strict=True)
        asked = [{**in_chat(self.name, text, most), **self.GREEDY} for text, most in pairs]
        try:
            return [answer_of(self.post("/v1/chat/completions", each)) for each in asked]
        except RuntimeError as reason:
            self.check()
            raise NotScored(str(reason)) from None

    def post(self, path: str, body: object) -> bytes:
        """What it answers at a path of its root. Raises `RuntimeError` for what is no answer."""
        kind = {"Content-Type": "application/json"}
        asked = urllib.request.Request(self._root + path, json.dumps(body).encode(), kind)
        try:
            with OPENER.open(asked, timeout=ANSWER_S) as answer:
                data: bytes = answer.read()
                return data
        except urllib.error.HTTPError as error:
            words = " ".join(error.read(LAST_WORDS).decode(errors="replace").split())
            raise RuntimeError(f"{path}: status {error.code}: {words[:300]}") from None
        except (OSError, http.client.HTTPException) as error:
            self.check()
            raise RuntimeError(f"{path}: no answer ({error})") from None


def in_chat(model: str, text: str, new_tokens: int) -> dict[str, object]:
    """A request for the likeliest answer to a message, by `/chat/completions`, where the server's own template is."""
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": new_tokens, "temperature": 0}


def answer_of(data: bytes) -> str:
    """The text of an answer of `/completions` or `/chat/completions`. Raises `NotScored` where there is none."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return str(text or "")
    except (ValueError, LookupError, TypeError):
        raise NotScored(f"no answer of this API: {data[:100]!r}") from None


def alias() -> str:
    """A name for the model that no other server of this machine uses."""
    return f"workbench-{os.getpid()}"


def as_row(job: Job, **options: object) -> Row:
    """A job as a row that is not measured yet, for the command that serves it; `options` beside the job's own."""
    return Row(
        key="",
        base=job.base,
        recipe="",
        recipe_digest="",
        artifact=job.artifact,
        backend=job.backend,
        workload=job.workload,
        measurement=None,
        machine=Machine(),
        versions={},
        started_at="",
        duration_s=0.0,
        options=job.options | options,
        evaluations=job.evaluations,
        tasks=job.tasks,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with OPENER.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
