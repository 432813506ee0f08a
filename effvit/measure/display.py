"""Measured rows as a table for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from effvit.measure.compare import OK, Row
from effvit.measure.memory import MIB


def print_rows(title: str, rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Print ``keys`` of each row, then its median with quartiles, that of ``fused`` and their ratio, or its status.

    Ratios of rows that say that they are ``contended`` have a star.
    """
    note = "* while other programs ran" if any(row.get("contended") for row in rows) else None
    table = Table(title=title, caption=note)
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


def remark_on_launches(rows: Sequence[Row]) -> str | None:
    """One line where a GPU waited for the host at some points; None where at none."""
    bound = sum(bool(row["launch_bound"]) for row in rows)
    if not bound:
        return None
    return (
        f"{bound} of {len(rows)} points are launch-bound: their time is that of launching, not of computing; "
        "take larger batches or --execution graphs, in the study -S measure=gpu"
    )


def print_choice(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of `effvit.measure.choose.measure_choice`: time, ratio with interval, memory and cost of each."""
    busy = "; * other processes were running" if any(row["contended"] for row in rows) else ""
    table = Table(title=title, caption=f"ratio: time / fused's, with its 95 % interval; block: attention alone{busy}")
    table.add_column("px", justify="right")
    table.add_column("mechanism", no_wrap=True)
    for heading in ("ms", "ratio", "MiB", "block", "GMACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    blocks = {(row["image_size"], row["attention"]): row for row in rows if row["scope"] == "block"}
    last = None
    for row in (row for row in rows if row["scope"] == "model"):
        if last not in (None, row["image_size"]):
            table.add_section()
        last = row["image_size"]
        memory = row["memory_bytes"]
        table.add_row(
            str(row["image_size"]),
            str(row["attention"]),
            f"{row['median']:.3g}" if row["status"] == OK else str(row["status"]),
            _ratio(row),
            "" if memory is None else f"{memory / MIB:.3g}",
            _ratio(blocks[row["image_size"], row["attention"]], interval=False),
            "" if row["macs"] is None else f"{row['macs'] / 1e9:.3g}",
        )
    Console().print(table)


def _ratio(row: dict[str, Any], interval: bool = True) -> str:
    if row["ratio_to_fused"] is None:
        return ""
    star = "*" if row["contended"] else ""
    if not interval or row["ratio_low"] is None:
        return f"{row['ratio_to_fused']:.2f}{star}"
    return f"{row['ratio_to_fused']:.2f} ({row['ratio_low']:.2f}-{row['ratio_high']:.2f}){star}"
