"""A worker may do anything; the parent gets an answer or a reason, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.places import ROOT
from workbench.machine import isolate

CHILDREN = {"PYTHONPATH": str(ROOT)}
"""Environment in which a worker finds the tests' own functions; by itself it has this program's packages only."""


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the parent's clock forward by so many seconds: what a test of time limits would else have to sleep."""
    ahead, real = [0.0], time.monotonic

    def forward(by_s: float) -> None:
        ahead[0] += by_s

    monkeypatch.setattr(isolate, "time", SimpleNamespace(monotonic=lambda: real() + ahead[0], sleep=time.sleep))
    return forward


@pytest.fixture
def call(tmp_path: Path) -> Any:
    def run(name: str, payload: Any = None, **more: Any) -> isolate.Reply:
        return isolate.call(
            f"tests.machine.children:{name}",
            payload,
            workdir=tmp_path / "work",
            **({"time_limit_s": 60} | more | {"environment": CHILDREN | more.get("environment", {})}),
        )

    return run


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process has ended (a zombie has)."""
    limit = time.monotonic() + within_s
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def wait_for(path: Path, within_s: float = 20.0) -> str:
    """The content of a file that somebody is about to write."""
    limit = time.monotonic() + within_s
    while time.monotonic() < limit:
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} was never written")


@pytest.mark.parametrize(
    "value", [None, 0, "text", [1, 2.5, None], {"a": {"b": ["ü", "\x00", "日本"]}}, list(range(200_000))], ids=type
)
def test_the_value_comes_back(call: Any, value: Any) -> None:
    reply = call("echo", value)
    assert reply.error is None
    assert reply.value == value
    assert reply.duration_s > 0


def test_it_runs_alone(call: Any, tmp_path: Path) -> None:
    told = call("whoami").value
    assert told["pid"] != os.getpid()
    assert told["session"] == told["pid"], "a session of its own"
    assert told["safe_path"], "-P: the working directory must not shadow a package"
    assert told["cwd"] == str(tmp_path / "work")
    assert told["cwd"] not in told["path"] and "" not in told["path"]
    assert told["stdin"] == "", "nothing may wait for the keyboard"
    heavy = {"torch", "pydantic", "typer", "rich", "yaml", "psutil", "numpy"} & set(told["modules"])
    assert not heavy, "a worker pays only for what it needs"


def test_a_bug_becomes_one_line_and_a_traceback(call: Any) -> None:
    reply = call("raises")
    assert reply.error == "KeyError: 'no such layer\\nand a second line'"
    assert not reply.user_error
    assert "on the way to the bug" in reply.log and "Traceback" in reply.log


def test_an_engine_that_refuses_its_settings_says_which(call: Any) -> None:
    """The first line of pydantic's message counts errors and names a class."""
    reply = call("refuses_its_settings")
    assert reply.error == "ValidationError: threads: Input should be greater than or equal to 1"


def test_a_user_error_passes_as_it_is(call: Any) -> None:
    reply = call("user_error")
    assert (reply.error, reply.user_error) == ("the base has no weights: name another", True)


def test_an_exception_without_words_has_its_name(call: Any) -> None:
    assert call("says_nothing").error == "MemoryError"


def test_sys_exit_is_not_an_answer(call: Any) -> None:
    reply = call("leaves")
    assert reply.value is None
    assert reply.error == "SystemExit: 3"


@pytest.mark.parametrize("name", ["hangs", "deaf"])
def test_a_hang_is_stopped_at_the_time_limit(
    call: Any, hurry: Callable[[float], None], tmp_path: Path, name: str
) -> None:
    pids: list[int] = []

    def sample(pid: int) -> None:
        pids.append(pid)
        if (tmp_path / "pid").exists():
            hurry(1000)

    reply = call(name, {"pid": str(tmp_path / "pid")}, time_limit_s=900, on_sample=sample)
    assert reply.error is not None and reply.error.startswith("no answer within the time limit of 900 s; stopped")
    assert reply.duration_s > 900 and gone(pids[0])


def test_death_by_sigkill_is_told(call: Any) -> None:
    reply = call("killed")
    assert reply.error is not None and "killed by SIGKILL" in reply.error and "out of memory" in reply.error
    assert reply.error.endswith("its last words: allocating 1 TiB")


def test_an_abort_is_told(call: Any) -> None:
    reply = call("aborts")
    assert reply.error is not None and "SIGABRT" in reply.error and "std::bad_alloc" in reply.error


def test_an_exit_without_an_answer_quotes_the_last_words(call: Any) -> None:
    reply = call("exits")
    assert reply.error == (
        "the worker ended with exit code 7 and no answer; its last words: GGML_ASSERT: tensor blk.3 has the wrong shape"
    )
    assert call("exits_speechless").error == "the worker ended with exit code 9 and no answer"


def test_garbage_on_stdout_is_not_the_answer(call: Any) -> None:
    reply = call("babbles")
    assert (reply.value, reply.error) == (42, None)


