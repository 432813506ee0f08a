"""Interactive charts as Vega-Lite specifications: the mechanisms in the signal `hidden` are left out."""

from dataclasses import dataclass
from math import isfinite
from typing import Any

import pandas as pd

from effvit.figures.style import look
from effvit.report import wording as w
from effvit.report.compare import at_largest_batch
from effvit.report.resolution import PASSES, QUANTITIES
from effvit.report.tables import Study, records

VEGA_LITE = "6.4"  # the version that the page's library and the schema below are of
SHAPES = {  # the markers of matplotlib as SVG paths from -1 to 1
    "o": "M-1,0A1,1,0,1,0,1,0A1,1,0,1,0,-1,0Z",
    "s": "M-0.9,-0.9L0.9,-0.9L0.9,0.9L-0.9,0.9Z",
    "^": "M0,-1L1,0.9L-1,0.9Z",
    "v": "M0,1L1,-0.9L-1,-0.9Z",
    "<": "M-1,0L0.9,-1L0.9,1Z",
    ">": "M1,0L-0.9,-1L-0.9,1Z",
    "D": "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",
    "P": "M-0.4,-1L0.4,-1L0.4,-0.4L1,-0.4L1,0.4L0.4,0.4L0.4,1L-0.4,1L-0.4,0.4L-1,0.4L-1,-0.4L-0.4,-0.4Z",
    "X": "M0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0L-1,-0.5L-0.5,-1Z",
    "*": "M0,-1L0.29,-0.4L0.95,-0.31L0.47,0.15L0.59,0.81L0,0.5L-0.59,0.81L-0.47,0.15L-0.95,-0.31L-0.29,-0.4Z",
    "h": "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z",
    "H": "M-1,0L-0.5,-0.87L0.5,-0.87L1,0L0.5,0.87L-0.5,0.87Z",
    "p": "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",
    "d": "M0,-1.1L0.66,0L0,1.1L-0.66,0Z",
    "8": "M-0.41,-1L0.41,-1L1,-0.41L1,0.41L0.41,1L-0.41,1L-1,0.41L-1,-0.41Z",
}
_MIB = 2**20
_BY_SEED = "Bars: 95\N{NO-BREAK SPACE}% interval over seeds. For latency: interval of the ratio."
_BY_IMAGE = (
    "Bars: 95\N{NO-BREAK SPACE}% interval of each trained model over test images (Wilson), with one seed; "
    "it does not include seed-to-seed variation. For latency: interval of the ratio."
)
_TITLE = {"anchor": "start", "fontSize": 12, "fontWeight": "normal"}
_ORDER = ["block", "model", "one", "tokens", *QUANTITIES, *PASSES]


@dataclass(frozen=True)
class Chart:
    """One place on the page with a choice of specifications by their label."""

    id: str
    title: str
    choose: str
    specs: dict[str, dict[str, Any]]
    note: str = ""


def tradeoff(study: Study, dataset: str) -> Chart:
    """Test accuracy against computation, latency and training memory."""
    table = study.of("accuracy", dataset)[["attention", "top1", "top1_low", "top1_high", "gmacs"]]
    images = study.of("tradeoff", dataset)  # intervals where there is one seed
    by_image = images["top1_images_low"].notna().any()
    for end in ("low", "high"):
        table[f"top1_{end}"] = table[f"top1_{end}"].fillna(_of(table, images, f"top1_images_{end}"))
    latency = at_largest_batch(study.of("cost", dataset), "latency")
    memory = at_largest_batch(study.of("cost", dataset), "train_memory")
    batch = "".join(f", batch {size:.0f}" for size in latency["batch_size"].dropna().unique()[:1])
    costs = {
        "Computation": ("Computation [MMACs/image]", "MMACs", table["gmacs"] * 1e3, None),
        "Latency": (f"Latency [× Fused{batch}]", "× Fused", _of(table, latency, "ratio_to_fused"), latency),
        "Training memory": (f"Training memory [MiB{batch}]", "MiB", _of(table, memory, "median") / _MIB, None),
    }
    specs = {}
    for label, (axis, unit, cost, interval) in costs.items():
        rows = table.assign(cost=cost)
        if interval is not None:
            rows = rows.assign(low=_of(table, interval, "ratio_low"), high=_of(table, interval, "ratio_high"))
            own = rows["attention"] == "fused"  # one by definition; what was measured is the noise
            rows.loc[own & rows["cost"].notna(), ["cost", "low", "high"]] = [1.0, float("nan"), float("nan")]
        rows = rows.dropna(subset=["cost"])
        if len(rows):
            specs[label] = _tradeoff_spec(rows, axis, unit, f"{dataset}: accuracy against {label.lower()}")
    return Chart(f"tradeoff-{dataset}", "Accuracy against cost", "Cost", specs, _BY_IMAGE if by_image else _BY_SEED)


