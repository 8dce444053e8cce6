"""Call a function in a fresh interpreter: `call("package.module:function", payload)`.

An engine may abort, hang, leak, print on stdout or leave threads behind; none of that may reach the
program or the next measurement. So each piece of work runs as
`python -P -m workbench.machine.isolate request.json reply.json` in a session of its own, with a scrubbed
environment, its output in a log file and a time limit. The reply is a file, written whole and renamed.
The moment it is on disk the child leaves by `os._exit`: some engines abort while they shut down, and that
must not turn a good answer into a failure.

Rejected: `multiprocessing` (forks or pickles, and cannot start another interpreter), reading stdout for the
answer (engines print there), and polling (a busy parent slows the child down on a small machine).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from workbench.disk import write_whole
from workbench.errors import UserError, WorkFailed
from workbench.first_calls import settle_when_torch_is_imported

Progress = Callable[[float, float, str], None]
"""`progress(done, total, text)`; the parent draws it."""

KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CC", "CXX")
KEPT_PREFIXES = ("LC_", "XDG_", "HF_", "NVIDIA_", "WORKBENCH_", "SSL_CERT", "REQUESTS_CA", "CURL_CA")
ENGINES_OWN = (
    *("CUDA_", "NCCL_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "VLLM_", "FLASHINFER_"),
    *("GGML_", "LLAMA_", "GPTQMODEL_", "HSA_", "HIP_", "ROCR_"),
)
"""Prefixes of variables that configure engines: passed on, and recorded by whoever measures."""
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
SILENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "PYTHONUTF8": "1",
    "PYTHONHASHSEED": "0",
}
SAMPLE_S = 0.1
LOG_TAIL_CHARACTERS = 1500
PAUSE = b"pause"
"""What a child says when it waits to be resumed; the parent resumes it by `GO`."""
GO = b"\n"


@dataclass(frozen=True)
class Reply:
    """What came back: `value`, or `error` with the reason in one line and `log` with the output's tail."""

    value: Any
    error: str | None
    user_error: bool
    log: str
    duration_s: float


def answer(reply: Reply, folder: Path) -> Any:
    """A reply's value. Raises `UserError` for what the user can mend, and `WorkFailed` with the log in `folder` for
    the rest."""
    if reply.error is None:
        return reply.value
    if reply.user_error:
        raise UserError(reply.error)
    raise WorkFailed(f"{reply.error} (log: {folder / 'log.txt'})")


def call(
    function: str,
    payload: Any,
    *,
    workdir: Path,
    python: str = sys.executable,
    time_limit_s: float | None = None,
    environment: dict[str, str] | None = None,
    on_progress: Progress | None = None,
    on_sample: Callable[[int], None] | None = None,
) -> Reply:
    """Run `module:function(payload, progress)` in a fresh interpreter and wait for its JSON answer.

    `on_sample(pid)` is called every 0.1 s while the child lives. Never raises for what the child does;
    an interrupt kills the child and is passed on.
    """
    with Worker(function, payload, workdir=workdir, python=python, environment=environment) as worker:
        while True:
            reply = worker.resume(time_limit_s=time_limit_s, on_progress=on_progress, on_sample=on_sample)
            if reply is not None:
                return reply


