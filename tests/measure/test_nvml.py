import os

import pytest
import torch

from effvit.measure import alone, nvml

MINE, OTHER = os.getpid(), 4242


class Driver:
    """NVIDIA's management library with one GPU, processes on it, and what each took in percent since when."""

    def __init__(self, running, used, status=0):
        self.running, self.used, self.status = running, used, status

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = 7
        return 0 if name == b"GPU-1" else 6

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle, count, there):
        assert handle.value == 7 and count._obj.value == len(there)
        for process, pid in zip(there, self.running, strict=False):
            process.pid = pid
        count._obj.value = len(self.running)
        return 0

    def nvmlDeviceGetProcessUtilization(self, handle, used, count, since):
        new = [(pid, percent) for pid, percent, when in self.used if when > since.value]
        for sample, (pid, percent) in zip(used, new, strict=False):
            sample.pid, sample.sm = pid, percent
        count._obj.value = len(new)
        return self.status


LATER = 2**62


@pytest.mark.parametrize(
    ("running", "used", "status", "share"),
    [
        ([MINE, OTHER], [(MINE, 90, LATER), (OTHER, 7, LATER), (OTHER, 20, LATER)], 0, 0.2),
        ([MINE, OTHER], [(MINE, 90, LATER), (OTHER, 20, 1)], 0, 0.0),  # before
        ([MINE], [], 6, 0.0),  # no samples
        ([OTHER], [(OTHER, 50, LATER)], 0, None),  # numbers of another container's
        ([MINE], [], 3, None),  # not supported
    ],
)
def test_a_gpu_says_what_others_take(running, used, status, share, monkeypatch):
    monkeypatch.setattr(nvml, "library", lambda: Driver(running, used, status))
    assert nvml.others_on_gpu("GPU-1")() == share
    assert nvml.others_on_gpu("GPU-2")() is None


def test_an_older_driver_or_none_says_nothing(monkeypatch):
    monkeypatch.setattr(nvml, "library", lambda: None)
    assert nvml.others_on_gpu("GPU-1")() is None
    monkeypatch.setattr(Driver, "nvmlDeviceGetComputeRunningProcesses_v3", property())
    monkeypatch.setattr(nvml, "library", lambda: Driver([], []))
    assert nvml.others_on_gpu("GPU-1")() is None


@pytest.mark.parametrize(("share", "contended"), [(0.5, True), (0.01, False), (None, False)])
def test_a_point_is_contended_where_another_process_computes_on_the_gpu(share, contended, monkeypatch):
    monkeypatch.setattr(alone, "gpu_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(alone, "others_on_gpu", lambda uuid: lambda: share)
    monkeypatch.setattr(alone, "_clocks", lambda: (0.0, 0.0, 0.0))
    load = alone.Load(torch.device("cuda", 0))
    assert load.contended() == contended and load.other_load() == (share or 0.0)