def _of(table: pd.DataFrame, measured: pd.DataFrame, column: str) -> "pd.Series[float]":
    return table["attention"].map(measured.set_index("attention")[column])


def _tradeoff_spec(rows: pd.DataFrame, axis: str, unit: str, description: str) -> dict[str, Any]:
    wide = rows["cost"].max() > 5 * rows["cost"].min()
    x = _axis("cost", axis, {"type": "log" if wide else "linear", "zero": False, "padding": 24, "nice": False})
    y = _axis("top1", "Test accuracy (top-1)", {"zero": False, "padding": 24, "nice": False}, format=".1%")
    data = _named(rows).assign(
        shown=[f"{w.ratio(c)} {unit}" for c in rows["cost"]],
        accuracy=[_accuracy(row) for row in records(rows)],
    )
    tips = {"label": "Mechanism", "accuracy": "Top-1", "shown": axis.split(" [")[0]}
    layers: list[dict[str, Any]] = [_bars(column, data, x, y) for column in ("y", "x")]
    layers.append(_points(rows, tips) | {"encoding": _points(rows, tips)["encoding"] | {"x": x, "y": y}})
    return _chart(data, [layer for layer in layers if layer], description, 340)


def _accuracy(row: dict[str, Any]) -> str:
    known = isfinite(row["top1_low"]) and isfinite(row["top1_high"])
    return w.percent(row["top1"]) + (
        f" ({w.percent(row['top1_low'])} to {w.percent(row['top1_high'])})" if known else ""
    )


def _bars(way: str, data: pd.DataFrame, x: dict[str, Any], y: dict[str, Any]) -> dict[str, Any]:
    low, high = ("top1_low", "top1_high") if way == "y" else ("low", "high")
    if low not in data or data[low].isna().all():
        return {}
    ends = {way: {**(y if way == "y" else x), "field": low}, f"{way}2": {"field": high}}
    other = {"x": x} if way == "y" else {"y": y}
    known = {"filter": f"isValid(datum.{low})"}
    return {"transform": [known], "mark": {"type": "rule", "color": "#999"}, "encoding": ends | other}


def scaling(study: Study) -> Chart:
    """Time and peak memory against sequence length, as ratios to `fused` times what `fused` takes, log-log."""
    table = study.scaling
    specs = {}
    groups = ["scope", "batch", "quantity", "mode"]
    several = table["scope"].nunique() > 1 or table["batch"].nunique() > 1
    measured = {tuple(map(str, key)): rows for key, rows in table[table["status"] == "ok"].groupby(groups)}
    for key in sorted(measured, key=lambda key: [_ORDER.index(value) if value in _ORDER else 99 for value in key]):
        scope, batch, quantity, mode = key
        label = f"{QUANTITIES.get(quantity, quantity).capitalize()}, {PASSES.get(mode, mode).split(' ', 1)[-1]}"
        if several:
            label += f" – {scope}, {'one sample' if batch == 'one' else 'a batch of equal tokens'}"
        specs[label] = _scaling_spec(_relative(measured[key]), quantity, f"{label} against sequence length")
    return Chart("scaling", "Cost against sequence length", "Cost", specs)


def _relative(rows: pd.DataFrame) -> pd.DataFrame:
    unit = _MIB if (rows["quantity"] == "memory").all() else 1
    fused = rows[rows["attention"] == "fused"].drop_duplicates("tokens").set_index("tokens")["median"]
    baseline = rows["tokens"].map(fused).mask(rows["attention"] == "fused")
    cost = (rows["ratio_to_fused"] * baseline).fillna(rows["median"]) / unit
    return rows.assign(cost=cost, low=rows["ratio_low"] * baseline / unit, high=rows["ratio_high"] * baseline / unit)


