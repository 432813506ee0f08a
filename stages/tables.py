"""Write the tables of README.md and of pages of docs between their marks: `make tables`."""

import json
from pathlib import Path

import pandas as pd

from effvit.attention import attention_class, available_attention
from effvit.measure.choose import CONTROL, CUDNN
from effvit.measure.subject import Block
from effvit.measure.trace import shown, trace_block

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by `make tables` -->\n", "<!-- end -->"
MODEL = "deit_tiny"


def choice(file: Path, *, intervals: bool) -> str:
    """Return one machine's table as Markdown: a mechanism per row, an image size per column, and its caption.

    Cells are ratios to `fused`, whose own row has milliseconds; the lowest ratios of a column are bold.
    """
    rows = pd.read_csv(file).query(f"scope == 'model' and batch_size == 1 and model == '{MODEL}'")
    sizes = sorted(set(zip(rows["image_size"], rows["tokens"], strict=True)))
    choices = rows[rows["attention"] != CONTROL]
    as_shown = choices["ratio_to_fused"].map(lambda ratio: float(f"{ratio:.2f}"))
    fastest = choices[as_shown == as_shown.groupby(choices["image_size"]).transform("min")]
    bold = set(fastest[["image_size", "attention"]].itertuples(index=False, name=None))
    cells = {}
    for row in rows[rows["status"] == "ok"].itertuples():
        ratio = f"{row.ratio_to_fused:.2f}"
        if (row.image_size, row.attention) in bold:
            ratio = f"**{ratio}**"
        if row.attention == "fused":
            ratio += f" ({row.median:.0f} ms)"
        elif intervals:
            ratio += f" ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        cells[row.attention, row.image_size] = ratio
    header = ["mechanism", *(f"{size} px, {tokens:,} tokens" for size, tokens in sizes)]
    lines = [header, ["---"] * len(header)]
    for attention in dict.fromkeys(rows["attention"]):
        lines.append([f"`{attention}`", *(cells.get((attention, size), "–") for size, _ in sizes)])
    first = rows.iloc[0]
    where = first["machine"] if pd.isna(first["threads"]) else f"{first['machine']}, {first['threads']:.0f} threads"
    caption = (
        f"Time of one forward pass of {MODEL}, one image, relative to `fused` (lower is faster; bold: fastest, but "
        f"for the control `{CONTROL}`). "
        f"{where}, {first['precision']}, random weights{_options(rows)}"
    )
    caption += ", 95 % intervals of the timing." if intervals else "."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", caption, ""])


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


def variants(directory: Path) -> str:
    """Return what `effvit variants` wrote as Markdown: a variant per row, costs where they were measured."""
    key = ["attention", "options", "value_conv"]
    rows = pd.read_csv(directory / "variants.csv").fillna({"options": ""})
    if (directory / "cost.csv").exists():
        rows = rows.merge(pd.read_csv(directory / "cost.csv").fillna({"options": ""}), on=key)
    lines = [
        ["mechanism", "options", "`value_conv`", "validation top-1", "seeds", "MMACs", "latency", "step", "floor"],
        ["---"] * 9,
    ]
    for row in rows.to_dict("records"):
        accuracy = f"{row['val_top1']:.1%}"
        if row["val_top1_lowest"] < row["val_top1_highest"]:
            accuracy += f" ({row['val_top1_lowest']:.1%} to {row['val_top1_highest']:.1%})"
        lines.append(
            [
                f"`{row['attention']}`",
                " ".join(f"`{option}`" for option in row["options"].split()),
                str(row["value_conv"]),
                accuracy,
                str(row["seeds"]).replace(" ", ", "),
                f"{row['macs'] / 1e6:.2f}",
                *(f"{row[column]:.2f}" if column in row else "–" for column in ("latency_ratio", "step_ratio")),
                f"{row['floor_share']:.0%}" if "floor_share" in row else "–",
            ]
        )
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), ""])


def traced() -> str:
    """Return what `effvit trace` counts as Markdown: a mechanism per row, bold what is above the budget."""
    lines = [["mechanism", "launches forward", "backward", "GB forward", "backward", "x minimum"], ["---"] * 6]
    for attention in available_attention():
        found = trace_block(Block(attention, {}, 384, 6), 1025, 64, bfloat16=True)
        lines.append([f"`{attention}`", *(f"**{cell}**" if above else cell for cell, above in shown(found))])
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), ""])


def placed(text: str, table: str) -> str:
    """Return a page with this table between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


def pages(root: Path) -> dict[Path, str]:
    """Return all pages as they should be: README has the first machine of each device, docs/choosing all."""
    files = sorted((root / "docs/machines").glob("*.csv"))
    first = {pd.read_csv(file, usecols=["device"])["device"].iloc[0]: file for file in reversed(files)}
    tables = {
        root / "README.md": "\n".join(choice(file, intervals=False) for file in sorted(first.values())),
        root / "docs/choosing.md": "\n".join(choice(file, intervals=True) for file in files),
    }
    if (root / "docs/gpu.md").exists():
        tables[root / "docs/gpu.md"] = traced()
    if (root / "docs/hybrid-search").exists():
        tables[root / "docs/hybrid-search.md"] = variants(root / "docs/hybrid-search")
    return {page: placed(page.read_text(encoding="utf-8"), table) for page, table in tables.items()}


if __name__ == "__main__":
    for page, text in pages(ROOT).items():
        page.write_text(text, encoding="utf-8")
