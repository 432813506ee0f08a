"""Write the tables of README.md and of pages of docs between their marks: `make tables`."""

from pathlib import Path

import pandas as pd

from effvit.attention import available_attention
from effvit.measure.subject import Block
from effvit.measure.trace import shown, trace_block
from stages.choosing import choice, machine

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by `make tables` -->\n", "<!-- end -->"
README_MACHINES = ("AMD-EPYC-family-25-model-17-2t-float32.csv",)  # what the README says in words is of these


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
    """Return all pages as they should be; docs/choosing has all machines."""
    machines = root / "docs/machines"
    tables = {
        root / "README.md": "\n".join(choice(machines / name) for name in README_MACHINES),
        root / "docs/choosing.md": "\n".join(map(machine, sorted(machines.glob("*.csv")))),
    }
    if (root / "docs/gpu.md").exists():
        tables[root / "docs/gpu.md"] = traced()
    if (root / "docs/hybrid-search").exists():
        tables[root / "docs/hybrid-search.md"] = variants(root / "docs/hybrid-search")
    return {page: placed(page.read_text(encoding="utf-8"), table) for page, table in tables.items()}


if __name__ == "__main__":
    for page, text in pages(ROOT).items():
        page.write_text(text, encoding="utf-8")
