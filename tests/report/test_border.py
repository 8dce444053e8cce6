"""Whatever a line of rows holds: a row that every command can use, or a line that says what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from tests.command import command
from tests.fuzz import GONE, Mutant, how_many, mutants
from tests.rows import a_row, compared, demo_rows
from workbench.errors import UserError
from workbench.home import local
from workbench.hub import card, push
from workbench.records import Answers, Row, Task, to_json
from workbench.report import store
from workbench.report.formats import FILE_FORMATS, FORMATS
from workbench.report.site import publish
from workbench.report.table import build
from workbench.report.verdicts import recommend
from workbench.report.verdicts.compare import compare
from workbench.report.verdicts.compare import text as compared_text
from workbench.worker.backends import serving_command

OLD = [json.loads(line) for line in Path(__file__).with_name("schema-1.jsonl").read_text("utf-8").splitlines()]
"""Of schema 1."""
MEASURED = next(row for row in OLD if row["measurement"])


def todays() -> list[dict[str, Any]]:
    """Rows as they are stored today, with everything that a row can have."""
    rows = [compared(a_row(method="gguf"), 0.01), compared(a_row("q"), 0.1), *demo_rows()]
    stored = [to_json(row) for row in rows]
    task = Task("sums", "t.json", "t1", 3, 20)
    for each in stored[:2]:
        each["artifact"]["provenance"] = {
            "source": {"hub": "owner/name", "revision": "main"},
            "options": {"type": "Q4_K_M"},
            "versions": {"torch": "2"},
            "encoder": {"name": "workbench", "device": "cpu", "rows_checked": 8, "rows_equal": 8},
        }
        each["tasks"] = {"sums": to_json(task)}
        each["measurement"]["tasks"] = {"sums": Answers(correct=[1, 0, 1], given=["4", None, "6"])}
        each["evaluations"]["code"] = each["evaluations"]["prose"] | {"name": "code", "digest": "e2"}
        each["measurement"]["qualities"]["code"] = each["measurement"]["qualities"]["prose"]
        each["measurement"]["served"] = [
            {"slots": 2, "prompt_tokens": 100, "new_tokens": [3, 4], "seconds": [1.0, 1.1], "continuous": True}
        ]
        each["measurement"]["speeds"] *= 2
    return stored


FREE = ("options", "artifact.provenance", "measurement.settings", "measurement.tasks.*.given")
"""Of any shape; whatever is said of them is said in words."""
MAY_BE_NULL = {
    *("error", "unsupported", "measurement", "evaluation", "evaluation.scored_bytes", "machine.driver"),
    *("evaluations.*.scored_bytes", "machine.copy_bytes_per_s", "tasks.*.items", "measurement.load_s"),
    *("measurement.conditions.*", "measurement.speeds.*.energy_j.*", "artifact.provenance"),
    *(f"measurement.{kind}.{name}" for kind in ("quality", "qualities.*") for name in
      ("top_k", "tail_draws", "reference_digest", "made_reference_digest")),
}  # fmt: skip
NEEDED = {
    *("key", "base", "recipe", "recipe_digest", "artifact", "backend", "workload", "measurement", "machine"),
    *("versions", "started_at", "duration_s", "schema_version", "artifact.variant", "artifact.digest"),
    *("artifact.disk_bytes", "measurement.device", "measurement.speeds.*.step_s", "measurement.speeds.*.batch"),
    *("measurement.quality.windows", "measurement.quality.windows.*.count", "measurement.quality.windows.*.nll_sum"),
}
ALIGNED = ("windows", "first_token_s", "step_s", "step_tokens", "correct")
"""Lists that have as many entries as others."""


def place_of(mutant: Mutant) -> str:
    """Where, with `*` for an index and for a name that a person chose."""
    parts = ["*" if isinstance(part, int) else part for part in mutant.path]
    for place, part in enumerate(parts[:-1]):
        chosen = ("evaluations", "qualities", "conditions", "memory", "versions", "tensor_types")
        if part in chosen or (part == "tasks" and isinstance(parts[place + 1], str)):
            parts[place + 1] = "*"
    return ".".join(parts)


def is_wrong(mutant: Mutant) -> bool:
    """Whether the mutant says what no row can say, as far as that is certain without the reader's own rules."""
    place, old, new = place_of(mutant), mutant.old, mutant.new
    if not mutant.path:
        return not mutant.of_text and not isinstance(new, dict)
    if isinstance(new, float) and not math.isfinite(new):
        return True
    if mutant.what in ("overflow", "a lone surrogate"):
        return True
    if any(place.startswith(free) for free in FREE):
        return False
    if new is GONE or mutant.what == GONE:
        return place in NEEDED
    if new is None:
        return place not in MAY_BE_NULL
    if mutant.what in ("less", "repeated"):
        return any(place.endswith(name) or f".{name}.*" in f"{place}." for name in ALIGNED if name in place)
    if isinstance(old, bool) or isinstance(new, bool):
        return type(old) is not type(new) and old is not None
    if isinstance(old, int | float) and isinstance(new, int | float):
        whole = isinstance(old, int) and not place.endswith(("_s", "correct.*", "sum", "conditions.*"))
        return (
            (new < -0.2 and not place.endswith(("seed", "conditions.*", "correct.*")))
            or (whole and not isinstance(new, int))
            or abs(new) > 1e200
        )
    return old is not None and type(old) is not type(new)