def _scaling_spec(rows: pd.DataFrame, quantity: str, description: str) -> dict[str, Any]:
    unit = "MiB" if quantity == "memory" else "ms"
    name = {"memory": "Peak memory", "time": "Time"}.get(quantity, quantity)
    ticks = sorted(int(n) for n in rows["tokens"].unique())
    x = _axis("tokens", "Sequence length [tokens]", {"type": "log", "nice": False}, values=ticks, format=",")
    y = _axis("cost", f"{name} [{unit}]", {"type": "log", "nice": False}, format="~g")
    others = rows["attention"] != "fused"
    ratios = [w.times(a, b, c) if o and a == a else "–" for o, a, b, c in zip(others, *_ratios(rows), strict=True)]
    data = _named(rows).assign(
        length=[f"{n:,} tokens" for n in rows["tokens"]],
        shown=[f"{w.ratio(c)} {unit}" for c in rows["cost"]],
        ratio=ratios,
    )
    tips = {"label": "Mechanism", "length": "Length", "shown": name, "ratio": "Relative to Fused"}
    busy = bool(rows["contended"].any())
    if busy:
        data["contended"] = ["while other programs ran" if c else "alone" for c in rows["contended"]]
        tips["contended"] = "Measured"
    band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": _colour(rows)}
    points = _points(rows, tips)
    layers: list[dict[str, Any]] = [
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "area", "opacity": 0.15},
            "encoding": band,
        },
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"x": x, "y": y, "color": _colour(rows)}},
        points | {"encoding": points["encoding"] | {"x": x, "y": y}},
    ]
    if not busy:
        return _chart(data.drop(columns="contended", errors="ignore"), layers, description, 380)
    layers[-1]["encoding"]["fillOpacity"] = {
        "condition": {"test": "datum.contended == 'while other programs ran'", "value": 0},
        "value": 0.9,
    }
    return _chart(data, layers, description, 380) | {
        "title": _TITLE | {"text": "Hollow: measured while other programs ran"}
    }


def _ratios(rows: pd.DataFrame) -> list[list[float]]:
    return [rows[column].tolist() for column in ("ratio_to_fused", "ratio_low", "ratio_high")]


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(label=[w.name(a) for a in rows["attention"]])


def _axis(column: str, title: str, scale: dict[str, Any], **axis: Any) -> dict[str, Any]:
    return {"field": column, "type": "quantitative", "scale": scale, "axis": {"title": title, "tickCount": 6, **axis}}


def _colour(rows: pd.DataFrame) -> dict[str, Any]:
    mechanisms = [str(a) for a in pd.unique(rows["attention"])]
    scale = {"domain": mechanisms, "range": [look(a)[1] for a in mechanisms]}
    return {"field": "attention", "type": "nominal", "scale": scale, "legend": None}


def _points(rows: pd.DataFrame, tips: dict[str, str]) -> dict[str, Any]:
    colour = _colour(rows)
    shapes = {"domain": colour["scale"]["domain"], "range": [SHAPES[look(a)[2]] for a in colour["scale"]["domain"]]}
    return {
        "name": "points",
        # see-through, so that a point upon another hides nothing
        "mark": {"type": "point", "size": 110, "strokeWidth": 2, "fillOpacity": 0.3, "opacity": 1},
        "encoding": {
            "stroke": colour,
            "fill": colour,
            "shape": {**colour, "scale": shapes},
            "tooltip": [{"field": column, "type": "nominal", "title": title} for column, title in tips.items()],
        },
    }


def _chart(data: pd.DataFrame, layers: list[dict[str, Any]], description: str, height: int) -> dict[str, Any]:
    columns = ["attention", "label", "tokens", "cost", "low", "high", "top1", "top1_low", "top1_high"]
    columns += ["accuracy", "length", "shown", "ratio", "contended"]
    rows = records(data[[c for c in columns if c in data]])
    values = [{column: None if pd.isna(value) else value for column, value in row.items()} for row in rows]
    font = {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "gridColor": "#e8e8e8"}
    return {
        "$schema": f"https://vega.github.io/schema/vega-lite/v{VEGA_LITE.split('.')[0]}.json",
        "description": description,
        "width": "container",
        "height": height,
        "params": [{"name": "hidden", "value": []}],
        "data": {"values": values},
        "transform": [{"filter": "indexof(hidden, datum.attention) < 0"}],
        "layer": layers,
        "config": {"axis": font, "view": {"stroke": None}, "font": "system-ui, sans-serif"},
    }
