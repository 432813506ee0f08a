"""Tables and sentences of docs/choosing.md and README.md from the files of docs/machines."""

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

import pandas as pd

from effvit.attention import BASELINE, attention_class
from effvit.measure.choose import CONTROL, CUDNN

MODEL = "deit_tiny"  # of the README
_WORTH = 0.9  # of fused's time at most: a smaller saving is no reason to change
_BUDGETS = {"half": 0.5, "three quarters": 0.75, "nine tenths": _WORTH}
_SCOPES = {"model": "the whole model", "block": "one attention block"}
_MIB = 2**20


def choice(file: Path, *, intervals: bool) -> str:
    """Return one machine's times of `MODEL` as Markdown, with their caption."""
    rows = _rows(file).query(f"model == '{MODEL}'")
    return f"{_times(rows, 'model', intervals=intervals)}\n{_caption(rows, 'model', intervals=intervals)}\n"


def machine(file: Path) -> str:
    """Return all that one machine's file says as Markdown: a part for each model."""
    rows = _rows(file)
    parts = [f"### {_where(rows)}\n"]
    for model, of_model in rows.groupby("model", sort=False):
        parts.append(f"#### {model}\n\n{_advice(of_model)}")
        for scope in _SCOPES:
            table, caption = (make(of_model, scope, intervals=True) for make in (_times, _caption))
            parts.append(f"{table}\n{caption}\n")
        costs = "\n".join(_costs(of_model, scope) for scope in _SCOPES)
        parts.append(f"<details><summary>Multiply-adds and memory of {model}</summary>\n\n{costs}\n</details>\n")
    return "\n".join(parts)


def _rows(file: Path) -> pd.DataFrame:
    return pd.read_csv(file).query("batch_size == 1")


