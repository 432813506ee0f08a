"""Our attention modules compared with public ones of the same mechanism, at equal hyperparameters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import gmean

from effvit.attention import Attention, attention_class, build_attention
from effvit.errors import UserError
from effvit.kernels.linear import product
from effvit.measure.latency import Call, interleaved, paired_interval, paired_ratio
from effvit.measure.memory import peak_bytes
from effvit.measure.public import PEERS, PLAIN
from effvit.measure.subject import square_grid
from effvit.measure.workload import block_forward, block_training

MODES = {"forward": block_forward, "train": block_training}
_GEMM_SIZE = 2048
PRODUCTS = {"forward": 1, "train": 3}  # each product's backward pass is two products of the same size


def require_peers(mechanisms: Sequence[str]) -> None:
    """Raise ``UserError`` for an unknown mechanism, or one whose peer is not installed."""
    for name in mechanisms:
        attention_class(name)
        if name not in PEERS:
            continue
        package = PEERS[name].package
        if package != PLAIN and find_spec(package.replace("-", "_")) is None:
            raise UserError(f"attention={name}: its peer {package} is not installed; pip install 'effvit[peers]'")


def build_ours(attention: str, dim: int, num_heads: int, grid_size: tuple[int, int], **more: Any) -> Attention:
    """A module of ours like its peer: without QKV bias, of the peer's options and tokens."""
    peer = PEERS.get(attention)
    options, prefix_tokens = (peer.options | more, peer.prefix_tokens) if peer else (more, 1)
    return build_attention(attention, dim, num_heads, grid_size, qkv_bias=False, prefix_tokens=prefix_tokens, **options)


@dataclass(frozen=True)
class Point:
    """One comparison: a mechanism at a size, in one mode."""

    attention: str
    hidden_size: int
    num_attention_heads: int
    tokens: int
    mode: str


def compare_with_peer(
    point: Point, *, tokens_per_batch: int, budget_s: float, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """Time our module, its peer and a large matrix product alternately; add exact peak memory and the floor.

    Args:
        point: what to compare.
        tokens_per_batch: the batch is as many samples as have this many tokens, at least one.
        budget_s: seconds of sampling.
        dtype: float32, or the type that autocast runs both modules in.
        device: cpu or cuda.

    Returns:
        ``point``'s fields, ``peer, batch_size, n``; medians ``ours_ms, peer_ms``; ``ratio`` (peer / ours: median over
        rounds) with its 95 % interval ``ratio_low, ratio_high``; ``macs`` of one sample; ``floor_ms``, what the
        products alone take at the speed of the large product, and ``floor_share``, floor / ours;
        ``ours_bytes, peer_bytes``: peak memory of one call; ``autocast_ratio``: time of ours in float32 over that
        under bfloat16 autocast. Without a public peer, what is said of the peer is NaN.
    """
    c, heads = point.hidden_size, point.num_attention_heads
    peer = PEERS.get(point.attention)
    ours = build_ours(point.attention, c, heads, square_grid(point.tokens)).to(device)
    batch_size = max(1, tokens_per_batch // point.tokens)
    tokens = torch.randn(batch_size, ours.num_tokens, c, device=device)
    calls = {"ours": _autocast(MODES[point.mode](ours, tokens), dtype, device)}
    if peer:
        calls["peer"] = _autocast(MODES[point.mode](peer.build(ours).to(device), tokens), dtype, device)
    gemms, gemm_flops = large_products(dtype, device)
    autocast = {} if dtype == torch.bfloat16 else {"autocast": _autocast(calls["ours"], torch.bfloat16, device)}
    seconds = interleaved(calls | autocast | gemms, budget_s=budget_s, device=device)
    unknown = np.full(len(seconds["ours"]), np.nan)
    theirs = seconds.get("peer", unknown)
    low, high = (peer and paired_interval(theirs, seconds["ours"])) or (float("nan"), float("nan"))
    medians = {name: float(np.median(samples)) for name, samples in seconds.items()}
    floor_s = batch_size * 2 * PRODUCTS[point.mode] * ours.macs() * min(medians[name] for name in gemms) / gemm_flops
    peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    return {
        **vars(point),
        "peer": peer.package if peer else None,
        "batch_size": batch_size,
        "n": len(theirs),
        "ours_ms": medians["ours"] * 1e3,
        "peer_ms": medians.get("peer", float("nan")) * 1e3,
        "ratio": paired_ratio(theirs, seconds["ours"]),
        "ratio_low": low,
        "ratio_high": high,
        "macs": ours.macs(),
        "floor_ms": floor_s * 1e3,
        "floor_share": floor_s / medians["ours"],
        "ours_bytes": peaks["ours"],
        "peer_bytes": peaks.get("peer"),
        "autocast_ratio": paired_ratio(seconds["ours"], seconds.get("autocast", unknown)),
    }


def print_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Print each comparison, then the geometric mean and the smallest ratio of each mechanism."""
    table = Table(title="time of the public module / time of ours: above 1, ours is faster")
    columns = ["attention", "hidden_size", "tokens", "mode", "ours ms", "peer ms", "ratio", "95 % interval"]
    columns += ["floor", "bfloat16"]
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("attention", "mode") else "right")
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("ours_ms", "peer_ms"))
        interval = f"{row['ratio_low']:.2f} – {row['ratio_high']:.2f}"
        cells = (*(str(row[key]) for key in columns[:4]), *times, f"{row['ratio']:.2f}", interval)
        table.add_row(*cells, f"{row['floor_share']:.0%}", f"{row['autocast_ratio']:.2f}")
    console = Console()
    console.print(table)
    console.print("floor: time of its matrix products alone; bfloat16: float32's time over that under autocast")
    for attention in dict.fromkeys(row["attention"] for row in rows if row["attention"] in PEERS):
        ratios = [row["ratio"] for row in rows if row["attention"] == attention]
        peer = PEERS[attention].package
        console.print(f"{attention} against {peer}: geometric mean {gmean(ratios):.2f}, least {min(ratios):.2f}")


def grid_of_points(
    mechanisms: Sequence[str], widths: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> Iterator[Point]:
    """Every mechanism at every (width, heads) and token count, in both modes."""
    for attention in mechanisms:
        for width, heads in widths:
            for count in tokens:
                for mode in MODES:
                    yield Point(attention, width, heads, count, mode)


def _autocast(call: Call, dtype: torch.dtype, device: torch.device) -> Call:
    if dtype == torch.float32:
        return call

    def autocast_call() -> object:
        with torch.autocast(device.type, dtype=dtype):
            return call()

    return autocast_call


def large_products(dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Call], int]:
    """A large product by each library that computes ours, and its FLOPs: the faster one is what the machine can do."""
    a, b = (torch.randn(_GEMM_SIZE, _GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    out = torch.empty(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype, device=device)

    @torch.no_grad()
    def through_linear() -> object:
        return product(a, b)

    return {"mm": lambda: torch.mm(a, b, out=out), "linear": through_linear}, 2 * _GEMM_SIZE**3
