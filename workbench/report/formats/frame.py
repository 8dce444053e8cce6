"""A table as a pandas data frame: the columns of CSV, numbers as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.errors import importing
from workbench.report.formats.data import flattened, objects
from workbench.report.formats.parquet import is_number

if TYPE_CHECKING:
    import pandas

    from workbench.report.table import Table


def data_frame(table: Table) -> pandas.DataFrame:
    """A row a line of the table, SI units, NaN where not measured. Raises `UserError` if pandas is not installed."""
    with importing("pandas", 'pip install "quant-workbench[pandas]"'):
        import pandas
    frame = pandas.DataFrame([flattened(record) for record in objects(table)])
    # A column in which nothing was measured yet is still one of numbers.
    return frame.astype({name: "float64" for name in frame if is_number(name)})
