"""The static site: latest tables, history, regressions with where they began, the feed and the badge."""

from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import command
from tests.rows import a_row
from workbench.errors import UserError
from workbench.records import Row
from workbench.report import store
from workbench.report.site.publish import badge, path_of, publish


def nights(slow_from: int = 99, mended_from: int = 99, count: int = 24, **more: str) -> list[Row]:
    """A base and a variant, measured nightly; the variant gets 12 % slower and an engine newer."""
    chance = random.Random(0)
    rows = []
    for day in range(count):
        slow = slow_from <= day < mended_from
        versions = {"toy": "2.0" if slow else "1.0", "commit": f"{day:04}beef"}
        for variant, level in (("base", 60.0), ("q", 88.0 if slow else 100.0)):
            rate = level * math.exp(chance.gauss(0, 0.01))
            rows.append(
                a_row(
                    variant,
                    step_s=[[1 / rate, 1 / rate]] * 3,
                    versions=versions,
                    started_at=f"2026-10-{day + 1:02}T02:00:00Z",
                    **more,
                )
            )
    return rows


def test_a_site_of_two_machines(tmp_path: Path) -> None:
    rows = nights(slow_from=12) + nights(machine="lab", recipe="other")
    (step,) = publish(rows, tmp_path, "https://example.org/bench/")
    assert (step.metric, step.series.pair.variant, step.series.machine) == ("decode_tok_s", "q", "desk")
    index = (tmp_path / "index.html").read_text()
    assert "href='desk/toy.html'" in index and "href='lab/other.html'" in index
    assert "toy 1.0 → 2.0" in index and "commit 0011beef → 0012beef" in index
    ours, theirs = (tmp_path / "desk" / "toy.html").read_text(), (tmp_path / "lab" / "other.html").read_text()
    assert "Regressions" in ours and "Regressions" not in theirs
    assert 'id="plot-history-decode_tok_s"' in ours and 'href="../index.html"' in ours

    feed = json.loads((tmp_path / "feed.json").read_text())
    assert feed["version"] == "https://jsonfeed.org/version/1.1"
    assert feed["feed_url"] == "https://example.org/bench/feed.json"
    (item,) = feed["items"]
    assert item["url"] == "https://example.org/bench/desk/toy.html"
    assert item["date_published"] == "2026-10-13T02:00:00Z"
    told = item["_workbench"]
    assert (told["commit"], told["last_good_commit"], told["open"]) == ("0012beef", "0011beef", True)
    assert told["changed"]["toy"] == ["1.0", "2.0"]
    assert json.loads((tmp_path / "badge.json").read_text())["message"] == "1 regression"
    assert "1 regression" in "".join(xml.parse(tmp_path / "badge.svg").getroot().itertext())
    # The rows themselves lie beside their page, as `workbench table` reads them.
    assert 'href="toy.jsonl"' in ours
    beside = store.read(tmp_path / "desk" / "toy.jsonl")[0]
    assert [row.artifact.variant for row in beside] == ["base", "q"]
    data = json.loads((tmp_path / "data.json").read_text())
    assert [(each["machine"], len(each["rows"])) for each in data] == [("desk", 2), ("lab", 2)]


def test_a_page_says_how_other_machines_do(tmp_path: Path) -> None:
    publish(nights(count=1) + nights(machine="lab", count=1) + nights(machine="far", recipe="other", count=1), tmp_path)
    text = (tmp_path / "desk" / "toy.html").read_text()
    part = text[text.index("<h2 id=across>") : text.index("<h2 id=floor>")]
    assert re.findall(r"colspan=\d class=group>(\w+)", part) == ["desk", "lab"]  # `far` ran another recipe
    assert len(re.findall(r"<tr><th scope=row>", part)) == 2 and part.count("<small>MiB</small>") == 2
    assert "<h2 id=across>" not in (tmp_path / "far" / "other.html").read_text()


def test_links_lead_somewhere(tmp_path: Path) -> None:
    publish(nights() + nights(machine="a/../b <x>", recipe="r?&'"), tmp_path)
    for file in tmp_path.rglob("*.html"):
        for link in re.findall(r"(?:href|src)=[\"']?([^\"' >]+)", file.read_text()):
            if not link.startswith(("#", "data:")):
                assert (file.parent / link).resolve().is_relative_to(tmp_path), link
                assert (file.parent / link).exists(), link
    assert path_of("a/../b <x>", "r?&'") != path_of("a/../b <y>", "r?&'")


def test_a_mended_regression_is_told_and_no_longer_counted(tmp_path: Path) -> None:
    assert publish(nights(slow_from=8, mended_from=16), tmp_path) == []
    (item,) = json.loads((tmp_path / "feed.json").read_text())["items"]
    assert item["tags"][0] == "mended"
    assert "mended since" in (tmp_path / "index.html").read_text()
    assert "no regressions" in (tmp_path / "badge.svg").read_text()


def test_a_single_bad_night_is_none(tmp_path: Path) -> None:
    assert publish(nights(slow_from=12, mended_from=13), tmp_path) == []
    assert json.loads((tmp_path / "feed.json").read_text())["items"] == []


def test_publishing_the_same_rows_twice_changes_nothing(tmp_path: Path) -> None:
    for name in ("one", "two"):
        publish(nights(slow_from=12), tmp_path / name)
    one, two = (
        {file.relative_to(place): file.read_bytes() for file in place.rglob("*") if file.is_file()}
        for place in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) == 7


def test_html_in_names_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [row for row in nights(slow_from=8) if row.artifact.variant == "q"]
    rows = [replace(row, artifact=replace(row.artifact, variant=evil)) for row in rows]
    assert publish(rows, tmp_path)
    for file in tmp_path.rglob("*.html"):
        assert evil not in file.read_text()


def test_nothing_to_publish_and_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to publish"):
        publish([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        publish(nights(), tmp_path / "file")


def test_the_badge_is_green_or_red(tmp_path: Path) -> None:
    assert "#15803d" in badge([]) and "#b91c1c" in badge(publish(nights(slow_from=12), tmp_path))


def test_the_command(tmp_path: Path) -> None:
    for row in nights(slow_from=12):
        store.append(tmp_path / "results", "desk", row)
    done = command("publish", str(tmp_path / "site"), "--results", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == (
        "llamacpp on desk since 2026-10-13: 1 worse (desk/toy.html); "
        "changed with it: toy 1.0 -> 2.0, commit 0011beef -> 0012beef"
    )
    assert re.fullmatch(r"  q on llamacpp: decode_tok_s -1\d\.\d%", done.stdout.splitlines()[2])
    assert (tmp_path / "site" / "desk" / "toy.html").exists()
