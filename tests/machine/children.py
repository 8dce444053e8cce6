"""What `test_isolate.py` and others run in child processes, named as `tests.machine.children:function`.

Standard library only: some tests start it under an interpreter that has nothing else.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from workbench.errors import UserError

SLEEPER = "import time; time.sleep(600)"


def echo(payload: Any, progress: Any) -> Any:
    """The payload."""
    return payload


def whoami(payload: Any, progress: Any) -> dict[str, Any]:
    """Where and as what the child runs."""
    return {
        "executable": sys.executable,
        "prefix": sys.prefix,
        "path": sys.path,
        "cwd": os.getcwd(),
        "pid": os.getpid(),
        "session": os.getsid(0),
        "safe_path": sys.flags.safe_path,
        "stdin": sys.stdin.read(),
        "environment": dict(os.environ),
        "modules": sorted(sys.modules),
    }


def raises(payload: Any, progress: Any) -> None:
    """A bug, with a message of two lines."""
    print("on the way to the bug")
    raise KeyError("no such layer\nand a second line")


def refuses_its_settings(payload: Any, progress: Any) -> None:
    """What pydantic raises where an engine checks its settings with it (vLLM does)."""
    from pydantic import Field, TypeAdapter

    TypeAdapter(dict[str, Annotated[int, Field(ge=1)]]).validate_python({"threads": 0})


def user_error(payload: Any, progress: Any) -> None:
    """What a person can mend."""
    raise UserError("the base has no weights: name another")


def says_nothing(payload: Any, progress: Any) -> None:
    """An exception without words."""
    raise MemoryError


def leaves(payload: Any, progress: Any) -> None:
    """`sys.exit` from inside an engine."""
    sys.exit(3)


def hangs(payload: Any, progress: Any) -> None:
    """For ever; its pid goes to the file that the payload names."""
    Path(payload["pid"]).write_text(str(os.getpid()))
    time.sleep(600)


def deaf(payload: Any, progress: Any) -> None:
    """Ignores every signal it can, then hangs."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    hangs(payload, progress)


def killed(payload: Any, progress: Any) -> None:
    """As the kernel does when memory runs out."""
    print("allocating 1 TiB", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def aborts(payload: Any, progress: Any) -> None:
    """As C++ does."""
    print("terminate called after throwing an instance of 'std::bad_alloc'", flush=True)
    os.abort()


def exits(payload: Any, progress: Any) -> None:
    """Without a reply."""
    print("GGML_ASSERT: tensor blk.3 has the wrong shape", flush=True)
    os._exit(7)


def exits_speechless(payload: Any, progress: Any) -> None:
    """Without a reply or a word."""
    os._exit(9)


def babbles(payload: Any, progress: Any) -> int:
    """Prints what looks like an answer and what is not even text, from Python and from below it."""
    os.write(1, b'\x00\xff\xfe{"value": "forged", "error": null}\n' * 2000)
    print('{"value": "forged"}')
    print("\x1b[2J", file=sys.stderr)
    return 42


def aborts_afterwards(payload: Any, progress: Any) -> int:
    """An engine that crashes while it shuts down, as vLLM does on a CPU."""
    atexit.register(os.abort)
    return 42


def leaves_a_thread(payload: Any, progress: Any) -> int:
    """A thread that would keep the process alive for ever."""
    import threading

    threading.Thread(target=threading.Event().wait).start()
    return 42


def reports(payload: Any, progress: Any) -> int:
    """Progress in steps."""
    for step in range(5):
        progress(step, 4, f"step {step}")
        time.sleep(0.15)
    return 42


def reports_much(payload: Any, progress: Any) -> int:
    """Progress from the innermost loop."""
    for step in range(200_000):
        progress(step, 200_000, "counting")
    return 42


def takes_turns(payload: Any, progress: Any) -> list[float]:
    """Works, waits, works again; the processor time it used before each turn and after the last."""
    used = [time.process_time()]
    for _ in range(payload["turns"]):
        print("still here", flush=True)
        progress.pause()
        used.append(time.process_time())
    return used


def tells(payload: Any, progress: Any) -> int:
    """Progress in quick succession, then two rounds more."""
    for text in ("loading", "scoring", "perplexity 12"):
        progress(1, 4, text)
    for _ in range(2):
        progress.pause()
        progress(2, 4, "perplexity 12")
    return 0


def breeds(payload: Any, progress: Any) -> list[int]:
    """Leaves a child and a grandchild running; their pids."""
    program = (
        "import subprocess, sys, time\n"
        f"print(subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]).pid, flush=True)\n"
        "time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    return [child.pid, int(child.stdout.readline())]


def nan(payload: Any, progress: Any) -> dict[str, float]:
    """A number that JSON has not."""
    return {"perplexity": float("nan")}


def unserializable(payload: Any, progress: Any) -> Any:
    """What JSON cannot say."""
    return {"weights": object()}


def allocates(payload: Any, progress: Any) -> int:
    """Holds `payload["bytes"]` for half a second, and as much again in a child if `payload["child"]`."""
    held = bytearray(payload["bytes"])
    held[::4096] = b"x" * len(held[::4096])
    if payload.get("child"):
        program = f"import time; held = bytearray(b'x') * {payload['bytes']}; time.sleep(0.7)"
        subprocess.run([sys.executable, "-c", program], check=True)
    else:
        time.sleep(0.7)
    return len(held)
