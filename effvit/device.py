"""Which device to run on."""

import torch

from effvit.errors import UserError


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``mps`` into a device that is there; raises ``UserError`` otherwise."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    if name not in there:
        raise UserError(f"device={name!r}: unknown, expected one of auto, {', '.join(there)}")
    if not there[name]:
        raise UserError(f"device={name}: not available on this machine; try auto or cpu")
    return torch.device(name)
