"""A model's figures on constrained hardware as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_RUNTIMES = {"PyTorch": "", "onnxruntime": "onnx_", "int8": "int8_"}


def print_figures(attention: str, figures: Mapping[str, Any]) -> None:
    """Print one line a runtime, or why it does not run there."""
    accuracy = f"{figures['split']} top-1 (n = {figures['n_images']:,})"
    table = Table(title=f"{attention}: one thread, one image at a time")
    for name in ("runtime", "latency [ms]", "× fused", "file [KiB]", "process [MiB]", accuracy):
        table.add_column(name, justify="left" if name == "runtime" else "right")
    for runtime, prefix in _RUNTIMES.items():
        if (status := figures.get(f"{prefix}status", "ok")) != "ok":
            table.add_row(runtime, str(status))
            continue
        size = figures[f"{prefix}bytes" if prefix else "model_bytes"]
        table.add_row(
            runtime,
            f"{figures[f'{prefix}latency_ms']:.3g}",
            f"{figures[f'{prefix}ratio_to_fused']:.2f}",
            f"{size / 2**10:,.0f}",
            f"{figures[f'{prefix}peak_rss_bytes'] / 2**20:,.0f}",
            f"{figures[f'{prefix}top1']:.2%}",
        )
    Console().print(table)
