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
from workbench.profile.beside import ENDPOINT, Beside, quality, served_as
from workbench.profile.jobs import now
from workbench.profile.measure import portable_row
from workbench.profile.under_load import Found, Wish, introduce, measure
from workbench.recipe.load import Recipe
from workbench.records import MEASUREMENT_VERSION, Limited, Machine, Measurement, Row, digest
from workbench.report import store
from workbench.serving.address import Address
from workbench.serving.client import Client

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


def check_remote(address: Address, wish: Wish, yes: bool, recipe: Recipe | None = None) -> None:
    """Raise `UserError` if requests would leave this machine and nobody has said yes to that host yet: to prompts of
    public text, and apart from it to a recipe's own text and tasks."""
    if address.loopback:
        return
    file = home() / "remote-hosts"
    known = file.read_text().split() if file.exists() else []
    wanted = f"{address.host}/texts" if recipe else address.host
    if wanted in known:
        return
    if not yes:
        raise UserError(
            f"{address.host} is not this machine. It would be sent {_what_is_sent(address, wish, recipe)}. If it may "
            "be: --yes-remote, once for a host"
        )
    with disk_faults(home()):
        home().mkdir(parents=True, exist_ok=True)
        write_whole(file, "\n".join(dict.fromkeys([*known, address.host, wanted, ""])))


def _what_is_sent(address: Address, wish: Wish, recipe: Recipe | None) -> str:
    points = len(wish.concurrency) + len(wish.rates) + (30 if wish.limits else 0)
    clear = " in clear text" if address.url.startswith("http:") else ""
    key = f", with the key{clear}" if address.key else ""
    own = [*recipe.evaluations, *recipe.tasks] if recipe else []
    texts = f", and the recipe's own texts ({', '.join(own)}), for the most a request for each of their tokens"
    return (
        f"about {points * wish.requests + wish.repeats + 10:,} requests{key}, each some {wish.prompt_tokens} tokens of "
        f"Python's documentation for an answer of some {wish.new_tokens}{texts if own else ''}"
    )


def measure_endpoint(
    address: Address,
    model: str | None,
    key_variable: str | None,
    wish: Wish,
    results: Path | str,
    show: Show,
    beside: Beside | None = None,
) -> Row:
    """The row of a server, stored under `results`. Raises `UserError` where it cannot be asked at all; one that dies
    under load leaves a row with an error and what was measured until then, and so does an interrupt, which is passed
    on. `beside`: the recipe that it is measured with."""
    started_at, started = now(), time.monotonic()
    found = Found()

    async def introduced() -> None:
        async with Client(address) as client:
            await introduce(client, model, key_variable, wish, found)

    async def loaded() -> None:
        async with Client(address) as client:
            await measure(client, wish, show, found)

    asyncio.run(introduced())
    row = replace(planned(found.dialect.model, address, wish, beside), started_at=started_at)
    if beside is None:
        causes = [found.dialect.model, row.options, row.workload, found.dialect.api, MEASUREMENT_VERSION]
        row = replace(row, key=digest(causes))
    scored = quality(beside, row, address, found.dialect, key_variable, show)
    try:
        asyncio.run(loaded())
    except KeyboardInterrupt:
        if found.single:
            found.error = "interrupted"
            store_row(_filled(row, found, wish, scored, started), results)
        raise
    row = _filled(row, found, wish, scored, started)
    store_row(row, results)
    if row.error:
        show.say(f"{row.artifact.variant} at {address.url} failed: {row.error}")
    return row


def machine_at(address: Address) -> Machine:
    """Whose row it is: what another machine is made of is not known here, and its numbers are not this one's."""
    return machine() if address.loopback else Machine(name=re.sub(r"[^\w.-]", "-", address.host)[:200])


def planned(model: str, address: Address, wish: Wish, beside: Beside | None) -> Row:
    """A server's row before anything was measured, by the name of its model."""
    options: dict[str, object] = {"url": address.url, **wish.options, **(beside.options if beside else {})}
    here = machine_at(address)
    base = re.sub(r"[\x00-\x1f\x7f]", "-", model)[:500]
    served = re.sub(r"[\x00-\x1f\x7f\\]", "-", model.rstrip("/").rpartition("/")[2])[:200] or ENDPOINT
    row = Row(
        key="",
        base=base,
        recipe=ENDPOINT,
        recipe_digest=digest(options),
        artifact=served_as(served),
        backend=ENDPOINT,
        workload=wish.workload,
        measurement=None,
        machine=replace(here, installation=installation()),
        versions=program(),
        started_at=now(),
        duration_s=0.0,
        options=options,
    )
    if beside is None:
        return row
    recipe, made = beside.recipe, beside.made
    row = replace(
        row,
        base=recipe.model,
        recipe=recipe.name,
        recipe_digest=recipe.digest,
        artifact=beside.artifact(served),
        evaluations=made.evaluations,
        tasks=made.tasks,
        base_types=made.base.quantized_types,
        place=beside.place,
    )
    return replace(row, key=beside.key(row))


def _filled(row: Row, found: Found, wish: Wish, scored: Measurement, started: float) -> Row:
    """The row with what was found."""
    measurement = replace(
        scored,
        speeds=found.speeds(wish),
        settings={"api": found.dialect.api, "tokens counted by": found.how, **scored.settings},
        warnings=[*found.warnings(), *scored.warnings],
        serving=found.serving,
    )
    return replace(row, measurement=measurement, error=found.error, duration_s=round(time.monotonic() - started, 3))


def store_row(row: Row, results: Path | str) -> None:
    """Keep it under `results`, in its machine's folder."""
    store.append(results, row.machine.name, portable_row(row))
