"""A real Ray cluster of several nodes on this machine: a raylet each, with a cache of its own, nothing beyond loopback.

Only processes: this module imports nothing of Ray, and whatever ends the tests ends them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.places import ROOT

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Raylets:
    """Nodes of a cluster, each with `WORKBENCH_HOME` in a folder of its own under `folder`."""

    def __init__(self, folder: Path, nodes: int, environment: dict[str, str]) -> None:
        # Ray's sockets lie below it, and a socket's path has 107 characters at the most.
        self._temporary = Path(tempfile.mkdtemp(prefix="wb", dir="/tmp"))
        self._folder, self._environment = folder, environment
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        for number in range(nodes):
            self.start(number)

    def home(self, number: int) -> Path:
        return self._folder / f"home-{number}"

    def start(self, number: int) -> None:
        """Start a node; the first is the head."""
        head = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self._temporary}"]
        where = head if number == 0 else [f"--address={self.address}"]
        own = {
            **os.environ,
            **self._environment,
            "WORKBENCH_HOME": str(self.home(number)),
            "TMPDIR": str(self.home(number).parent),
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING": "0",
            # A test must not wait half a minute until a dead node is noticed.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
        }
        words = [RAY, "start", *where, "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0", "--block"]
        words += ["--object-store-memory=80000000", f"--labels=room={'a' if number < 2 else 'b'}"]
        log = open(self._folder / f"node-{number}.log", "wb")  # noqa: SIM115 (the child's, from here on)
        self._nodes[number] = subprocess.Popen(words, env=own, stdout=log, stderr=log, start_new_session=True)
        log.close()
        self._wait(number)

    def _wait(self, number: int) -> None:
        limit, log = time.monotonic() + 90, self._folder / f"node-{number}.log"
        while b"Ray runtime started" not in log.read_bytes():
            assert time.monotonic() < limit and self._nodes[number].poll() is None, log.read_text()
            time.sleep(0.1)

    def processes(self, number: int) -> list[psutil.Process]:
        """All processes of a node: its raylet, its workers, and what those started."""
        found = []
        for process in psutil.process_iter():
            try:
                own = process.environ().get("WORKBENCH_HOME") == str(self.home(number))
                if own or f"{self.home(number)}/" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def engines(self, number: int) -> list[psutil.Process]:
        """Workers of ours that are at work on a node, each with an engine in it."""
        return [each for each in self.processes(number) if f"{self.home(number)}/logs/" in _words(each)]

    def steps(self, number: int) -> list[psutil.Process]:
        """Ray's processes that do a step of ours."""
        return [each for each in self.processes(number) if _words(each).startswith("ray::run")]

    def kill(self, number: int) -> None:
        """The node is gone at once, as by a power cut."""
        for process in self.processes(number):
            try:
                process.kill()
            except psutil.Error:
                continue
        self._nodes.pop(number).wait(30)

    def close(self) -> None:
        for number in list(self._nodes):
            self.kill(number)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
