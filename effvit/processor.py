"""Which processor this is, for what depends on it: the faster of two kernels, and the provenance of a measurement."""

import functools
import platform
import re
from pathlib import Path


@functools.cache
def describe() -> dict[str, str]:
    """Describe the CPU by the fields of Linux's ``/proc/cpuinfo``, as far as known: vendor_id, cpu family, flags, …"""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
        return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    except OSError:
        name = platform.processor()  # on Windows "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"
        family = re.search(r"Family (\d+)", name)
        return {
            "model name": name,
            "vendor_id": name.split()[-1] if name else "",
            "cpu family": family[1] if family else "",
        }


def is_amds(least_family: int = 0) -> bool:
    """Whether this is AMD's, of ``least_family`` or a later one: 25 is Zen 3 and Zen 4, 26 Zen 5."""
    cpu = describe()
    return cpu.get("vendor_id") == "AuthenticAMD" and int(cpu.get("cpu family") or 0) >= least_family
