"""Rows for other programs' data frames: one Parquet file that pandas, Polars and DuckDB read as it is.

Unlike a printed table it holds all machines, recipes and evaluations, each row with the deltas it has in its own
table, since a query chooses for itself what to put side by side. Rejected: a database file (this one is read by
every database), pandas to write it (pyarrow alone is enough).
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from workbench.errors import importing
from workbench.records import Row
from workbench.report.formats.data import flattened, objects
from workbench.report.metrics import METRICS
from workbench.report.selection import evaluation_digest
from workbench.report.store import machine_of
from workbench.report.table import build

NUMBERS = ("_se", "_delta", "_s", "_bytes", "_low", "_high", "_median", "_accuracy")


def parquet(rows: Sequence[Row]) -> bytes:
    """A Parquet file of `records(rows)`. Raises `UserError` if pyarrow is not installed."""
    with importing("pyarrow, which writes Parquet,", 'pip install "quant-workbench[parquet]"'):
        import pyarrow
        import pyarrow.parquet
    found = records(rows)
    columns = dict.fromkeys(name for record in found for name in record)

    def kind_of(name: str) -> pyarrow.DataType:
        kinds = {type(value) for record in found if (value := record.get(name)) is not None}
        if kinds == {list}:
            return pyarrow.list_(pyarrow.string())
        if is_number(name) or kinds == {float} or kinds == {int, float}:
            return pyarrow.float64()
        if kinds == {bool} or name.endswith("below_noise_floor"):
            return pyarrow.bool_()
        return pyarrow.int64() if kinds == {int} else pyarrow.string()

    # Explicit types: a column in which nothing was measured yet is still one of numbers.
    kinds = {name: kind_of(name) for name in columns}
    # An option of several engines may be a word in one and a number in another.
    words = [name for name, kind in kinds.items() if kind == pyarrow.string()]
    texts = [r | {name: str(r[name]) for name in words if r.get(name) is not None} for r in found]
    whole = pyarrow.Table.from_pylist(texts, schema=pyarrow.schema(list(kinds.items())))
    file = io.BytesIO()
    pyarrow.parquet.write_table(whole, file, compression="zstd")
    return file.getvalue()


def is_number(name: str) -> bool:
    """Whether a column, or a key of a mapping in one, holds numbers that need not be whole."""
    last = name.rpartition(".")[2]
    return not name.startswith(("options.", "settings.")) and (last in METRICS or f"_{last}".endswith(NUMBERS))


def records(rows: Sequence[Row]) -> list[dict[str, object]]:
    """`table.objects` of every table that the rows make, with the versions and the commit of each row.

    Superseded measurements are left out, as in a table; columns are `data.flattened`'s, lists of texts stay lists.
    """
    found: dict[tuple[object, object], dict[str, object]] = {}
    for group in _comparable(rows):
        versions: dict[tuple[object, object], dict[str, str]] = {
            (machine_of(row), row.key): row.versions for row in group
        }
        for record in objects(build(group)):
            name = (record["machine"], record["key"])
            lists = {k: v for k, v in record.items() if isinstance(v, list) and not k.endswith("_ci")}
            flat = flattened(record) | lists
            own = versions[name]
            flat["commit"] = own.get("commit")
            flat["versions"] = ", ".join(f"{k} {v}" for k, v in own.items() if k != "commit")
            found.setdefault(name, flat)
    return list(found.values())


def _comparable(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by what may stand in one table; those that were to be scored on nothing go with each of their base."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((machine_of(row), row.measurement_version, evaluation_digest(row)), []).append(row)
    whole = []
    for (machine, version, evaluation), group in groups.items():
        bases = {row.base for row in group}
        bare = groups.get((machine, version, ""), []) if evaluation else []
        # The scored ones decide which evaluation the table is of.
        whole.append(group + [row for row in bare if row.base in bases])
    return whole
