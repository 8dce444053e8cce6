"""README's table out of the published rows; `python -m tests.readme` writes it."""

from __future__ import annotations

from tests.places import ROOT
from workbench.report import store
from workbench.report.formats import FORMATS
from workbench.report.table import build

README = ROOT / "README.md"
ROWS = ROOT / "results" / "amd-epyc-2-cores-24-gib-8c14f5"
BEGIN, END = "<!-- table -->\n", "\n(`make demo` prints this"


def with_table(text: str) -> str:
    """The text with the table of the default recipe between its marks."""
    before, _, rest = text.partition(BEGIN)
    rows, _ = store.read(ROWS)
    return before + BEGIN + FORMATS["markdown"](build(rows, recipe="smollm2-135m")) + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
