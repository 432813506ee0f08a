"""Tables and sentences of docs/choosing.md and README.md from the files of docs/machines."""

import json
from collections.abc import Hashable, Iterable
from pathlib import Path

import pandas as pd

from effvit.attention import BASELINE, attention_class
from effvit.measure.choose import CONTROL, CUDNN

MODEL = "deit_tiny"  # of the README
_WORTH = 0.9  # of fused's time at most: a smaller saving is no reason to change
_BUDGETS = {"takes up to half of it": 0.5, "half to three quarters": 0.75, "three quarters to nine tenths": _WORTH}
_SCOPES = {"model": "the whole model", "block": "one attention block"}
_RATIOS = ["ratio_to_fused", "ratio_low", "ratio_high"]


def choice(file: Path) -> str:
    """Return one machine's ratios of `MODEL`, one image at a time, as Markdown with their caption."""
    rows = _rows(file).query(f"model == '{MODEL}' and batch_size == 1")
    return (
        f"{_times(rows, 'model', intervals=False)}\nTime of one forward pass of {MODEL}, one image, relative to "
        f"`fused` (lower is faster; bold: fastest, but for the control `{CONTROL}`).{_second(rows)} {_where(rows)}, "
        f"random weights{_options(rows)}.\n"
    )


def machine(file: Path) -> str:
    """Return all that one machine's file says as Markdown: a part for each model and batch size."""
    rows = _rows(file)
    parts = [f"### {_where(rows)}\n"]
    for _, part in rows.groupby(["model", "batch_size"], sort=False):
        title = f"{part['model'].iloc[0]}, {_images(part)}"
        parts.append(f"#### {title}\n\n{_advice(part)}")
        for scope, what in _SCOPES.items():
            made = f"{_rounds(part, scope)}{_options(part)}{_load(part, scope)}."
            parts.append(
                f"**{what.capitalize()}**\n\n{_times(part, scope)}\nRelative to `fused`, {made}{_second(part)}\n"
            )
        costs = "\n".join(f"**{what.capitalize()}**\n\n{_costs(part, scope)}" for scope, what in _SCOPES.items())
        parts.append(f"<details><summary>Multiply-adds and memory of {title}</summary>\n\n{costs}\n</details>\n")
    return "\n".join(parts)


def _rows(file: Path) -> pd.DataFrame:
    """The file's rows, with ratios as they are printed, so that no sentence contradicts a table."""
    rows = pd.read_csv(file)
    return rows.assign(**{name: rows[name].round(2) for name in _RATIOS})


