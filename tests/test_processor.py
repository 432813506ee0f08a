import platform
import subprocess
import sys
from pathlib import Path

import pytest

from effvit import processor

ZEN_5 = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel name\t: AMD EPYC: a name\nflags\t: fpu avx512f"
)
ZEN_3 = ZEN_5.replace("26", "25")
XEON = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu avx512f"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41"


@pytest.fixture
def a_processor(monkeypatch):
    def be(cpuinfo, name=""):
        def read_text(path, **kwargs):
            if cpuinfo is None:
                raise FileNotFoundError(path)
            return f"{cpuinfo}\n\nprocessor\t: 1\nmodel name\t: another\n"

        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(platform, "processor", lambda: name)
        processor.describe.cache_clear()

    yield be
    processor.describe.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "name", "amds", "zen_5"),
    [
        (ZEN_5, "", True, True),
        (ZEN_3, "", True, False),
        (XEON, "", False, False),
        (ARM, "", False, False),
        (None, "AMD64 Family 26 Model 33 Stepping 0, AuthenticAMD", True, True),
        (None, "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", True, False),
        (None, "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel", False, False),
        (None, "arm", False, False),
        (None, "", False, False),
    ],
)
def test_makers_and_families_are_told_apart(a_processor, cpuinfo, name, amds, zen_5):
    a_processor(cpuinfo, name)
    assert processor.is_amds() == amds
    assert processor.is_amds(least_family=26) == zen_5


def test_the_first_processors_fields_are_read_as_they_stand(a_processor):
    a_processor(ZEN_5)
    assert processor.describe()["model name"] == "AMD EPYC: a name"
    assert processor.describe()["processor"] == "0"


@pytest.mark.parametrize(
    ("cpuinfo", "named"),
    [
        (ZEN_5 + "\nmodel\t\t: 2", "AMD EPYC: a name (family 26, model 2)"),
        (ZEN_5, "AMD EPYC: a name"),
        (ARM + "\nCPU part\t: 0xd40", f"{platform.machine()} (implementer 0x41, part 0xd40)"),
        (ARM, platform.machine()),
    ],
)
def test_processors_of_one_name_are_told_apart_by_their_numbers(a_processor, cpuinfo, named):
    a_processor(cpuinfo)
    assert processor.processor_name() == named


def test_a_processor_without_proc_has_the_name_that_its_system_gives(a_processor, monkeypatch):
    a_processor(None, "AMD64 Family 26 Model 33 Stepping 0, AuthenticAMD")
    assert processor.processor_name() == "AMD64 Family 26 Model 33 Stepping 0, AuthenticAMD"
    monkeypatch.setattr(sys, "platform", "darwin")
    a_processor(None, "arm")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "Apple M2\n"))
    assert processor.processor_name() == "Apple M2"
