import platform
from pathlib import Path

import pytest

from effvit import processor

ZEN_5 = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel name\t: AMD EPYC: a name\nflags\t: fpu avx512f"
)
ZEN_3 = ZEN_5.replace("26", "25")
XEON = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nflags\t\t: fpu avx512f amx_bf16 amx_tile"
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
    ("cpuinfo", "name", "amds", "zen_5", "tiles"),
    [
        (ZEN_5, "", True, True, False),
        (ZEN_3, "", True, False, False),
        (XEON, "", False, False, True),
        (ARM, "", False, False, False),
        (None, "AMD64 Family 26 Model 33 Stepping 0, AuthenticAMD", True, True, False),
        (None, "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", True, False, False),
        (None, "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel", False, False, False),
        (None, "arm", False, False, False),
        (None, "", False, False, False),
    ],
)
def test_makers_families_and_tiles_are_told_apart(a_processor, cpuinfo, name, amds, zen_5, tiles):
    a_processor(cpuinfo, name)
    assert processor.is_amds() == amds
    assert processor.is_amds(least_family=26) == zen_5
    assert processor.multiplies_bfloat16_tiles() == tiles


def test_the_first_processors_fields_are_read_as_they_stand(a_processor):
    a_processor(ZEN_5)
    assert processor.describe()["model name"] == "AMD EPYC: a name"
    assert processor.describe()["processor"] == "0"
