"""The templates beside this file, filled by jinja2.

Autoescape is on: whatever came out of a recipe, an engine or a file is text, in elements and in quoted attributes.
Plots are not templates: `charts.py` draws them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from workbench.report.metrics import METRICS
from workbench.report.site import svg
from workbench.report.site.words import engine_word
from workbench.report.units import amount, printable
from workbench.report.verdicts.steps import by_cause


def fill(name: str, **values: object) -> str:
    """A template as text; raises `jinja2.UndefinedError` where it asks for a value that it was not given."""
    return _renderer(name)(**values)


@functools.cache
def _renderer(name: str) -> Callable[..., str]:
    import jinja2  # 50 ms, which a table on a terminal need not wait for

    found = jinja2.Environment(
        loader=jinja2.PackageLoader("workbench.report", "site"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What is no longer plain text, jinja2's Markup, is of templates and comes from here.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    found.filters |= {"amount": amount, "engine": engine_word, "by_cause": by_cause, "of": lambda tell, row: tell(row)}
    found.globals |= {"metrics": METRICS, "svg": svg}
    return found.get_template(name).render