def _where(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    threads = "" if pd.isna(first["threads"]) else f", {first['threads']:.0f} threads"
    return f"{first['machine']}{threads}, {first['precision']}"


def _caption(rows: pd.DataFrame, scope: str, *, intervals: bool) -> str:
    return (
        f"Time of one forward pass of {_SCOPES[scope]}, {rows['model'].iloc[0]}, one image, relative to `fused` (lower "
        f"is faster; bold: fastest, but for the control `{CONTROL}`). {_where(rows)}, random weights{_options(rows)}"
        f"{', 95 % intervals of the timing' if intervals else ''}."
    )


def _options(rows: pd.DataFrame) -> str:
    """Options that differ from today's defaults; nothing where the file does not record them."""
    if "options" not in rows:
        return ""
    differ = []
    for attention, given in rows.drop_duplicates("attention").set_index("attention")["options"].items():
        if attention == CUDNN:
            continue
        defaults = attention_class(str(attention)).Options().model_dump(mode="json")
        changed = {key: value for key, value in json.loads(given).items() if value != defaults[key]}
        differ += [f"`{attention}` `{key}={value}`" for key, value in changed.items()]
    return f", options {', '.join(differ)}" if differ else ", default options"


def _table(rows: pd.DataFrame, cells: dict[tuple[Hashable, Hashable], str]) -> str:
    """A mechanism per row, an image size per column."""
    sizes = sorted(set(zip(rows["image_size"], rows["tokens"], strict=True)))
    lines: list[Iterable[str]] = [
        ["mechanism", *(f"{size} px, {tokens:,} tokens" for size, tokens in sizes)],
        ["---"] * (1 + len(sizes)),
    ]
    for attention in dict.fromkeys(rows["attention"]):
        lines.append([f"`{attention}`", *(cells.get((attention, size), "–") for size, _ in sizes)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _times(rows: pd.DataFrame, scope: str, *, intervals: bool) -> str:
    """Cells are ratios to `fused`, whose own row has milliseconds; the lowest ratios of a column are bold."""
    rows = rows.query(f"scope == '{scope}'")
    choices = rows[rows["attention"] != CONTROL]
    as_shown = choices["ratio_to_fused"].map(lambda ratio: float(f"{ratio:.2f}"))
    fastest = choices[as_shown == as_shown.groupby(choices["image_size"]).transform("min")]
    bold = set(fastest[["image_size", "attention"]].itertuples(index=False, name=None))
    cells = {}
    for row in rows[rows["status"] == "ok"].itertuples():
        ratio = f"{row.ratio_to_fused:.2f}"
        if (row.image_size, row.attention) in bold:
            ratio = f"**{ratio}**"
        if row.attention == BASELINE:
            ratio += f" ({_milliseconds(row.median)})"
        elif intervals:
            ratio += f" ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        cells[row.attention, row.image_size] = ratio
    return _table(rows, cells)


def _milliseconds(median: float) -> str:
    return f"{median:,.0f} ms" if median >= 10 else f"{median:.2g} ms"


def _costs(rows: pd.DataFrame, scope: str) -> str:
    """Multiply-adds and peak memory, of `fused` as they are and of the others relative to it."""
    rows = rows.query(f"scope == '{scope}'")
    of_fused = rows[rows["attention"] == BASELINE].set_index("image_size")
    cells = {}
    for row in rows.itertuples():
        fused = of_fused.loc[row.image_size]
        shown: Callable[[float, float, str], str] = _absolute if row.attention == BASELINE else _relative
        macs, memory = shown(row.macs, fused["macs"], "GMACs"), shown(row.memory_bytes, fused["memory_bytes"], "MiB")
        cells[row.attention, row.image_size] = f"{macs}, {memory}"
    return (
        f"{_table(rows, cells)}\nMultiply-adds, then peak memory of the tensors of one forward pass, of "
        f"{_SCOPES[scope]} with one image; both relative to `fused`.\n"
    )


def _absolute(value: float, _: float, unit: str) -> str:
    return "–" if pd.isna(value) else f"{value / (1e9 if unit == 'GMACs' else _MIB):.3g} {unit}"


def _relative(value: float, fused: float, _: str) -> str:
    return "–" if pd.isna(value) or pd.isna(fused) else f"{value / fused:.2f}"


def _advice(rows: pd.DataFrame) -> str:
    """A sentence for each image size, and a table of what fits each budget, the upper end of its interval included."""
    header = ["image size", "`fused`", *(f"at most {name} of that time" for name in _BUDGETS)]
    sentences, lines = [], [header, ["---"] * len(header)]
    for (size, tokens), of_size in rows.query("scope == 'model'").groupby(["image_size", "tokens"]):
        fused = of_size[of_size["attention"] == BASELINE].iloc[0]
        place, others = f"At {size} px", _by_time(of_size)
        if fused["status"] != "ok":
            sentences.append(f"{place} `fused` is {fused['status']}: nothing to compare with.")
            continue
        if others.empty or others["ratio_high"].min() > _WORTH:
            sentences.append(f"{place} stay with `fused`: no other is shown to save a tenth of the time.")
        else:
            best = others.iloc[0]
            sentences.append(f"{place} `{best['attention']}` takes {best['ratio_to_fused']:.2f} of `fused`'s time.")
        cells, named = [], set[str]()
        for limit in _BUDGETS.values():
            within = others[(others["ratio_high"] <= limit) & ~others["attention"].isin(named)]
            cells.append(", ".join(f"`{attention}`" for attention in within["attention"]) or "–")
            named |= set(within["attention"])
        lines.append([f"{size} px, {tokens:,} tokens", _milliseconds(fused["median"]), *cells])
    return "\n".join([" ".join(sentences), "", *(f"| {' | '.join(line)} |" for line in lines), "", ""])


def _by_time(rows: pd.DataFrame) -> pd.DataFrame:
    """The mechanisms that were compared with `fused`, fastest first."""
    compared = ~rows["attention"].isin([BASELINE, CONTROL, CUDNN]) & rows["ratio_high"].notna()
    return rows[compared].sort_values("ratio_to_fused")
