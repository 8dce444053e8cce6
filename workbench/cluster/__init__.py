"""One recipe over many machines: its steps, who takes which when, and what a machine does of one.

`steps` cuts a recipe into steps, `schedule` says which machine takes which next, `node` does a step on the machine it
came to, `on_ray` carries steps to the machines of a Ray cluster and is the only module that imports Ray, `view` shows
how far all is, `run` puts them together for the command line.
"""

from __future__ import annotations

from collections.abc import Sequence

from workbench.errors import UserError


def check_machines(on: object, machines: Sequence[str]) -> None:
    """Raises `UserError` for names of machines where nothing runs on a cluster (`on`: None): this one would measure."""
    if machines and on is None:
        raise UserError(f"machines ({', '.join(machines)}) are a cluster's, and this is no run on one: add --on ray")
