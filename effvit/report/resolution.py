"""How the gains change with sequence length: ratios at the ends, efficiency lengths, slopes."""

from collections.abc import Iterator
from math import isfinite
from typing import Any

import pandas as pd

from effvit.report import wording as w
from effvit.report.compare import cost_verdicts
from effvit.report.tables import Study, records

PASSES = {"forward": "the forward pass", "train": "a training step"}
QUANTITIES = {"time": "time", "memory": "peak memory"}


def resolution(study: Study) -> Iterator[str]:
    """One attention block over sequence length, one sample at a time."""
    rows = one_block(study.scaling)
    if "fused" not in set(rows["attention"]) or rows["attention"].nunique() == 1:
        yield "There is no comparison: this needs Fused and at least one other mechanism among those selected."
        return
    forward = rows[(rows["mode"] == "forward") & (rows["quantity"] == "time")].dropna(subset=["ratio_to_fused"])
    done = forward.loc[forward["attention"] != "fused", "tokens"]
    if done.empty:
        yield "No time could be measured beside Fused at any length."
    else:
        ends = [_at(forward, int(tokens)) for tokens in sorted({done.min(), done.max()})]
        yield f"In the forward pass of one block: {'; '.join(ends)}."
    yield from _efficiency(study)
    yield from _stopped(rows)


def one_block(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of one attention block with one sample, or of whatever is there in its place."""
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
    listed = w.several(f"{w.name(row['attention'])} ({w.times(row['ratio_to_fused'])})" for row in found)
    return f"at {tokens:,} tokens {listed} {verb} faster than Fused"


def _efficiency(study: Study) -> Iterator[str]:
    table = one_block(study.efficiency)
    if table.empty:
        yield "From which length on each mechanism pays off was not computed."
        return
    shortest = study.scaling["tokens"].min()
    for quantity, noun in QUANTITIES.items():
        for mode, text in PASSES.items():
            rows = table[(table["quantity"] == quantity) & (table["mode"] == mode) & (table["attention"] != "fused")]
            if rows.empty:
                continue
            pays = rows.dropna(subset=["length"]).sort_values("length", kind="stable")
            listed = [_length(row, shortest) for row in records(pays)]
            never = rows[rows["length"].isna() & rows["measured_to"].notna()]
            parts = [f"{w.several(listed)}"] if listed else []
            if len(never):
                end = int(never["measured_to"].max())
                parts.append(f"never up to {end:,} tokens: {w.names(list(never['attention']))}")
            if parts:
                yield f"Less {noun} than Fused in {text}: {'; '.join(parts)}."
    slopes = table[(table["quantity"] == "time") & (table["mode"] == "forward")].dropna(subset=["slope"])
    if len(slopes):
        listed = [f"{row['slope']:.1f} for {w.name(row['attention'])}" for row in records(slopes)]
        yield f"The time of the forward pass grows as a power of the length: {w.several(listed)}."


def _length(row: dict[str, Any], shortest: int) -> str:
    label = w.name(row["attention"])
    if row["length"] <= shortest:
        return f"{label} at every length"
    low, high = row["length_low"], row["length_high"]
    interval = f" ({w.about(low)} to {w.about(high)})" if isfinite(low) and isfinite(high) else ""
    return f"{label} from about {w.about(row['length'])} tokens{interval}"


def _stopped(rows: pd.DataFrame) -> Iterator[str]:
    stopped = rows[(rows["status"] != "ok") & (rows["quantity"] == "time")].sort_values("tokens", kind="stable")
    for first in records(stopped.drop_duplicates(["attention", "mode"])):
        yield (
            f"{w.name(first['attention'])} was stopped in {PASSES.get(first['mode'], first['mode'])} at "
            f"{first['tokens']:,} tokens: {first['status']}."
        )
