"""How the gains change with sequence length: ratios at the ends, efficiency lengths, slopes."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import NO_COMPARISON, cost_verdicts
from effvit.report.tables import Study, records

PASSES = {"forward": "the forward pass", "train": "a training step"}
QUANTITIES = {"time": "time", "memory": "peak memory"}
HOW_LENGTHS_ARE_KNOWN = (
    "Lengths are interpolated between measured ones; their intervals cover timing noise within one run only"
)


def resolution(study: Study) -> Iterator[str]:
    """One attention block over sequence length, one sample at a time."""
    rows = one_block(study.scaling)
    if "fused" not in set(rows["attention"]) or rows["attention"].nunique() == 1:
        yield NO_COMPARISON
        return
    forward = rows[(rows["mode"] == "forward") & (rows["quantity"] == "time")].dropna(subset=["ratio_to_fused"])
    done = forward.loc[forward["attention"] != "fused", "tokens"]
    if done.empty:
        yield "No time relative to Fused could be measured at any length."
    else:
        ends = [_at(forward, int(tokens)) for tokens in sorted({done.min(), done.max()})]
        yield f"In the forward pass of one block {w.measured_on(records(forward))}: {'; '.join(ends)}."
    yield from _efficiency(study)
    yield from _contended(rows)
    yield from _stopped(rows)


def one_block(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of one attention block with one sample, or of what is there instead."""
    for column, wanted in (("scope", "block"), ("batch", "one")):
        if wanted in set(table[column]):
            table = table[table[column] == wanted]
        elif len(table):
            table = table[table[column] == table[column].iloc[0]]
    return table


def _at(forward: pd.DataFrame, tokens: int) -> str:
    rows = forward[forward["tokens"] == tokens].sort_values("ratio_to_fused", kind="stable")
    verdicts = cost_verdicts(rows)
    found = [row for row in records(rows) if verdicts.get(row["attention"]) == "cheaper"]
    if not found:
        return f"at {tokens:,} tokens none is shown to be faster than Fused"
    verb = "is" if len(found) == 1 else "are"
    listed = w.ranked(f"{w.name(row['attention'])} ({w.times(row['ratio_to_fused'])})" for row in found)
    return f"at {tokens:,} tokens {listed} {verb} faster than Fused"


def _efficiency(study: Study) -> Iterator[str]:
    table = one_block(study.efficiency)
    if table.empty:
        yield "Efficiency lengths were not computed."
        return
    shortest = int(study.scaling["tokens"].min())
    for quantity, noun in QUANTITIES.items():
        for mode, text in PASSES.items():
            rows = table[(table["quantity"] == quantity) & (table["mode"] == mode) & (table["attention"] != "fused")]
            if len(rows):
                yield f"Less {noun} than Fused in {text}: {'; '.join(_pays(rows, shortest))}."
    measured = w.several(f"{tokens:,}" for tokens in sorted(one_block(study.scaling)["tokens"].unique()))
    yield f"{HOW_LENGTHS_ARE_KNOWN}. Measured: {measured} tokens."
    yield from _slopes(table[(table["quantity"] == "time") & (table["mode"] == "forward")])


def _pays(rows: pd.DataFrame, shortest: int) -> Iterator[str]:
    pays = rows.dropna(subset=["length"]).sort_values("length", kind="stable")
    if len(pays):
        yield w.ranked(_length(row, shortest) for row in records(pays))
    rest = rows[rows["length"].isna()]
    for row in records(rest.dropna(subset=["cheaper_to"])):
        first, last, end = (int(row[key]) for key in ("cheaper_from", "cheaper_to", "measured_to"))
        where = f"from {first:,} to {last:,} tokens" if first < last else f"at {last:,} tokens"
        beyond = f"not at {end:,}" if last < end else "but stopped beyond"
        yield f"{w.name(row['attention'])} {where}, {beyond}"
    rest = rest[rest["cheaper_to"].isna()]
    for longest, never in rest.groupby("measured_to", sort=False):
        yield f"never up to {longest:,.0f} tokens: {w.names(list(never['attention']))}"
    if len(unknown := rest[rest["measured_to"].isna()]):
        yield f"not measured: {w.names(list(unknown['attention']))}"


def _length(row: dict[str, Any], shortest: int) -> str:
    about = "at every length" if row["length"] <= shortest else f"from about {w.about(row['length'])} tokens"
    return f"{w.name(row['attention'])} {about}{length_interval(row, shortest)}"


def length_text(length: float, shortest: int) -> str:
    """A length at or below the shortest measured one is written as such: its value is unknown."""
    return f"≤{w.SPACE}{shortest:,}" if length <= shortest else w.about(length)


def length_interval(row: dict[str, Any], shortest: int) -> str:
    """The interval of an efficiency length in brackets; empty if it is the length itself, as for memory."""
    low, high = row["length_low"], row["length_high"]
    if not isfinite(low):
        return ""
    ends = (
        length_text(low, shortest),
        length_text(high, shortest) if isfinite(high) else f">{w.SPACE}{row['measured_to']:,.0f}",
    )
    return "" if ends[0] == ends[1] else f" ({ends[0]} to {ends[1]})"


def _slopes(rows: pd.DataFrame) -> Iterator[str]:
    parts = []
    for (first, last), group in rows.dropna(subset=["slope"]).groupby(["slope_from", "slope_to"], sort=False):
        if len(group) > w.FEW:
            group = group.sort_values("slope", kind="stable")
        listed = w.ranked(f"{slope(row, 1)} for {w.name(row['attention'])}" for row in records(group))
        parts.append(f"from {first:,.0f} to {last:,.0f} tokens {listed}")
    if parts:
        yield f"The time of the forward pass grows as a power of the length: {'; '.join(parts)}."


def slope(row: dict[str, Any], digits: int) -> str:
    """An exponent with its interval; two points have none."""
    low, high = row["slope_low"], row["slope_high"]
    interval = f" ({low:.{digits}f} to {high:.{digits}f})" if isfinite(low) and isfinite(high) else ""
    return f"{row['slope']:.{digits}f}{interval}".replace("-", w.MINUS)


def _contended(rows: pd.DataFrame) -> Iterator[str]:
    timed = rows[(rows["quantity"] == "time") & (rows["status"] == "ok")]
    if contended := int(timed["contended"].sum()):
        yield f"Do not trust {contended} of the {len(timed)} times here: other programs were running."


def _stopped(rows: pd.DataFrame) -> Iterator[str]:
    stopped = rows[(rows["status"] != "ok") & (rows["quantity"] == "time")].sort_values("tokens", kind="stable")
    for first in records(stopped.drop_duplicates(["attention", "mode"])):
        yield (
            f"{w.name(first['attention'])} was stopped in {PASSES.get(first['mode'], first['mode'])} at "
            f"{first['tokens']:,} tokens: {first['status']}."
        )
