"""What tokens cost, against figures computed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.command import command
from tests.rows import a_row
from workbench.errors import UserError
from workbench.records import LoadPoint, Request, Row, Serving
from workbench.report import store

DAYS = 30.4375
PRICES = """
currency: EUR
traffic: {requests_a_day: 216000, peak: 2}
machines: {desk: 3.6}
apis:
  far: {input: 10, output: 40}
"""


def served(end_s: Sequence[float] = (1.0,) * 10, serving: dict[str, Any] | None = None, **more: Any) -> Row:
    """A request a second, each of 100 prompt and 20 new tokens, the first after 0.2 s."""
    requests = [
        Request(float(i), 0.0, 100, each, 0.2, [(each - 0.2) / 19] * 19, [1] * 20) for i, each in enumerate(end_s)
    ]
    row = a_row(evaluation=None, **more)
    assert row.measurement is not None
    found = Serving([LoadPoint("closed", 1, requests)], **(serving or {}))
    return replace(row, measurement=replace(row.measurement, serving=found))


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES)
    return path


def test_by_hand(prices: Path) -> None:
    found = wb.cost(prices, [served()])
    api, own = found.offers
    # 216,000 a day are 2.5 a second, 5 in the busiest hour: 5 machines of one a second, 24 x 3.6 x 5 = 432 a day.
    assert (own.name, own.machines, own.requests_s) == ("base on llamacpp, desk", 5, 1.0)
    assert own.month == pytest.approx(432 * DAYS)
    # 432 for 216,000 x 120 = 25.92 million tokens.
    assert own.million == pytest.approx(432 / 25.92)
    assert own.full == pytest.approx(3.6 / 0.432)
    # 100 x 10 + 20 x 40 = 1,800 for a million requests.
    assert (api.name, api.machines) == ("far", None)
    assert api.month == pytest.approx(216000 * 0.0018 * DAYS) and api.million == pytest.approx(0.0018e6 / 120)
    # 86.4 a day are 48,000 requests of the API, more than the 43,200 that a machine with such a busiest hour serves.
    assert own.break_even == {"far": None}
    prices.write_text(PRICES.replace("peak: 2", "peak: 1"))
    even = wb.cost(prices, [served()])
    (own,), (api,) = ([each for each in even.offers if bool(each.machines) is mine] for mine in (True, False))
    assert own.machines == 3 and own.break_even == {"far": pytest.approx(48000)}
    assert even.month_of(own, 86400) == pytest.approx(86.4 * DAYS)
    assert even.month_of(own, 86401) == pytest.approx(2 * 86.4 * DAYS)
    assert even.month_of(api, 48000) == pytest.approx(even.month_of(own, 48000))


WITHIN = {"limits": {"ttft": 0.5}, "largest_rate": [0.25, 0.5]}


@pytest.mark.parametrize(
    ("row", "limits", "rate"),
    [
        (served((1.0,) * 19 + (9.0,)), ("e2e:2s",), 19 / 28),
        (served(serving=WITHIN), (), 0.25),
        (served(serving=WITHIN), ("ttft:500ms",), 0.25),
        # Other limits than those that the rate was searched with: by the samples.
        (served(serving=WITHIN), ("e2e:3s",), 1.0),
    ],
    ids=["goodput", "the row's limits", "the same limits", "other limits"],
)
def test_what_a_machine_serves_within_limits(row: Row, limits: Sequence[str], rate: float, prices: Path) -> None:
    (own,) = [each for each in wb.cost(prices, [row], limits=limits).offers if each.machines]
    assert own.requests_s == pytest.approx(rate)


def test_what_says_nothing_is_left_out_with_its_reason(prices: Path) -> None:
    rows = [served(), served(machine="attic"), a_row(), replace(served(variant="q"), error="it died")]
    found = wb.cost(prices, rows, limits=["e2e:500ms"])
    assert found.offers == [] and found.left_out["far"].startswith("nothing was measured")
    prices.write_text(PRICES.replace("peak: 2", "peak: 2, prompt_tokens: 100, new_tokens: 20"))
    found = wb.cost(prices, rows, limits=["e2e:500ms"])
    assert [each.name for each in found.offers] == ["far"]
    assert found.left_out == {
        "base on llamacpp, desk": "at no load that was measured did 95 of 100 requests keep the limits",
        "base on llamacpp, attic": "no price of the machine 'attic'",
        "base on llamacpp, desk (2)": "no load was measured: `profile --endpoint`, or a server as an engine with "
        "`requests`",
        "q on llamacpp, desk": "it died",
    }
    prices.write_text(PRICES.replace("peak: 2", "new_tokens: 40"))
    assert "measured with 20 new tokens, the traffic has 40" in str(wb.cost(prices, [served()]))


def test_rows_of_one_variant_and_engine_are_told_apart(prices: Path) -> None:
    """By what differs, on its own machine; a number only where nothing does."""
    kinds = [served(options={"kv_cache": kind, "threads": 2}) for kind in ("f16", "q8_0")]
    again = replace(kinds[1], started_at="2026-11-22T10:00:00Z")
    found = wb.cost(prices, [*kinds, again, served(machine="attic", options={"kv_cache": "f16", "threads": 2})])
    assert {each.name for each in found.offers} == {
        "base on llamacpp (kv_cache f16), desk",
        "base on llamacpp (kv_cache q8_0), desk",
        "base on llamacpp (kv_cache q8_0), desk (2)",
        "far",
    }
    assert [*found.left_out] == ["base on llamacpp, attic"]


def test_the_command(prices: Path, tmp_path: Path) -> None:
    store.append(tmp_path / "rows", "desk", served())
    done = command("cost", str(prices), str(tmp_path / "rows"), "--plot", str(tmp_path / "cost.svg"))
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    for words in (
        "prices in EUR",
        "base on llamacpp, desk 5 1 13,149.00 16.67 8.33 never",
        "far - - 11,834.10 15.00 - -",
        "a month is 30.4375 days",
        "100 prompt and 20 new tokens, each day has 216,000, its busiest hour 2 times the average",
        "measured 1 at once, with no limits set",
    ):
        assert words in told, done.stdout
    drawn = (tmp_path / "cost.svg").read_text()
    assert drawn.count("data-y=") == 2 and f'data-y="{432 * DAYS!r}"' in drawn and "far" in drawn
    done = command("cost", str(prices), str(tmp_path / "rows"), "-f", "json")
    assert {each["name"] for each in json.loads(done.stdout)["offers"]} == {"far", "base on llamacpp, desk"}
    done = command("cost", str(prices), str(tmp_path / "rows"), "--slo", "ttft:1ms")
    assert done.returncode == 1 and "left out" in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("machines: {desk: 1}", "traffic: missing"),
        ("traffic: {requests_a_day: 0}\nmachines: {desk: 1}", "requests_a_day"),
        ("traffic: {requests_a_day: 5}\nmachines: {desk: -1}", "machines.desk"),
        ("traffic: {requests_a_day: 5}\nmachines: {desk: .nan}", "machines.desk"),
        ("traffic: {requests_a_day: 5}\nmachine: {desk: 1}", "unknown key 'machine'. Did you mean 'machines'"),
        ("traffic: {requests_a_day: 5}", "no prices"),
        ("traffic: {requests_a_day: 5}\napis: {a: {input: 1}}", "apis.a.output: missing"),
        ("- 5", "prices are a mapping"),
        ("traffic: [", "not valid YAML"),
    ],
)
def test_files_that_are_no_prices(text: str, words: str, prices: Path) -> None:
    prices.write_text(text)
    with pytest.raises(UserError) as told:
        wb.cost(prices, [])
    assert words in str(told.value) and str(told.value).startswith(str(prices)[:40])


def test_no_file_of_prices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: cannot be read .No such file"):
        wb.cost(tmp_path / "none.yaml", [])