@pytest.mark.parametrize("name", ["aborts_afterwards", "leaves_a_thread"])
def test_what_happens_after_the_answer_does_not_spoil_it(call: Any, name: str) -> None:
    reply = call(name)
    assert (reply.value, reply.error) == (42, None)


def test_progress_arrives(call: Any) -> None:
    seen: list[tuple[float, float, str]] = []
    assert call("reports", on_progress=lambda *step: seen.append(step)).value == 42
    assert [text for _, _, text in seen][-1] == "step 4"
    assert len(seen) >= 4 and [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_progress_is_thinned_and_may_be_ignored(call: Any) -> None:
    seen: list[float] = []
    assert call("reports_much", on_progress=lambda done, total, text: seen.append(done)).value == 42
    assert 1 <= len(seen) < 1000
    assert call("reports_much").value == 42


def test_samples_are_taken_of_the_living_child(call: Any) -> None:
    pids: list[int] = []
    call("reports", on_sample=pids.append)
    assert len(pids) > 3 and len(set(pids)) == 1


def test_the_environment_is_scrubbed(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "MY_PASSWORD",
        "PYTHONSTARTUP",
        "LD_PRELOAD",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = call("whoami", environment={"OMP_NUM_THREADS": "3"}).value["environment"]
    assert "hush" not in json.dumps(told)
    for name in ("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "MY_PASSWORD", "PYTHONSTARTUP", "LD_PRELOAD"):
        assert name not in told
    assert told["HF_HUB_OFFLINE"] == "1" and told["OMP_NUM_THREADS"] == "3"
    # This program's packages and nothing else: they may be installed among other versions of everything.
    ours, tests = told["PYTHONPATH"].split(":")
    assert {path.resolve() for path in Path(ours).iterdir()} == {
        ROOT / "workbench",
        ROOT / "kernels" / "workbench_kernels",
    }
    assert tests == str(ROOT)
    assert told["DO_NOT_TRACK"] == "1" and told["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_what_configures_engines_reaches_the_worker_and_the_record(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    users = {
        "CUDA_MODULE_LOADING": "LAZY",
        "GGML_CUDA_FORCE_MMQ": "1",
        "NCCL_P2P_DISABLE": "1",
        "PYTORCH_ALLOC_CONF": "backend:native",
        "TRITON_CACHE_DIR": "/kept",
        "VLLM_CACHE_ROOT": "/kept",
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    # A backend's own has the last word.
    backends = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_USE_FLASHINFER_SAMPLER": "0", "OMP_NUM_THREADS": "2"}
    told, recorded = call("whoami", environment=backends).value["environment"], isolate.engines_own(backends)
    assert recorded.items() <= told.items()
    wanted = users | backends
    assert recorded.items() >= {name: wanted[name] for name in wanted if name != "OMP_NUM_THREADS"}.items()


def test_what_the_worker_started_ends_with_it(call: Any) -> None:
    pids = call("breeds").value
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_an_interrupt_ends_the_child_and_passes_on(call: Any, tmp_path: Path) -> None:
    def interrupt(pid: int) -> None:
        if (tmp_path / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call("hangs", {"pid": str(tmp_path / "pid")}, on_sample=interrupt)
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_worker_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """Or it would go on beside the next measurement."""
    program = (
        "from pathlib import Path; from workbench.machine import isolate;"
        f"isolate.call('tests.machine.children:hangs', {{'pid': {str(tmp_path / 'pid')!r}}}, "
        f"workdir=Path({str(tmp_path)!r}), environment={CHILDREN!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        worker = int(wait_for(tmp_path / "pid"))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert gone(worker)


def test_a_worker_waits_between_its_turns_and_does_nothing(tmp_path: Path) -> None:
    with isolate.Worker(
        "tests.machine.children:takes_turns", {"turns": 2}, workdir=tmp_path, environment=CHILDREN
    ) as worker:
        assert worker.resume(time_limit_s=60) is None
        time.sleep(0.5)
        assert worker.resume(time_limit_s=60) is None
        reply = worker.resume(time_limit_s=60)
    assert reply is not None and reply.error is None and len(reply.value) == 3
    assert reply.value[1] - reply.value[0] < 0.1, "it waits, it does not spin"


def test_turns_of_a_single_call_follow_each_other(call: Any) -> None:
    assert len(call("takes_turns", {"turns": 3}).value) == 4


def test_two_workers_alternate(tmp_path: Path) -> None:
    """The other is asleep while one works: neither is at its second turn before it was let."""
    names = ("one", "two")
    workers = [
        isolate.Worker(
            "tests.machine.children:takes_turns", {"turns": 1}, workdir=tmp_path / name, environment=CHILDREN
        )
        for name in names
    ]
    with workers[0], workers[1]:
        assert [worker.resume(time_limit_s=60) for worker in workers] == [None, None]
        assert not any((tmp_path / name / "reply.json").exists() for name in names)
        assert workers[1].resume(time_limit_s=60) is not None
        assert not (tmp_path / "one" / "reply.json").exists()
        assert workers[0].resume(time_limit_s=60) is not None


def test_waiting_is_not_working_time(tmp_path: Path, hurry: Callable[[float], None]) -> None:
    with isolate.Worker(
        "tests.machine.children:takes_turns", {"turns": 2}, workdir=tmp_path, environment=CHILDREN
    ) as worker:
        assert worker.resume(time_limit_s=900) is None
        hurry(1000)
        assert worker.resume(time_limit_s=900) is None
        hurry(1000)
        reply = worker.resume(time_limit_s=900)
    assert reply is not None and reply.error is None
    assert reply.duration_s < 900


def test_the_time_limit_is_of_all_turns_together(tmp_path: Path, hurry: Callable[[float], None]) -> None:
    """Each turn takes far less than the limit; the third takes more than the others left of it, or nothing is left."""
    replies: list[isolate.Reply | None] = []
    seen: set[int] = set()

    def once_a_turn(pid: int) -> None:
        if len(replies) not in seen:
            hurry(400)
        seen.add(len(replies))

    with isolate.Worker(
        "tests.machine.children:takes_turns", {"turns": 9}, workdir=tmp_path, environment=CHILDREN
    ) as worker:
        while not replies or replies[-1] is None:
            replies.append(worker.resume(time_limit_s=900, on_sample=once_a_turn))
    assert len(replies) in (3, 4) and "time limit of 900 s" in str(replies[-1].error)


def test_a_worker_that_dies_while_it_waits_is_an_error(tmp_path: Path) -> None:
    with isolate.Worker(
        "tests.machine.children:takes_turns", {"turns": 1}, workdir=tmp_path, environment=CHILDREN
    ) as worker:
        pids: list[int] = []
        assert worker.resume(time_limit_s=60, on_sample=pids.append) is None
        os.kill(pids[0], signal.SIGKILL)
        assert gone(pids[0])
        reply = worker.resume(time_limit_s=60)
    assert reply is not None
    assert reply.error == "the worker was killed by SIGKILL (often: out of memory); its last words: still here"


def test_leaving_ends_a_worker_that_waits(tmp_path: Path) -> None:
    pids: list[int] = []
    with isolate.Worker(
        "tests.machine.children:takes_turns", {"turns": 1}, workdir=tmp_path, environment=CHILDREN
    ) as worker:
        assert worker.resume(time_limit_s=60, on_sample=pids.append) is None
        assert not gone(pids[0], within_s=0.2)
    assert gone(pids[0])


def test_another_interpreter_does_the_work(call: Any, bare_python: str) -> None:
    reply = call("whoami", python=bare_python)
    assert reply.error is None, reply.error
    assert reply.value["prefix"] == str(Path(bare_python).parents[1]) != sys.prefix
    assert not any("site-packages" in entry and sys.prefix in entry for entry in reply.value["path"])


def test_the_base_interpreter_does_the_work(call: Any) -> None:
    python = sys._base_executable  # type: ignore[attr-defined]
    assert call("echo", {"a": 1}, python=python).value == {"a": 1}


@pytest.mark.parametrize("python", ["/nowhere/bin/python", "no-such-python-on-path", "{folder}", "{file}"])
def test_an_interpreter_that_cannot_be_started(call: Any, tmp_path: Path, python: str) -> None:
    (tmp_path / "file").write_text("not a program")
    python = python.format(folder=tmp_path, file=tmp_path / "file")
    reply = call("echo", python=python)
    assert reply.user_error and reply.error is not None
    assert reply.error.startswith(f"cannot start {python}: ")


def test_a_program_that_is_no_python(call: Any) -> None:
    reply = call("echo", python="/bin/false")
    assert reply.error == "the worker ended with exit code 1 and no answer"


def test_nan_in_the_answer_is_an_error_not_broken_json(call: Any) -> None:
    reply = call("nan")
    assert reply.value is None
    assert reply.error is not None and reply.error.startswith("ValueError: Out of range float values")


def test_an_answer_that_json_cannot_say(call: Any) -> None:
    assert call("unserializable").error == "TypeError: Object of type object is not JSON serializable"


@pytest.mark.parametrize(
    "function", ["tests.machine.children:nothing_of_that_name", "tests.no_such_module:f", "tests.machine.children"]
)
def test_a_function_that_does_not_exist(tmp_path: Path, function: str) -> None:
    reply = isolate.call(function, None, workdir=tmp_path, time_limit_s=60, environment=CHILDREN)
    assert reply.value is None and reply.error


def test_an_old_reply_is_not_taken_for_the_new_one(call: Any) -> None:
    assert call("echo", 1).value == 1
    assert call("exits").value is None


def test_no_descriptor_is_left_open(call: Any) -> None:
    before = len(os.listdir("/proc/self/fd"))
    call("echo")
    call("echo", python="/nowhere/python")
    call("hangs", {"pid": os.devnull}, time_limit_s=0.3)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("line", [b"", b"warning: something", b"[1, 2]", b"null", b'{"a": 1}'])
def test_what_is_no_progress_among_its_lines_is_passed_over(line: bytes) -> None:
    """A library that wrote where the worker reports ended a run of hours."""
    assert isolate._latest([b'[1, 4, "half"]', line]) == (1.0, 4.0, "half")
    assert isolate._latest([line]) is None
