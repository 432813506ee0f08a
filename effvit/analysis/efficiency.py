"""How each mechanism's cost grows, from which length it is below that of ``fused``, and what its MACs foretell."""

from typing import Any

import numpy as np
import pandas as pd

from effvit.analysis.crossover import efficiency_length, slope_interval

CASE = ["scope", "batch", "mode", "quantity"]
_SPAN = 16  # the slope is that of the points within this factor of the longest one


def efficiency(scaling: pd.DataFrame) -> pd.DataFrame:
    """Efficiency lengths and log-log slopes, one row per mechanism and case of a table as `aggregate` writes it.

    Columns, beside the mechanism and `CASE`: `length`, `length_low`, `length_high` in tokens (see `lengths`);
    `slope`, `slope_low`, `slope_high` (see `slope_interval`); `macs_slope`, of the same points;
    `predicted_length`, where MACs fall below those of `fused`, between the same points; `measured_from` and
    `measured_to`; and `contended`, whether any point was measured beside other work. MACs say nothing of memory.
    """
    rows = []
    for case, table in scaling.groupby(CASE, sort=False):
        fused = table[table["attention"] == "fused"]
        for attention, mine in table.groupby("attention", sort=False):
            row = {"attention": attention} | dict(zip(CASE, case, strict=True))
            rows.append(row | _row(mine.sort_values("tokens"), fused))
    order = {name: i for i, name in enumerate(pd.unique(scaling["attention"]))}
    return pd.DataFrame(rows).sort_values("attention", key=lambda names: names.map(order), kind="stable")


def lengths(mine: pd.DataFrame, fused: pd.DataFrame) -> dict[str, float | None]:
    """Efficiency length of one mechanism in one case, its interval, and between which lengths it was looked for.

    The ratio to `fused` of each interleaved run decides. Whichever was stopped alone is the dearer; but in memory only
    if it ran out of that. The ends are where the ends of the ratio's interval cross one, hence None where even the last
    point does not exclude a ratio of one. All are None for `fused` itself.

    Args:
        mine: rows of the mechanism, one per token count.
        fused: rows of `fused` in the same case; empty where it is not of the comparison.

    Returns:
        `length`, `length_low`, `length_high`, `measured_from`, `measured_to`; the latter two are of points where the
        mechanism ran and can be compared.
    """
    mine = mine.sort_values("tokens")
    done = mine["status"].eq("ok")
    if mine["attention"].eq("fused").all():
        return dict.fromkeys(("length", "length_low", "length_high")) | _ends(mine["tokens"][done])
    fused_status = mine["tokens"].map(fused.set_index("tokens")["status"])
    fused_stopped = done & mine["ratio_to_fused"].isna()
    stopped = ~done & fused_status.eq("ok")
    if mine["quantity"].eq("memory").all():
        fused_stopped &= fused_status.eq("out of memory")
        stopped &= mine["status"].eq("out of memory")
    baseline = pd.Series(1.0, mine.index).mask(fused_stopped, np.inf)
    known = mine["ratio_to_fused"].notna() | fused_stopped | stopped
    found: dict[str, float | None] = {}
    ends = {"length": "ratio_to_fused", "length_low": "ratio_low", "length_high": "ratio_high"}
    for name, column in ends.items():
        cost = mine[column].fillna(mine["ratio_to_fused"]).mask(stopped, np.inf).mask(fused_stopped, 1.0)
        points = mine["tokens"][known], cost[known], baseline[known]
        found[name] = efficiency_length(*points) if known.any() else None
    return found | _ends(mine["tokens"][done & known])


def _ends(tokens: "pd.Series[int]") -> dict[str, float | None]:
    first, last = (float(tokens.min()), float(tokens.max())) if len(tokens) else (None, None)
    return {"measured_from": first, "measured_to": last}


def _row(mine: pd.DataFrame, fused: pd.DataFrame) -> dict[str, Any]:
    done = mine[mine["status"] == "ok"]
    row: dict[str, Any] = lengths(mine, fused)
    row |= dict.fromkeys(("slope", "slope_low", "slope_high", "macs_slope", "predicted_length"))
    long = done[done["tokens"] * _SPAN >= done["tokens"].max()]
    timed = (mine["quantity"] == "time").all()
    if len(long) > 1:
        row["slope"], row["slope_low"], row["slope_high"] = slope_interval(long["tokens"], long["median"])
        if timed:
            row["macs_slope"] = slope_interval(long["tokens"], long["macs"].astype(float))[0]
    if timed and not (mine["attention"] == "fused").all():
        known = mine.dropna(subset=["macs", "fused_macs"]).astype({"macs": float, "fused_macs": float})
        row["predicted_length"] = efficiency_length(known["tokens"], known["macs"], known["fused_macs"])
    return row | {"contended": bool(done["contended"].any())}
