"""What a reader needs to trust a result: code, versions, machine, configuration."""

import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effvit import policy
from effvit.device import Machine
from effvit.files import write_json

_PACKAGES = ("effvit", "torch", "torchvision", "numpy", "lightning-fabric", "ptflops", "onnxruntime", "dvc")
_CODE = ("effvit", "stages")


def write_provenance(directory: Path, config: dict[str, Any], machine: Machine) -> None:
    """Write ``provenance.json`` into ``directory``: the resolved ``config``, and where, with what and by what it ran.

    Args:
        directory: existing directory of the result.
        config: settings of the run, as JSON.
        machine: that of the device which computed the result.
    """
    computed = {"machine": asdict(machine), "forms": policy.ran()}
    write_json(directory / "provenance.json", {"config": config, **_environment(), **computed})


def record_machine(path: Path, machine: Machine) -> str:
    """Make ``path`` the record of the machine, untouched where it is that already, and say in a line what changed."""
    now, before = asdict(machine), _earlier(path)
    what = f"machine: {machine.name}, {machine.device}, {machine.threads} thread{'s' * (machine.threads > 1)}"
    if now == before:
        return f"{what}: as before, measured results are up to date with it"
    write_json(path, now)
    if before is None:
        return f"{what}: no earlier record, measured stages run"
    changed = [key for key in before | now if before.get(key) != now.get(key)]
    listed = ", ".join(f"{key} was {_told(before.get(key))} and is {_told(now.get(key))}" for key in changed)
    return f"{what}: {listed}; measured stages run again"


def _earlier(path: Path) -> dict[str, Any] | None:
    """The record in the file; None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _told(value: object) -> str:
    return "none" if value is None else str(value)


def version_of(package: str) -> str:
    """Version of an installed package; ``unknown`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _environment() -> dict[str, Any]:
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def _git_revision() -> str | None:
    """Commit that the code is of, with ``-dirty`` where code differs; DVC writes other files while it runs."""
    try:
        changed = _git("status", "--porcelain", "--", *_CODE)
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True, timeout=10).stdout.strip()
