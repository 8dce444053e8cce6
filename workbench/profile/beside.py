"""What a server's row has of a recipe: the file that it serves, and its quality on the recipe's texts and tasks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.console import Show
from workbench.errors import UserError, WorkFailed
from workbench.home import interpreter
from workbench.machine.work import work
from workbench.profile.jobs import environment_of
from workbench.profile.reference import REFERENCE_MAKER
from workbench.quantize.make import Made
from workbench.recipe.load import Recipe
from workbench.records import MEASUREMENT_VERSION, Artifact, Job, Measurement, Reference, Row, digest
from workbench.serving.address import Address
from workbench.serving.client import Dialect

ENDPOINT = "endpoint"
"""Method and engine of a server that no recipe started."""
NO_RECIPE = "no quality: name the recipe whose text it is to be scored on, `workbench profile RECIPE --endpoint URL`"


@dataclass(frozen=True)
class Beside:
    """A recipe, and what of it a server is measured with."""

    recipe: Recipe
    made: Made
    references: dict[str, Reference] | None = None
    reference: str | None = None
    """The key of what the divergence is measured from."""
    variant: str | None = None
    """Which of its variants the server serves."""
    name: str = ""
    """What the recipe calls the server; empty if it does not name it."""
    options: Mapping[str, object] = field(default_factory=dict)
    """What else its row tells."""
    place: int = 0

    def artifact(self, model: str) -> Artifact:
        """What is served: the variant's first file, or by a name alone."""
        found = self.made.artifacts.get(self.variant or "", [])
        return found[0] if found else served_as(self.variant or self.name or model)

    def key(self, row: Row) -> str:
        """The digest of all that determines a row; what a server runs is not known, only where it is."""
        tests = [each.digest for each in row.evaluations.values()] + [each.digest for each in row.tasks.values()]
        causes = [row.base, row.artifact.variant, row.artifact.digest, row.options, row.workload, tests]
        return digest([*causes, self.reference, MEASUREMENT_VERSION])


def served_as(name: str) -> Artifact:
    """An artifact of which nothing is known but its name."""
    return Artifact(variant=name, method=ENDPOINT, format="", path="", digest="", disk_bytes=0, parameters=0)


def quality(
    beside: Beside | None, row: Row, address: Address, dialect: Dialect, key_variable: str | None, show: Show
) -> Measurement:
    """What the server says of the texts and tasks of a recipe's row, and why it does not say more."""
    if beside is None:
        return Measurement(ENDPOINT, warnings=[NO_RECIPE])
    if not row.evaluations and not row.tasks:
        return Measurement(ENDPOINT)
    options: dict[str, Any] = {"url": address.url, "model": dialect.model, "api": dialect.api}
    job = Job(
        base=row.base,
        artifact=row.artifact,
        backend=ENDPOINT,
        options=options | {"api_key_env": key_variable},
        workload=row.workload,
        evaluations=row.evaluations,
        references={name: each.path for name, each in (beside.references or {}).items()},
        base_digest=beside.made.base.digest,
        tasks=row.tasks,
    )
    # The key goes by the worker's environment alone: its request is a file.
    key = {key_variable: address.key} if key_variable else {}
    try:
        found, _ = work(
            "workbench.worker.measure.job:score",
            job,
            Measurement,
            show,
            f"{row.artifact.variant} at {address.url}: quality",
            python=interpreter(REFERENCE_MAKER, sys.executable),
            limit_s=beside.recipe.limits.profile_s,
            environment=environment_of(REFERENCE_MAKER, {}) | key,
        )
        return found
    except (UserError, WorkFailed) as problem:
        return Measurement(ENDPOINT, warnings=[f"no quality: {address.without_key(str(problem))}"])
