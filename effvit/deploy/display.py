"""What a deployed model is and costs under each runtime, as tables for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_RUNTIMES = {"PyTorch": "", "onnxruntime": "onnx_", "int8": "int8_"}


def print_deployment(attention: str, figures: Mapping[str, Any]) -> None:
    """Print size and accuracy of each runtime, or why there is no file for it."""

    def cells(prefix: str) -> list[str]:
        size = figures[f"{prefix}bytes" if prefix else "model_bytes"]
        return [f"{size / 2**10:,.0f}", f"{figures[f'{prefix}top1']:.2%}"]

    accuracy = f"{figures['split']} top-1 (n = {figures['n_images']:,})"
    missing = {p: str(s) for p in _RUNTIMES.values() if (s := figures.get(f"{p}status", "ok")) != "ok"}
    _print(f"{attention}: files", ["file [KiB]", accuracy], cells, missing)


def print_costs(attention: str, figures: Mapping[str, Any]) -> None:
    """Print time and memory of each runtime for which there is a file."""

    def cells(prefix: str) -> list[str]:
        return [
            f"{figures[f'{prefix}latency_ms']:.3g}",
            f"{figures[f'{prefix}ratio_to_fused']:.2f}",
            f"{figures[f'{prefix}peak_rss_bytes'] / 2**20:,.0f}",
        ]

    missing = {p: "no file" for p in _RUNTIMES.values() if figures[f"{p}latency_ms"] is None}
    title = f"{attention}: one thread, one image at a time"
    _print(title, ["latency [ms]", "× fused", "process [MiB]"], cells, missing)


def _print(title: str, columns: Sequence[str], cells: Callable[[str], list[str]], missing: Mapping[str, str]) -> None:
    table = Table(title=title)
    for name in ("runtime", *columns):
        table.add_column(name, justify="left" if name == "runtime" else "right")
    for runtime, prefix in _RUNTIMES.items():
        table.add_row(runtime, *([missing[prefix]] if prefix in missing else cells(prefix)))
    Console().print(table)
