"""Whether all that needs a GPU works on this machine's, and how fast, in ten minutes at most: `make gpu-check`.

    python benchmarks/gpu_check.py                                        every part, one after the other
    python benchmarks/gpu_check.py environment kernels speed encoders calibration recipe      or some of them

Prints a table of what holds and what does not, and appends each line as a JSON row to
`results/<gpu>/gpu-check.jsonl`; exit code 1 where something does not hold, 2 without a GPU. A part runs in a process of
its own, with a time limit: what hangs or crashes is one line of the table. Needs torch and Triton, parts that run the
workbench itself also what it needs; engines and llama.cpp are used where they are, and nothing is fetched.

Goals are those of peers (on the same or a like GPU), not promises: a line that does not hold is a finding.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from gpu_parts import Finding, Place, calibration, encoders, environment, kernels, recipe, speed  # noqa: E402

PARTS = {
    "environment": environment,
    "kernels": kernels,
    "speed": speed,
    "encoders": encoders,
    "calibration": calibration,
    "recipe": recipe,
}


def found_by(name: str, place: Place) -> Iterator[Finding]:
    """What a part finds, with what ends it as its last line."""
    try:
        yield from PARTS[name].find(place)
    except (Exception, SystemExit) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        missing = isinstance(error, ModuleNotFoundError)
        yield Finding(f"{name} ended", words[-1][:200], "" if missing else "no error", None if missing else False)


def in_a_process(name: str, limit_s: float, results: Path) -> Iterator[Finding]:
    """What a part finds in a process of its own, which is ended with all that it started at its limit."""
    words = [sys.executable, str(Path(__file__).resolve()), name, "--lines", "--results", str(results)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + limit_s
    assert child.stdout is not None
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        try:
            while True:
                line = reader.submit(child.stdout.readline).result(max(0.0, deadline - time.monotonic()))
                if not line:
                    break
                yield Finding(**json.loads(line))
        except TimeoutError:
            yield Finding(f"{name} ended", f"not done after {limit_s:.0f} s", "done", False)
            return
        finally:
            end(child)
    if child.returncode:
        yield Finding(f"{name} ended", f"exit code {child.returncode}", "0", False)


def end(child: subprocess.Popen[str]) -> None:
    """End a process and its group; first so that it can end those that have left the group."""
    for how, patience_s in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
        if child.poll() is None:
            os.killpg(child.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience_s)


def line_of(finding: Finding) -> str:
    """A line of the table."""
    holds = {True: "yes", False: "NO", None: "-"}[finding.holds]
    goal = f"  (goal: {finding.goal})" if finding.goal else ""
    return f"  {holds:4} {finding.what:34} {finding.found}{goal}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--lines", action="store_true", help="one part, here, its findings as JSON lines")
    arguments = parser.parse_args(words)
    for name in arguments.parts:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; there are {', '.join(PARTS)}")
    for package in ("torch", "triton"):
        if not importlib.util.find_spec(package):
            print(f"gpu_check.py needs {package}, which is not installed here: `make gpu` sets it up", file=sys.stderr)
            return 2
    import torch

    if not torch.cuda.is_available():
        print("gpu_check.py checks a GPU, and torch sees none (torch.cuda.is_available() is false)", file=sys.stderr)
        return 2
    if arguments.lines:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
            for finding in found_by(arguments.parts[0], Place(Path(work), arguments.results)):
                print(json.dumps(asdict(finding)), flush=True)
        return 0
    return report(arguments.parts or list(PARTS), arguments.results)


def report(parts: list[str], results: Path) -> int:
    """Run the parts, print the table, store the rows; 1 where something does not hold."""
    from bench import append, machine

    here = machine()
    file = results / re.sub(r"[^a-z0-9]+", "-", str(here["gpu"]).lower()).strip("-") / "gpu-check.jsonl"
    started, held = time.monotonic(), {True: 0, False: 0, None: 0}
    print(f"{here['gpu']}, torch {here['torch']}, Triton {here['triton']}")
    for name in parts:
        part_started = time.monotonic()
        print(f"{name}:", flush=True)
        left_s = max(1.0, sum(part.LIMIT_S for part in PARTS.values()) - (part_started - started))
        for finding in in_a_process(name, min(PARTS[name].LIMIT_S, left_s), results):
            print(line_of(finding), flush=True)
            held[finding.holds] += 1
            append(file, {"part": name, **asdict(finding), **here})
        print(f"  took {time.monotonic() - part_started:.0f} s", flush=True)
    print(f"{held[True]} hold, {held[False]} do not, {held[None]} say nothing of a goal or could not be measured here")
    print(f"rows: {file}")
    return 1 if held[False] else 0


if __name__ == "__main__":
    sys.exit(main())
