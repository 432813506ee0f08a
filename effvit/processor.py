"""Which processor this is, for what depends on it: the faster of two kernels, and the provenance of a measurement."""

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path


@functools.cache
def describe() -> dict[str, str]:
    """Describe the CPU by the fields of Linux's ``/proc/cpuinfo``, as far as known: vendor_id, cpu family, flags, …"""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    except OSError:
        # On Windows "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD".
        name = _apples_name() if sys.platform == "darwin" else platform.processor()
        family = re.search(r"Family (\d+)", name)
        return {
            "model name": name,
            "vendor_id": name.split()[-1] if name else "",
            "cpu family": family[1] if family else "",
        }


def processor_name() -> str:
    """Name of the CPU, on Linux with its family and model: ``AMD EPYC (family 25, model 17)``.

    A virtual machine may give different processors the same name, and ARM's have none.
    """
    cpu = describe()
    name = cpu.get("model name") or platform.machine()
    for fields in (("cpu family", "model"), ("CPU implementer", "CPU part")):
        if all(field in cpu for field in fields):
            numbers = (f"{field.removeprefix('cpu ').removeprefix('CPU ')} {cpu[field]}" for field in fields)
            return f"{name} ({', '.join(numbers)})"
    return name


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _apples_name() -> str:
    """Such as ``Apple M2``, for which Python has ``arm``."""
    command = ("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.processor()


def is_amds(least_family: int = 0) -> bool:
    """Whether this is AMD's, of ``least_family`` or a later one: 25 is Zen 3 and Zen 4, 26 Zen 5."""
    cpu = describe()
    return cpu.get("vendor_id") == "AuthenticAMD" and int(cpu.get("cpu family") or 0) >= least_family
