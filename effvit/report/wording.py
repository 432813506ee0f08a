"""Numbers and lists as a person reads them: two or three digits that mean something, with their unit."""

from collections.abc import Iterable, Mapping, Sequence
from math import floor, isfinite, log10
from typing import Any

from effvit.figures.style import look

SPACE = "\N{NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
FEW = 6  # mechanisms that a sentence names


def name(attention: str) -> str:
    """The mechanism's label in all figures."""
    return look(attention)[0]


def percent(fraction: float) -> str:
    """``0.98328`` is 98.3 %."""
    return f"{100 * fraction:.1f}{SPACE}%"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, signed."""
    return _signed(f"{100 * difference:+.1f}")


def ratio(value: float) -> str:
    """``0.976`` is 0.98, ``0.0364`` is 0.036, ``12.34`` is 12.3."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def times(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """A ratio, with its interval where there is one: ``0.98× (0.95 to 0.99)``."""
    return f"{ratio(value)}×" + (f" ({ratio(low)} to {ratio(high)})" if isfinite(low) and isfinite(high) else "")


def relative_to_fused(row: Mapping[str, Any], runtime: str = "") -> str:
    """The ratio of a row of a measured table, with its interval; `runtime` is what its columns begin with."""
    return times(*(row[f"{runtime}ratio_{end}"] for end in ("to_fused", "low", "high")))


def measured_on(rows: Iterable[Mapping[str, Any]]) -> str:
    """``on 2 threads of AMD EPYC in float32``, ``on NVIDIA H200 in float32``, or several: where rows were measured."""
    known = (row for row in rows if isinstance(row["machine"], str))
    places = dict.fromkeys(f"on {_chip(row['machine'], row['threads'])} in {row['dtype']}" for row in known)
    return several(places) if places else "nowhere"


def _chip(machine: str, threads: float) -> str:
    return f"{count(threads, 'thread')} of {machine}" if threads > 0 else machine


def about(tokens: float) -> str:
    """An interpolated count, to two digits."""
    digits = max(floor(log10(tokens)) - 1, 0)
    return f"{round(tokens / 10**digits) * 10**digits:,}"


def size(count: float) -> str:
    """Bytes in KiB or MiB."""
    return f"{count / 2**20:,.1f}{SPACE}MiB" if count >= 2**20 else f"{count / 2**10:,.0f}{SPACE}KiB"


def milliseconds(value: float) -> str:
    """Three digits."""
    digits = f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:,.0f}"
    return f"{digits}{SPACE}ms"


def count(number: float, noun: str) -> str:
    """``1 image``, ``359 images``, ``no image``."""
    n = round(number)
    return f"{f'{n:,}' if n else 'no'} {noun}{'s' if n > 1 else ''}"


def several(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def ranked(words: Iterable[str]) -> str:
    """Join phrases about mechanisms that run from least to most: a few in full, of many the number and both ends."""
    every = list(words)
    if len(every) <= FEW:
        return several(every)
    return f"{len(every)} mechanisms, from {every[0]} to {every[-1]}"


def names(attentions: Sequence[str]) -> str:
    """Labels of mechanisms as a list; for many, their number."""
    return several(name(a) for a in attentions) if len(attentions) <= FEW else f"{len(attentions)} mechanisms"


def _signed(text: str) -> str:
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", MINUS)
