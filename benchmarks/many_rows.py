"""What long histories cost: time and peak memory of each command over N and 2 N rows, and their ratio (of processor
time, which neighbours on the machine do not change).

    .venv/bin/python benchmarks/many_rows.py                  # 25,000 and 50,000 rows: 1.2 GB in a temporary folder
    .venv/bin/python benchmarks/many_rows.py --different --rows 5000

The rows are the published ones, night after night: each night all jobs again, with their own time, commit and noise,
and after every fifty nights other versions of the engines, so other keys. `--different`: each row is of a variant of
its own, which is a line of the table each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "results"
BEGIN = datetime(2020, 1, 1, tzinfo=UTC)
NIGHTS_A_VERSION = 50


def rows(count: int, different: bool, seed: int = 0) -> Any:
    """`count` stored rows, one at a time, as JSON objects."""
    chance = random.Random(seed)
    jobs = [json.loads(line) for path in sorted(PUBLISHED.glob("*/rows.jsonl")) for line in path.open()]
    for number in range(count):
        night, place = divmod(number, len(jobs))
        job = jobs[place]
        began = BEGIN + timedelta(days=night if not different else 0, seconds=number % 80_000)
        row = job | {"started_at": began.isoformat().replace("+00:00", "Z")}
        row["versions"] = job["versions"] | {"commit": f"{night:040x}"}
        if different:
            row["key"] = f"{job['key']}-{number}"
            if job["artifact"]["method"] != "base":
                row["artifact"] = job["artifact"] | {"variant": f"{job['artifact']['variant']}-{number}"}
        else:
            row["key"] = f"{job['key']}-{night // NIGHTS_A_VERSION}"
        if job["measurement"]:
            noise = chance.lognormvariate(0, 0.02)
            speeds = [
                speed | {"step_s": [[round(step * noise, 9) for step in steps] for steps in speed["step_s"]]}
                for speed in job["measurement"]["speeds"]
            ]
            row["measurement"] = job["measurement"] | {"speeds": speeds}
        yield row


def write(file: Path, count: int, different: bool) -> None:
    """The rows as a file of results."""
    file.parent.mkdir(parents=True)
    with file.open("w") as out:
        for row in rows(count, different):
            out.write(json.dumps(row, separators=(",", ":")) + "\n")


def measured(words: list[str], folder: Path) -> tuple[float, float, float]:
    """Seconds, processor seconds and MB (10^6 bytes) of peak memory of a command of this program."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "WORKBENCH_HOME": str(folder / "home")}
    command = [sys.executable, "-P", "-m", "workbench.cli", *words]
    began = time.monotonic()
    child = os.fork()
    if not child:
        os.chdir(folder)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        os.execve(sys.executable, command, environment)
    _, status, used = os.wait4(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, 1):
        raise SystemExit(f"{' '.join(words)} ended with {status}")
    return time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="the larger number; half of it is measured too")
    parser.add_argument("--different", action="store_true", help="each row a variant of its own")
    parser.add_argument("--commands", default="table,compare,report,publish")
    asked = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="many-rows-") as name:
        folder = Path(name)
        for count in (asked.rows // 2, asked.rows):
            results = folder / str(count)
            file = results / "desk" / "rows.jsonl"
            write(file, count, asked.different)
            print(f"{count:,} rows, {file.stat().st_size / 1e6:,.0f} MB", flush=True)
            where = ["--results", str(results)]
            for command in asked.commands.split(","):
                words = {
                    "table": ["table", *where],
                    "compare": ["compare", str(file), str(file)],
                    "report": ["report", *where, "-o", str(folder / "page.html")],
                    "publish": ["publish", str(folder / "site"), *where],
                }[command]
                found.setdefault(command, []).append(measured(words, folder))
                print(
                    "  {:8} {:6.2f} s, {:6.2f} s of a processor, {:5.0f} MB".format(command, *found[command][-1]),
                    flush=True,
                )
            file.unlink()
    for command, ((_, first_s, first_mb), (_, second_s, second_mb)) in found.items():
        print(
            f"{command:8} twice the rows: {second_s / first_s:.2f} x the time, {second_mb / first_mb:.2f} x the memory"
        )


if __name__ == "__main__":
    main()
