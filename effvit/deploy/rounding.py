"""Bounds in few digits, which hold as printed."""

from decimal import ROUND_CEILING, Decimal


def rounded_up(bound: float) -> str:
    """One digit, never less than the bound: ``1.43e-06`` is within ``2e-06``."""
    exact = Decimal(bound)
    return f"{float(exact.quantize(Decimal((0, (1,), exact.adjusted())), ROUND_CEILING)):.0e}"