class Worker:
    """The same with pauses: where the function calls `progress.pause()` the child waits, doing nothing, to be resumed.

    So the rounds of several jobs can be interleaved without two ever running at once. A context manager that ends the
    child, whatever it is at.
    """

    def __init__(
        self,
        function: str,
        payload: Any,
        *,
        workdir: Path,
        python: str = sys.executable,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._request, self._reply, self._log = (workdir / name for name in ("request.json", "reply.json", "log.txt"))
        self._workdir, self._command = workdir, [python, "-P", "-m", "workbench.machine.isolate"]
        self._asked, self._environment = {"function": function, "payload": payload}, environment or {}
        self._child: subprocess.Popen[bytes] | None = None
        self._pipes: list[int] = []
        self._active_s = 0.0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            os.close(pipe)
        self._pipes = []
        if self._child is not None:
            _kill_session(self._child)

    def resume(
        self,
        *,
        time_limit_s: float | None = None,
        on_progress: Progress | None = None,
        on_sample: Callable[[int], None] | None = None,
    ) -> Reply | None:
        """Let the child work until its next pause (None) or its end (its reply). The limit counts working time only."""
        started = time.monotonic()
        try:
            child = self._child or self._start()
        except UserError as problem:
            return Reply(None, str(problem), True, "", 0.0)
        if self._child is not None:
            with contextlib.suppress(BrokenPipeError):  # It died while it waited; that is found below.
                os.write(self._pipes[1], GO)
        self._child = child
        left_s = None if time_limit_s is None else time_limit_s - self._active_s
        try:
            end = _follow(child, self._pipes[0], started, left_s, on_progress, on_sample)
        finally:
            self._active_s += time.monotonic() - started
        if end == "pause":
            return None
        self._child = None
        _kill_session(child)
        return _conclude(child.returncode, self._reply, self._log, end == "time", time_limit_s, self._active_s)

    def _variables(self) -> dict[str, str]:
        scrubbed = _environment(self._environment)
        path = [str(self._packages()), *filter(None, [scrubbed.get("PYTHONPATH")])]
        return scrubbed | {"PYTHONPATH": os.pathsep.join(path)}

    def _packages(self) -> Path:
        """A folder with this program's packages and nothing else, for an interpreter that has neither installed.

        The folder that they lie in may be the whole of site-packages, whose other versions of everything would come
        before the engine's own.
        """
        folder, house = self._workdir / "packages", Path(__file__).resolve().parents[1]
        folder.mkdir(exist_ok=True)
        beside = (house.parent / "workbench_kernels", house.parent / "kernels" / "workbench_kernels")
        for package in (house, *(path for path in beside if path.is_dir())):
            link = folder / package.name
            link.unlink(missing_ok=True)
            link.symlink_to(package, target_is_directory=True)
        return folder

    def _start(self) -> subprocess.Popen[bytes]:
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._reply.unlink(missing_ok=True)
        self._request.write_text(json.dumps(self._asked))
        (from_child, said), (told, to_child) = os.pipe(), os.pipe()
        self._pipes = [from_child, to_child]
        try:
            with open(self._log, "wb") as output:
                return subprocess.Popen(
                    [*self._command, str(self._request), str(self._reply), str(said), str(told)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._variables(),
                    cwd=self._workdir,
                    start_new_session=True,
                    pass_fds=(said, told),
                )
        except OSError as error:
            said_of = f"cannot start {self._command[0]}: {error}"
            raise UserError(f"{said_of}. WORKBENCH_PYTHON_<ENGINE> or config.toml names it") from None
        finally:
            os.close(said)
            os.close(told)


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT or name in PROXIES or name.startswith(KEPT_PREFIXES + ENGINES_OWN)
    }
    return kept | SILENT | dict(extra)


def engines_own(extra: Mapping[str, str]) -> dict[str, str]:
    """What configures engines among the variables of a worker that is given `extra`; recorded with its numbers."""
    return {name: value for name, value in sorted(_environment(extra).items()) if name.startswith(ENGINES_OWN)}


def _follow(
    child: subprocess.Popen[bytes],
    pipe: int,
    started: float,
    time_limit_s: float | None,
    on_progress: Progress | None,
    on_sample: Callable[[int], None] | None,
) -> Literal["end", "pause", "time"]:
    """Read progress until the child ends, pauses, or has used its time up."""
    buffer = b""
    open_pipe = True
    while child.poll() is None:
        if time_limit_s is not None and time.monotonic() - started > time_limit_s:
            return "time"
        if on_sample is not None:
            on_sample(child.pid)
        if not open_pipe:
            time.sleep(SAMPLE_S)
            continue
        ready, _, _ = select.select([pipe], [], [], SAMPLE_S)
        if not ready:
            continue
        data = os.read(pipe, 65536)
        open_pipe = bool(data)
        *lines, buffer = (buffer + data).split(b"\n")
        waits = PAUSE in lines
        if on_progress is not None and (told := _latest(lines)):
            on_progress(*told)
        if waits:
            return "pause"
    return "end"


def _latest(lines: list[bytes]) -> tuple[float, float, str] | None:
    """The last progress told; a line that is none is no reason to lose the work."""
    for line in reversed(lines):
        with contextlib.suppress(ValueError, TypeError):
            done, total, text = json.loads(line)
            return float(done), float(total), str(text)
    return None


def _kill_session(child: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it left running (engines start helpers of their own)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _conclude(
    code: int | None, reply: Path, log: Path, timed_out: bool, time_limit_s: float | None, duration_s: float
) -> Reply:
    text = log.read_text(errors="replace") if log.exists() else ""
    tail = text[-LOG_TAIL_CHARACTERS:].strip()
    if reply.exists():
        try:
            answer = json.loads(reply.read_text())
        except ValueError as problem:
            return Reply(None, f"the worker's reply is not JSON: {problem}", False, tail, duration_s)
        return Reply(answer.get("value"), answer.get("error"), answer.get("user_error", False), tail, duration_s)
    if timed_out:
        error = f"no answer within the time limit of {time_limit_s:.0f} s; stopped"
    elif code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (often: out of memory)" if -code == signal.SIGKILL else ""
        error = f"the worker was killed by {name}{hint}"
    else:
        error = f"the worker ended with exit code {code} and no answer"
    last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")
    return Reply(None, error + (f"; its last words: {last[:300]}" if last else ""), False, tail, duration_s)


class _Reporter:
    """The child's `progress`."""

    def __init__(self, to_parent: int, from_parent: int) -> None:
        self._to_parent, self._from_parent = to_parent, from_parent
        self._last_sent, self._kept_back = 0.0, b""

    def __call__(self, done: float, total: float, text: str = "") -> None:
        now, line = time.monotonic(), json.dumps([done, total, text]).encode() + b"\n"
        if now - self._last_sent < SAMPLE_S and done < total:
            self._kept_back = line
            return
        self._last_sent, self._kept_back = now, b""
        # The parent may be gone; the work may still be worth finishing.
        with contextlib.suppress(OSError):
            os.write(self._to_parent, line)

    def pause(self) -> None:
        """Wait until the parent resumes this worker."""
        with contextlib.suppress(OSError):
            os.write(self._to_parent, self._kept_back + PAUSE + b"\n")
            os.read(self._from_parent, 1)


def in_one_line(error: BaseException) -> str:
    """An exception's class and the first line of its message. One of pydantic's begins with a count and a class: where
    and what is wrong stand below, up to ` [type=`."""
    said, *below = str(error).strip().splitlines() or [""]
    if re.match(r"\d+ validation errors? for ", said) and below:
        place, *more = (line.partition(" [type=")[0].strip() for line in below[:2])
        said = f"{place}: {more[0]}" if more and " [type=" not in below[0] else place
    return f"{type(error).__name__}: {said}".strip().rstrip(":")


def run_request(request: Path, reply: Path, to_parent: int, from_parent: int) -> None:
    """The child's side: do what the request names, write the reply, leave at once."""
    for pipe in (to_parent, from_parent):
        os.set_inheritable(pipe, False)
    threading.Thread(target=_end_with_parent, args=(to_parent,), daemon=True).start()
    settle_when_torch_is_imported()
    progress = _Reporter(to_parent, from_parent)
    asked = json.loads(request.read_text())
    module, _, name = asked["function"].partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(asked["payload"], progress)
        text = json.dumps({"value": value}, allow_nan=False)
    except UserError as error:
        text = json.dumps({"error": str(error), "user_error": True})
    except BaseException as error:
        traceback.print_exc()
        text = json.dumps({"error": in_one_line(error)[:500]})
    write_whole(reply, text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent(pipe: int) -> None:
    """Wait until nobody reads the pipe any more, then end this session.

    A parent that was killed cannot end its worker, which would go on beside the next measurement.
    """
    watch = select.poll()
    watch.register(pipe, 0)  # Errors only: the reader has gone.
    watch.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    run_request(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
