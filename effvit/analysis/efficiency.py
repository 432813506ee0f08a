"""How each mechanism's cost grows, from which length it is below that of ``fused``, and what its MACs predict."""

from typing import Any

import numpy as np
import pandas as pd

from effvit.analysis.crossover import efficiency_length, slope_interval

CASE = ["scope", "batch", "mode", "quantity"]
_LENGTHS = {"length": "ratio_to_fused", "length_low": "ratio_low", "length_high": "ratio_high"}
_SPAN = 16  # the slope is that of the points within this factor of the longest one


def efficiency(scaling: pd.DataFrame) -> pd.DataFrame:
    """Efficiency lengths and log-log slopes, one row per mechanism and case of a table as `aggregate` writes it.

    Columns after the mechanism and `CASE`: `length`, `length_low`, `length_high`, `cheaper_from`, `cheaper_to`,
    `measured_from` and `measured_to` in tokens (see `lengths`); `slope`, `slope_low`, `slope_high` (see
    `slope_interval`), of the points from `slope_from` to `slope_to`; `macs_slope`, of the same points;
    `predicted_length`, where MACs fall below those of `fused`, between the same points; and `contended`, whether any
    point was measured while other programs ran. MACs say nothing of memory.
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

    The ratio to `fused` of each interleaved run decides. One stopped alone counts as more expensive; in memory only
    if it ran out of that. The ends are where the ends of the ratio's interval cross one, hence None where even the last
    point does not exclude a ratio of one. All are None for `fused` itself.

    A mechanism without a length may still be cheaper, and more expensive again at the longest point: `cheaper_from` and
    `cheaper_to` are the ends of the last stretch of points at which its ratio's interval lies below one.

    Args:
        mine: rows of the mechanism, one per token count.
        fused: rows of `fused` in the same case; empty where it is not of the comparison.

    Returns:
        `length`, `length_low`, `length_high`; `cheaper_from` and `cheaper_to`, None where there is a length or no such
        stretch; `measured_from` and `measured_to`, of points where the mechanism ran and can be compared.
    """
    nothing: dict[str, float | None] = dict.fromkeys((*_LENGTHS, "cheaper_from", "cheaper_to"))
    mine = mine.sort_values("tokens")
    done = mine["status"].eq("ok")
    if mine["attention"].eq("fused").all():
        return nothing | _ends(mine["tokens"][done])
    fused_status = mine["tokens"].map(fused.set_index("tokens")["status"])
    fused_stopped = done & mine["ratio_to_fused"].isna()
    stopped = ~done & fused_status.eq("ok")
    if mine["quantity"].eq("memory").all():
        fused_stopped &= fused_status.eq("out of memory")
        stopped &= mine["status"].eq("out of memory")
    baseline = pd.Series(1.0, mine.index).mask(fused_stopped, np.inf)
    known = mine["ratio_to_fused"].notna() | fused_stopped | stopped
    if not known.any():
        return nothing | _ends(mine["tokens"][done & known])
    tokens = mine["tokens"][known]
    costs = {
        name: mine[column].fillna(mine["ratio_to_fused"]).mask(stopped, np.inf).mask(fused_stopped, 1.0)[known]
        for name, column in _LENGTHS.items()
    }
    found = nothing | {name: efficiency_length(tokens, cost, baseline[known]) for name, cost in costs.items()}
    shown = costs["length_high"] < baseline[known]
    if found["length"] is None and shown.any():
        stretch = (shown != shown.shift()).cumsum()
        found |= _ends(tokens[stretch == stretch[shown].max()], "cheaper")
    return found | _ends(mine["tokens"][done & known])


def _ends(tokens: "pd.Series[int]", what: str = "measured") -> dict[str, float | None]:
    first, last = (float(tokens.min()), float(tokens.max())) if len(tokens) else (None, None)
    return {f"{what}_from": first, f"{what}_to": last}


def _row(mine: pd.DataFrame, fused: pd.DataFrame) -> dict[str, Any]:
    done = mine[mine["status"] == "ok"]
    row: dict[str, Any] = lengths(mine, fused)
    row |= dict.fromkeys(("slope", "slope_low", "slope_high", "slope_from", "slope_to", "macs_slope"))
    row["predicted_length"] = None
    long = done[done["tokens"] * _SPAN >= done["tokens"].max()]
    timed = (mine["quantity"] == "time").all()
    if len(long) > 1:
        row["slope"], row["slope_low"], row["slope_high"] = slope_interval(long["tokens"], long["median"])
        row |= _ends(long["tokens"], "slope")
        if timed:
            row["macs_slope"] = slope_interval(long["tokens"], long["macs"].astype(float))[0]
    if timed and not (mine["attention"] == "fused").all():
        known = mine.dropna(subset=["macs", "fused_macs"]).astype({"macs": float, "fused_macs": float})
        row["predicted_length"] = efficiency_length(known["tokens"], known["macs"], known["fused_macs"])
    return row | {"contended": bool(done["contended"].any())}
