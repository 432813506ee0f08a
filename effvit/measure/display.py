"""Measured rows as a table for the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from effvit.measure.compare import OK, Row
from effvit.measure.memory import MIB


def print_rows(title: str, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Print ``keys`` of each row, then its median with quartiles, that of ``fused`` and their ratio, or its status.

    Ratios of rows that say that they are ``contended`` have a star.
    """
    beside = "* beside other work on this machine" if any(row.get("contended") for row in rows) else None
    table = Table(title=title, caption=beside)
    for key in keys:
        table.add_column(key.replace("_", " "), justify="right" if key in ("tokens", "batch_size") else "left")
    for name in ("median", "quartiles", "fused", "ratio", "unit"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    for row in rows:
        table.add_row(*("" if row[key] is None else str(row[key]).replace("_", " ") for key in keys), *_numbers(row))
    Console().print(table)


def _numbers(row: Row) -> tuple[str, ...]:
    if row["status"] != OK:
        return str(row["status"]), "", "", "", ""
    in_bytes = row["unit"] == "bytes"
    median, q25, q75, fused, ratio = (
        _number(row[key], in_bytes and key != "ratio_to_fused")
        for key in ("median", "q25", "q75", "fused_median", "ratio_to_fused")
    )
    ratio += "*" if row.get("contended") else ""
    return median, "" if row["n"] == 1 else f"{q25} – {q75}", fused, ratio, "MiB" if in_bytes else str(row["unit"])


def _number(value: object, in_bytes: bool) -> str:
    if not isinstance(value, float):
        return ""
    value = value / MIB if in_bytes else value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
