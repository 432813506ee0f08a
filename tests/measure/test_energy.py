import ctypes

import pytest
import torch

from effvit.measure import energy

CPU = torch.device("cpu")


@pytest.fixture
def rapl(tmp_path, monkeypatch):
    """Two packages as Linux shows them, the second about to begin anew; sets both counts."""
    for name, largest in (("intel-rapl:0", 10**9), ("intel-rapl:1", 1000), ("intel-rapl:0:0", 10**9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text(f"{largest}\n")
    monkeypatch.setattr(energy, "_RAPL", tmp_path)

    def count(*values):
        for number, value in enumerate(values):
            (tmp_path / f"intel-rapl:{number}" / "energy_uj").write_text(f"{value}\n")

    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("0\n")
    count(500, 900)
    return count


def test_all_packages_count_and_one_that_begins_anew(rapl):
    joules = energy.counter_of(CPU)
    rapl(1500, 100)  # 1000, and 900 to 1000 and on to 100
    assert joules() == pytest.approx(1200e-6)
    rapl(1600, 150)
    assert joules() == pytest.approx(1350e-6)


def test_energy_is_that_of_one_call(rapl):
    spent = [500]

    def call():
        spent[0] += 40
        rapl(spent[0], 900)

    assert energy.energy_of(call, 0.0, CPU) == pytest.approx(40e-6)


def test_where_nothing_counts_there_is_no_energy(tmp_path, monkeypatch, rapl):
    monkeypatch.setattr(energy, "_RAPL", tmp_path / "absent")
    assert energy.energy_of(lambda: pytest.fail("called"), 1.0, CPU) is None
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()  # as where only root may read it
    assert energy.counter_of(CPU) is None


class Driver:
    """NVIDIA's management library with one GPU, which has spent so many millijoules."""

    def __init__(self):
        self.spent, self.asked = 5000, []

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        self.asked.append(name)
        handle._obj.value = 7
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, value):
        assert handle.value == 7
        value._obj.value = self.spent
        return 0


def test_a_gpu_is_found_by_its_uuid_and_counts_millijoules(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(energy, "_nvml", lambda: driver)
    joules = energy._gpu_counter("GPU-8b6f2d1c")
    driver.spent = 7500
    assert joules() == 7.5 and driver.asked == [b"GPU-8b6f2d1c"]
    monkeypatch.setattr(driver, "nvmlDeviceGetTotalEnergyConsumption", lambda handle, value: 3)  # before Volta
    assert energy._gpu_counter("GPU-8b6f2d1c") is None
    monkeypatch.setattr(energy, "_nvml", lambda: None)
    assert energy._gpu_counter("GPU-8b6f2d1c") is None


def test_without_a_driver_there_is_no_library():
    energy._nvml.cache_clear()
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        assert energy._nvml() is None
