"""A server that somebody else started, as a row beside those of engines that the workbench runs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from workbench.console import Show
from workbench.disk import disk_faults, write_whole
from workbench.errors import UserError, check_known, short
from workbench.home import home, installation
from workbench.machine.identity import machine, program
from workbench.profile.jobs import now
from workbench.profile.measure import portable_row
from workbench.profile.under_load import Found, Wish, measure
from workbench.records import MEASUREMENT_VERSION, Artifact, Limited, Machine, Measurement, Row, digest
from workbench.report import store
from workbench.serving.address import Address
from workbench.serving.client import Client

ENDPOINT = "endpoint"
"""Recipe, method and engine of a row that no recipe made."""
UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0}
"""In a second."""
ARRIVALS = ("poisson", "constant")
LIMITED: tuple[Limited, ...] = ("ttft", "itl", "tpot", "e2e")


def limits_of(words: Sequence[str]) -> dict[Limited, float]:
    """Limits as a person writes them, `ttft:500ms`, in seconds. Raises `UserError`."""
    found: dict[Limited, float] = {}
    for word in words:
        name, _, limit = word.partition(":")
        check_known("limit of --slo", name, LIMITED)
        parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(us|ms|s)", limit)
        if not parts or not float(parts[1]):
            raise UserError(f"--slo {short(word)}: a limit is a time above zero, as ttft:500ms or e2e:2s")
        found[next(each for each in LIMITED if each == name)] = float(parts[1]) / UNITS[parts[2]]
    return found


def wish_of(
    concurrency: Sequence[int],
    rates: Sequence[float],
    arrivals: str,
    limits: Sequence[str],
    prompt_tokens: int,
    new_tokens: int,
    requests: int,
) -> Wish:
    """What is asked of a server, checked. Raises `UserError`."""
    check_known("--arrivals", arrivals, ARRIVALS)
    for rate in rates:
        if not 1e-3 <= rate <= 1e6:
            raise UserError(f"--rate {rate:g}: requests a second, from 0.001 to a million")
    for name, number, least in (
        ("--prompt-tokens", prompt_tokens, 1),
        ("--new-tokens", new_tokens, 2),
        ("--requests", requests, 10),
        *(("--concurrency", slots, 1) for slots in concurrency),
    ):
        if number < least:
            raise UserError(f"{name} {number}: at least {least}")
    how: Literal["poisson", "constant"] = "constant" if arrivals == "constant" else "poisson"
    at_once = [*dict.fromkeys(concurrency)]
    return Wish(prompt_tokens, new_tokens, at_once, [*dict.fromkeys(rates)], how, requests, limits_of(limits))


def check_remote(address: Address, wish: Wish, yes: bool) -> None:
    """Raise `UserError` if requests would leave this machine and nobody has said yes to that host yet."""
    if address.loopback:
        return
    file = home() / "remote-hosts"
    known = file.read_text().split() if file.exists() else []
    if address.host in known:
        return
    if not yes:
        raise UserError(
            f"{address.host} is not this machine. It would be sent {_what_is_sent(address, wish)}. If it may be: "
            "--yes-remote, once for a host"
        )
    with disk_faults(home()):
        home().mkdir(parents=True, exist_ok=True)
        write_whole(file, "\n".join([*known, address.host, ""]))


def _what_is_sent(address: Address, wish: Wish) -> str:
    points = len(wish.concurrency) + len(wish.rates) + (30 if wish.limits else 0)
    clear = " in clear text" if address.url.startswith("http:") else ""
    key = f", with the key{clear}" if address.key else ""
    return (
        f"about {points * wish.requests + wish.repeats + 10:,} requests{key}, each some {wish.prompt_tokens} tokens of "
        f"Python's documentation for an answer of some {wish.new_tokens}"
    )


def measure_endpoint(
    address: Address, model: str | None, key_variable: str | None, wish: Wish, results: Path | str, show: Show
) -> Row:
    """The row of a server, stored under `results`. Raises `UserError` where it cannot be asked at all; one that dies
    under load leaves a row with an error and what was measured until then."""
    started_at, started = now(), time.monotonic()
    found = Found()

    async def asked() -> None:
        async with Client(address) as client:
            await measure(client, model, key_variable, wish, show, found)

    asyncio.run(asked())
    options = {"url": address.url, **wish.options}
    # What another machine is made of is not known here; its numbers are not this one's.
    here = machine() if address.loopback else Machine(name=re.sub(r"[^\w.-]", "-", address.host)[:200])
    name = found.dialect.model
    row = Row(
        key=digest([name, options, wish.workload, found.dialect.api, MEASUREMENT_VERSION]),
        base=re.sub(r"[\x00-\x1f\x7f]", "-", name)[:500],
        recipe=ENDPOINT,
        recipe_digest=digest(options),
        artifact=Artifact(
            variant=re.sub(r"[\x00-\x1f\x7f\\]", "-", name.rstrip("/").rpartition("/")[2])[:200] or ENDPOINT,
            method=ENDPOINT,
            format="",
            path="",
            digest="",
            disk_bytes=0,
            parameters=0,
        ),
        backend=ENDPOINT,
        workload=wish.workload,
        measurement=Measurement(
            device=ENDPOINT,
            speeds=found.speeds(wish),
            settings={"api": found.dialect.api, "tokens counted by": found.how},
            warnings=found.warnings(),
            serving=found.serving,
        ),
        machine=replace(here, installation=installation()),
        versions=program(),
        started_at=started_at,
        duration_s=round(time.monotonic() - started, 3),
        options=options,
        error=found.error,
    )
    store.append(results, here.name, portable_row(row))
    if row.error:
        show.say(f"{row.artifact.variant} at {address.url} failed: {row.error}")
    return row
