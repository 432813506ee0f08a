"""How the gains change with sequence length: ratios at the ends, efficiency lengths, slopes."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import NO_COMPARISON, faster
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
    measured = w.several(f"{tokens:,}" for tokens in sorted(rows["tokens"].unique()))
    yield f"{HOW_LENGTHS_ARE_KNOWN}. Measured: {measured} tokens."
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
    found = faster(forward[forward["tokens"] == tokens])
    if not found:
        return f"at {tokens:,} tokens none is faster than Fused by a tenth or more"
    # And those that are as fast as the first, for all we know.
    most = [found[0], *(row for row in found[1:] if row["ratio_low"] <= found[0]["ratio_high"])]
    fastest = w.several(f"{w.name(row['attention'])} ({w.times(row['ratio_to_fused'])})" for row in most)
    if len(found) == 1:
        return f"at {tokens:,} tokens {fastest} is faster than Fused"
    return f"at {tokens:,} tokens {len(found)} mechanisms are faster than Fused, {fastest} most"


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


def slope(row: dict[str, Any], digits: int) -> str:
    """An exponent with its interval; a dash where that is wider than from linear to quadratic, or is not known."""
    low, high = row["slope_low"], row["slope_high"]
    if not high - low <= 1:
        return "–"
    return f"{row['slope']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})".replace("-", w.MINUS)


def _contended(rows: pd.DataFrame) -> Iterator[str]:
    timed = rows[(rows["quantity"] == "time") & (rows["status"] == "ok")]
    if contended := int(timed["contended"].sum()):
        yield f"Do not trust {contended} of the {len(timed)} times here: other programs were running."


def _stopped(rows: pd.DataFrame) -> Iterator[str]:
    stopped = rows[(rows["status"] != "ok") & (rows["quantity"] == "time")].sort_values("tokens", kind="stable")
    told = [
        f"{w.name(first['attention'])} in {PASSES.get(first['mode'], first['mode'])} at {first['tokens']:,} tokens "
        f"({'over the time budget' if first['status'] == 'over budget' else first['status']})"
        for first in records(stopped.drop_duplicates(["attention", "mode"]))
    ]
    if told:
        yield f"Stopped: {'; '.join(told)}."
