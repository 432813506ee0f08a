"""What a reader needs to trust a result: code, versions, hardware, configuration."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effvit.files import write_json
from effvit.processor import describe

_PACKAGES = ("effvit", "torch", "torchvision", "numpy", "lightning-fabric", "ptflops", "onnxruntime", "dvc")
_CODE = ("effvit", "stages")


def write_provenance(directory: Path, config: dict[str, Any]) -> None:
    """Write ``provenance.json`` into ``directory``: the resolved ``config`` and where and with what it ran."""
    write_json(directory / "provenance.json", {"config": config, **_environment()})


def _environment() -> dict[str, Any]:
    import torch

    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": describe().get("model name") or platform.processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
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