def _where(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    threads = f", {first['threads']:.0f} threads" if first["device"] == "cpu" else ""
    return f"{first['machine']}{threads}, {first['precision']}"


def _images(rows: pd.DataFrame) -> str:
    number = rows["batch_size"].iloc[0]
    return "one image" if number == 1 else f"{number} images at a time"


def _second(rows: pd.DataFrame) -> str:
    return f" `{CUDNN}`: the same exact attention by cuDNN." if CUDNN in set(rows["attention"]) else ""


def _rounds(rows: pd.DataFrame, scope: str) -> str:
    counts = rows.query(f"scope == '{scope}'")["n"]
    fewest, most = counts.min(), counts.max()
    return f"{fewest:.0f} rounds" if fewest == most else f"{fewest:.0f} to {most:.0f} rounds"


def _load(rows: pd.DataFrame, scope: str) -> str:
    busy = rows.query(f"scope == '{scope}'")["contended"].any()
    return "; other programs were running, so measure again" if busy else ""


def _options(rows: pd.DataFrame) -> str:
    """Options that differ from today's defaults; nothing where the file does not record them."""
    if "options" not in rows:
        return ""
    recorded = rows[rows["options"].notna() & (rows["attention"] != CUDNN)].drop_duplicates("attention")
    if recorded.empty:
        return ""
    differ = []
    for attention, given in zip(recorded["attention"], recorded["options"], strict=True):
        defaults = attention_class(attention).Options().model_dump(mode="json")
        changed = {key: value for key, value in json.loads(given).items() if value != defaults.get(key)}
        differ += [f"`{attention}` `{key}={value}`" for key, value in changed.items()]
    return f", options {', '.join(differ)}" if differ else ", default options"


def _markdown(lines: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _table(rows: pd.DataFrame, cells: dict[tuple[Hashable, Hashable], str]) -> str:
    """A mechanism per row, an image size per column."""
    sizes = sorted(set(zip(rows["image_size"], rows["tokens"], strict=True)))
    header = ["mechanism", *(f"{size} px, {tokens:,} tokens" for size, tokens in sizes)]
    names = dict.fromkeys(rows["attention"])
    body = [[f"`{name}`", *(cells.get((name, size), "–") for size, _ in sizes)] for name in names]
    return _markdown([header, ["---"] * len(header), *body])


def _times(rows: pd.DataFrame, scope: str, *, intervals: bool = True) -> str:
    """Cells are ratios to `fused`, whose own row has milliseconds; the lowest ratios of a column are bold.

    Where there is nothing to compare with they are milliseconds, where nothing was measured the reason.
    """
    rows = rows.query(f"scope == '{scope}'")
    choices = rows[~rows["attention"].isin([CONTROL, CUDNN])]
    lowest = choices.groupby("image_size")["ratio_to_fused"].transform("min")
    bold = set(choices[choices["ratio_to_fused"] == lowest][["image_size", "attention"]].itertuples(index=False))
    cells = {}
    for row in rows.itertuples():
        if row.status != "ok":
            cell = str(row.status)
        elif pd.isna(row.ratio_to_fused):
            cell = _milliseconds(row.median)
        else:
            cell = f"{row.ratio_to_fused:.2f}"
            if (row.image_size, row.attention) in bold:
                cell = f"**{cell}**"
            if row.attention == BASELINE:
                cell += f" ({_milliseconds(row.median)})"
            elif intervals and pd.notna(row.ratio_high):
                cell += f" ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        cells[row.attention, row.image_size] = cell
    return _table(rows, cells)


def _milliseconds(median: float) -> str:
    return f"{_three_digits(median)} ms"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _costs(rows: pd.DataFrame, scope: str) -> str:
    """Multiply-adds and peak memory, of `fused` as they are and of the others relative to it."""
    rows = rows.query(f"scope == '{scope}'")
    of_fused = rows[rows["attention"] == BASELINE].set_index("image_size")
    cells = {}
    for row in rows.itertuples():
        fused = of_fused.loc[row.image_size]
        if row.attention == BASELINE:
            parts = [_known(row.macs / 1e9, "{:,.3g} GMACs"), _known(row.memory_bytes / 2**20, "{:,.1f} MiB")]
        else:
            parts = [_known(getattr(row, name) / fused[name], "{:.2f}") for name in ("macs", "memory_bytes")]
        cells[row.attention, row.image_size] = ", ".join(parts)
    return _table(rows, cells)


def _known(value: float, form: str) -> str:
    return "–" if pd.isna(value) else form.format(value)


def _advice(rows: pd.DataFrame) -> str:
    """A sentence for each image size, and a table of what fits which budget, the upper end of its interval included."""
    header = ["image size", "`fused`", *_BUDGETS]
    sentences, lines = [], [header, ["---"] * len(header)]
    for (size, tokens), of_size in rows.query("scope == 'model'").groupby(["image_size", "tokens"]):
        fused = of_size[of_size["attention"] == BASELINE].iloc[0]
        measured = fused["status"] == "ok"
        others = _by_time(of_size)
        sentences.append(f"- At {size} px {_sentence(of_size, others) if measured else _without(fused['status'])}\n")
        cells, above = [], 0.0
        for limit in _BUDGETS.values():
            within = others[(others["ratio_high"] <= limit) & (others["ratio_high"] > above)]
            cells.append(", ".join(f"`{attention}`" for attention in within["attention"]) or "–")
            above = limit
        time = _milliseconds(fused["median"]) if measured else str(fused["status"])
        lines.append([f"{size} px, {tokens:,} tokens", time, *cells])
    return f"{''.join(sentences)}\n{_markdown(lines)}\n"


def _by_time(rows: pd.DataFrame) -> pd.DataFrame:
    """The mechanisms that were compared with `fused`, fastest first."""
    compared = ~rows["attention"].isin([BASELINE, CONTROL, CUDNN]) & rows["ratio_high"].notna()
    return rows[compared].sort_values("ratio_to_fused", kind="stable")


def _without(status: str) -> str:
    return f"`fused` is {status}: nothing to compare with; the table of the whole model has the times."


def _sentence(rows: pd.DataFrame, others: pd.DataFrame) -> str:
    if others.empty:
        return "too little was measured to choose: give a larger `--budget-s`."
    fit = others[others["ratio_high"] <= _WORTH]
    text = "stay with `fused`: no other is shown to save a tenth of the time."
    if not fit.empty:
        best = fit[fit["ratio_to_fused"] == fit["ratio_to_fused"].min()]
        named = " or ".join(
            f"`{row.attention}` ({row.ratio_low:.2f} to {row.ratio_high:.2f})" for row in best.itertuples()
        )
        text = f"take {named}: {best.iloc[0]['ratio_to_fused']:.2f} of `fused`'s time."
    second = rows[(rows["attention"] == CUDNN) & (rows["ratio_high"] <= _WORTH)]
    if not second.empty:
        text += f" Exact attention by cuDNN (`{CUDNN}`) takes {second.iloc[0]['ratio_to_fused']:.2f} of it."
    return text
