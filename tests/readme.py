"""README's table out of the published rows; `python -m tests.readme` writes it."""

from __future__ import annotations

from dataclasses import replace

from tests.places import ROOT
from workbench.recipe.load import load
from workbench.records import Row
from workbench.report import store
from workbench.report.formats import FORMATS
from workbench.report.table import build

README = ROOT / "README.md"
ROWS = ROOT / "results" / "amd-epyc-2-cores-24-gib"
RECIPE = load(ROOT / "recipes" / "smollm2-135m.yaml")
BEGIN, END = "<!-- table -->\n", "\n(`make demo` prints this"


def _of_recipe(row: Row) -> bool:
    """Whether the default recipe runs this pair: the full recipe's rows have its pairs and more."""
    return any(
        choice.name == row.backend
        and choice.takes(row.artifact.variant)
        and choice.options.items() <= row.options.items()
        for choice in RECIPE.backends
    )


def with_table(text: str) -> str:
    """The text with the table of the default recipe between its marks."""
    before, _, rest = text.partition(BEGIN)
    rows = [replace(row, recipe=RECIPE.name) for row in store.read(ROWS)[0] if _of_recipe(row)]
    return before + BEGIN + FORMATS["markdown"](build(rows, recipe=RECIPE.name)) + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
