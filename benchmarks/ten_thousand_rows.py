"""The claim: `publish` and `compare` of 10,000 nightly rows take under 10 s each.

    python benchmarks/ten_thousand_rows.py [ROWS.jsonl]

The rows are those of the default recipe that ran (stored in results/), measured again on as many nights as it
takes, each night with its own noise; one engine becomes 10 % slower half-way. About 250 MB in a temporary folder.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNT = 10_000
LIMIT_S = 10.0


def write(source: Path, target: Path, chance: random.Random) -> tuple[str, str]:
    """Write the rows; the dates of the first and the last night."""
    jobs = [row for row in map(json.loads, source.read_text().splitlines()) if row["measurement"]]
    nights = COUNT // len(jobs) + 1
    first = datetime(2025, 1, 1, 2, tzinfo=UTC)
    target.parent.mkdir(parents=True)
    written = 0
    with target.open("w") as file:
        for night in range(nights):
            at = (first + timedelta(days=night)).isoformat().replace("+00:00", "Z")
            for row in jobs[: COUNT - written]:
                slow = 1.1 if row["backend"] == "llamacpp" and night >= nights // 2 else 1.0
                factor = slow * math.exp(chance.gauss(0, 0.01))
                told = json.loads(json.dumps(row))
                told["started_at"] = at
                told["versions"]["commit"] = f"{night:012x}"
                for speed in told["measurement"]["speeds"]:
                    speed["step_s"] = [[step * factor for step in steps] for steps in speed["step_s"]]
                file.write(json.dumps(told, separators=(",", ":")) + "\n")
                written += 1
    # The last night that is whole.
    return first.date().isoformat(), (first + timedelta(days=nights - 2)).date().isoformat()


def timed(*words: str) -> float:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "workbench.cli", *words], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    print(f"{words[0]:8} {seconds:5.1f} s   {done.stdout.splitlines()[0]}")
    return seconds


def main() -> int:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else next(ROOT.glob("results/*/rows.jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "results", "machine", "rows.jsonl")
        first, last = write(source, rows, random.Random(0))
        print(f"{COUNT} rows, {rows.stat().st_size / 2**20:.0f} MiB")
        results = ("--results", str(rows.parents[1]))
        publish_s = timed("publish", str(Path(folder, "site")), *results)
        compare_s = timed("compare", first, last, *results)
        size = sum(file.stat().st_size for file in Path(folder, "site").rglob("*") if file.is_file())
        print(f"site     {size / 2**20:5.1f} MiB")
    slowest = max(publish_s, compare_s)
    print(f"ratio to the limit of {LIMIT_S:g} s: {slowest / LIMIT_S:.2f}")
    return int(slowest > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