def use(rows: list[Row], history: list[Row], folder: Path | None) -> None:
    """What every command does with rows, but for the command line; a site where there is a folder for it."""
    table = build(rows)
    for write in FORMATS.values():
        write(table).encode()
    FILE_FORMATS["parquet"](history)
    for order in recommend.ORDERS:
        found = recommend.recommend(table, recommend.Constraints(max_perplexity=0.01, max_kld=0.1, sort=order))
        assert str(found) and recommend.json_text(found)
    if folder:
        publish.publish(history, folder, "https://example.org")
    for row in rows:
        serving_command(row, "/home/x")
        os.path.exists(local(row.artifact.path))
        licence = push.licence_of(row, rows)
        if row.artifact.method != "base":
            card.card(rows, row, licence)
            with contextlib.suppress(UserError):  # the files are not here
                push.path_of(row)
    try:
        assert compared_text(compare(rows, rows, machine=table.machine), everything=True)
    except UserError as error:
        assert "not comparable" in str(error) or "nothing to compare" in str(error)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mutant_is_a_row_that_can_be_used_or_a_line_that_says_why_not(tmp_path: Path, seed: int) -> None:
    documents = [OLD, todays()][seed]
    base, file = [MEASURED, documents[0]][seed], tmp_path / "rows.jsonl"
    wrong, told, taken = [], 0, []
    for mutant in mutants(documents, how_many(320) // 2, seed):
        file.write_bytes(json.dumps(base).encode() + b"\n" + mutant.text.replace(b"\n", b" ") + b"\n")
        try:
            rows, warnings = store.read(file)
        except UserError as error:
            assert str(error).startswith(f"{file}:2: written by a newer workbench"), mutant
            continue
        if warnings:
            assert len(warnings) == 1 and len(rows) == 1
            assert warnings[0].startswith(f"{file}:2: not a whole row, skipped ("), mutant
            assert len(warnings[0]) < len(str(file)) + 200 and "\n" not in warnings[0]
            told += 1
            continue
        taken.append(mutant.text)
        if is_wrong(mutant):
            wrong.append(f"{mutant} ({mutant.old!r:.60} -> {mutant.new!r:.60})")
        try:
            use(rows, store.history(file)[0], tmp_path / "site" if len(taken) % 3 == 0 else None)
        except Exception as error:
            raise AssertionError(f"{mutant} ({mutant.old!r:.60} -> {mutant.new!r:.60}): {error!r}") from error
    assert not wrong, "\n".join(wrong)
    assert told > 0.4 * how_many(320) // 2
    print(f"{told} refused, {len(taken)} taken, of {how_many(320) // 2}")
    file.write_bytes(b"\n".join([json.dumps(base).encode(), *taken[:50]]))
    for words in (["table"], ["table", "-f", "csv"], ["report", "-o", str(tmp_path / "r.html")], ["recommend"]):
        done = command(*words, "--results", str(tmp_path), folder=tmp_path)
        assert done.returncode in (0, 1), done.stderr
        assert "Traceback" not in done.stderr


def test_bad_lines_are_told_and_many_are_counted(tmp_path: Path) -> None:
    lines = [json.dumps(MEASURED | {"started_at": "yesterday"})] * 14 + [json.dumps(MEASURED)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    said = command("table", "--results", str(tmp_path)).stderr.splitlines()
    told = [line for line in said if line.startswith("warning")]
    assert len(told) == 11
    assert told[0].startswith(f"warning: {tmp_path}/rows.jsonl:1: not a whole row, skipped (started_at: Expected `str`")
    assert told[-1] == "warning: and 4 more lines that were skipped"


PLANTED = {
    "started_at": ("2026-13-40T25:00:00Z", "month must be in 1..12"),
    "measurement": (None, "neither measured nor a reason why not"),
    "evaluation": (None, "measurement.qualities.: not of the tokens of evaluations."),
    "workload": ({"prompt_tokens": "x"}, "workload.prompt_tokens"),
    "duration_s": (-1, "duration_s: Expected `float` >= 0.0"),
    "schema_version": (None, "schema_version"),
    "options": ({"sizes": [{"kv_cache": 2**63}]}, "options: a whole number of more than 64 bits"),
}


@pytest.mark.parametrize("field", PLANTED)
def test_the_reason_names_the_place(tmp_path: Path, field: str) -> None:
    value, reason = PLANTED[field]
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(MEASURED | {field: value}))
    rows, (warning,) = store.read(tmp_path)
    assert rows == [] and ":2: not a whole row, skipped (" in warning and reason in warning


def test_rows_share_what_they_have_in_common_and_lose_what_nobody_asks(tmp_path: Path) -> None:
    night = MEASURED | {"started_at": "2026-11-22T10:00:00Z"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(MEASURED) + "\n" + json.dumps(night))
    first, second = store.history(tmp_path)[0]
    assert first.artifact is second.artifact and first.machine is second.machine
    types = MEASURED["artifact"]["tensor_types"]
    assert set(first.artifact.tensor_types.values()) == set(types.values()) and len(first.artifact.tensor_types) < 3
    assert "tensor_errors" not in first.artifact.provenance


def test_every_document_of_the_fuzzer_is_a_row(tmp_path: Path) -> None:
    documents = [*OLD, *todays()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    rows, warnings = store.read(tmp_path)
    assert warnings == [] and len(rows) == len({(each["machine"]["name"], each["key"]) for each in documents})
