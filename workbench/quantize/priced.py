"""The prices of types: one sensitivity pass over the base, for every file whose types are chosen by them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from workbench.console import Show
from workbench.disk import write_whole
from workbench.errors import UserError, WorkFailed
from workbench.home import entry, home
from workbench.machine.identity import versions
from workbench.machine.work import work
from workbench.quantize.record import check
from workbench.recipe.load import Recipe
from workbench.records import (
    CalibrationTokens,
    ImportanceMatrix,
    PreparedBase,
    Priced,
    Prices,
    PricesRequest,
    Variant,
    digest,
    to_json,
)
from workbench.worker.methods import Making

PRICES_VERSION = 2
"""Version of the prices made of given inputs; raise it when they come out otherwise."""


def run_prices(
    recipe: Recipe,
    base: PreparedBase,
    tokens: CalibrationTokens | None,
    imatrix: ImportanceMatrix | None,
    wanted: Mapping[str, tuple[Variant, Making]],
    show: Show,
    failures: dict[str, str],
) -> Prices | None:
    """The prices, if a variant's types are chosen by them; where that fails, such variants are added to `failures`."""
    asking = [name for name, (_, making) in wanted.items() if making.calibration == "prices" and name not in failures]
    if not asking or tokens is None or imatrix is None or recipe.calibration is None:
        return None
    precision = recipe.calibration.precision
    by = versions(("llama-cpp-python", "gguf", "torch", "transformers"))
    key = digest([base.digest, tokens.digest, imatrix.digest, "prices", precision, by, PRICES_VERSION])

    def build(folder: Path) -> Prices:
        check(recipe, base)
        state = home() / "states" / key
        request = PricesRequest(base.path, tokens.path, tokens.digest, imatrix.path, str(state), precision=precision)
        told = "prices of types"
        function = "workbench.worker.calibration.sensitivity:run"
        priced, cost = work(function, request, Priced, show, told, limit_s=recipe.limits.quantize_s)
        write_whole(folder / "priced.json", json.dumps(to_json(priced)))
        shutil.rmtree(state, ignore_errors=True)
        return Prices(key, tokens.digest, priced.seconds, cost)

    try:
        folder, found = entry("prices", key, Prices, build)
    except (WorkFailed, UserError) as problem:
        failures |= dict.fromkeys(asking, str(problem))
        show.say(f"pricing types failed: {problem}")
        return None
    return replace(found, path=str(folder / "priced.json"), imatrix=imatrix.path)
