import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from effvit import device, policy
from effvit.device import measuring_device, pick_device, this_machine
from effvit.errors import UserError, say_once

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """A GPU as PyTorch describes it, and the tool of its driver."""
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=150_121_545_728, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    tool = tmp_path / "nvidia-smi"
    said = "--query-gpu=driver_version) echo 580.65.06 ;; --query-gpu=clocks.max.sm) echo 1980"
    tool.write_text(f'#!/bin/sh\ncase "$1" in {said} ;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    device._driver.cache_clear()
    device._clock_mhz.cache_clear()
    with policy.kept():  # PyTorch's defaults, whatever earlier tests left
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
        yield tool
    device._driver.cache_clear()
    device._clock_mhz.cache_clear()


def test_a_cpu_is_described_by_its_name_and_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        machine = this_machine(CPU)
        torch.set_num_threads(3)
        assert this_machine(CPU) == replace(machine, threads=3)
    finally:
        torch.set_num_threads(threads)
    assert (machine.device, machine.threads, machine.processors) == ("cpu", 1, os.cpu_count())
    assert machine.name == machine.processor
    if Path("/proc/cpuinfo").exists() and (
        named := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    ):
        assert named[1] in machine.processor


def test_what_runs_on_the_cpu_does_not_name_the_gpu(h200):
    machine = this_machine(CPU)
    assert "H200" not in machine.name
    assert {machine.gpu, machine.gpu_memory_mib, machine.driver, machine.cuda, machine.cudnn} == {None}


def test_a_gpu_is_described_with_its_driver_and_libraries(h200):
    machine = this_machine(CUDA)
    assert (machine.device, machine.name, machine.gpu) == ("cuda", "NVIDIA H200", "NVIDIA H200")
    assert (machine.gpu_memory_mib, machine.compute_capability, machine.gpu_clock_mhz) == (143_167, "9.0", 1980)
    assert (machine.driver, machine.cuda, machine.cudnn) == ("580.65.06", "13.0", 91300)
    assert machine.processor == this_machine(CPU).processor


@pytest.mark.parametrize("tool", ["exit 9", "true"], ids=["fails", "says nothing"])
def test_a_driver_that_does_not_say_its_version_is_none(h200, tool):
    h200.write_text(f"#!/bin/sh\n{tool}\n")
    assert (this_machine(CUDA).driver, this_machine(CUDA).gpu_clock_mhz) == (None, None)


def test_without_the_drivers_tool_its_version_is_none(h200, monkeypatch, tmp_path):
    h200.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine(CUDA).driver is None


def test_the_attention_kernels_are_those_that_may_be_chosen(h200):
    assert this_machine(CPU).sdpa == "flash, math"
    assert this_machine(CUDA).sdpa == "cudnn, flash, mem_efficient, math"
    with sdpa_kernel([SDPBackend.MATH]):
        assert this_machine(CPU).sdpa == this_machine(CUDA).sdpa == "math"


def test_results_of_the_equations_are_not_those_of_the_fastest_kernels(monkeypatch):
    machine = this_machine(CPU)
    assert "exponential: " in machine.kernels
    monkeypatch.setattr(policy, "ONLY_REFERENCE", True)
    assert this_machine(CPU) == replace(machine, kernels="reference")


def test_tf32_is_told_where_it_is_allowed(h200, monkeypatch):
    assert (this_machine(CPU).tf32, this_machine(CUDA).tf32) == ("none", "convolutions")  # PyTorch's default
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert this_machine(CUDA).tf32 == "products, convolutions"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_what_an_older_pytorch_does_not_tell_is_none(h200, monkeypatch):
    known = SimpleNamespace(matmul=SimpleNamespace(allow_tf32=True), flash_sdp_enabled=lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "backends", SimpleNamespace(cuda=known))
        machine = this_machine(CUDA)
    assert (machine.instructions, machine.cudnn) == (None, None)
    assert (machine.sdpa, machine.tf32) == ("flash", "products")


def test_a_gpu_that_the_driver_keeps_from_pytorch_is_told_once_and_the_cpu_taken(h200, monkeypatch, capsys):
    h200.write_text('#!/bin/sh\necho "NVIDIA L4, 535.183.01"\n')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    say_once.cache_clear()
    assert [pick_device("auto").type for _ in range(2)] == ["cpu", "cpu"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "NVIDIA L4 is not used, CUDA 13.0 needs a newer driver than 535.183.01: make env TORCH=cu126"
    with pytest.raises(UserError, match=r"device=cuda: not available .* \(NVIDIA L4 is not used, .* TORCH=cu126\)"):
        pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for the CPU: make env" in device.unusable_gpu()
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device.unusable_gpu() is None, "whoever hides a GPU knows that it is there"


def test_a_gpu_without_kernels_in_this_pytorch_is_not_taken(h200, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100", "sm_75", "compute_120"])
    assert pick_device("auto").type == "cuda"
    old = SimpleNamespace(name="Tesla V100", total_memory=2**34, major=7, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    say_once.cache_clear()
    assert pick_device("auto").type == "cpu"
    assert "Tesla V100 has compute capability 7.0" in (said := capsys.readouterr().err)
    assert "needs 7.5 or more: make env TORCH=cu126" in said
    with pytest.raises(UserError, match="device=cuda: not available"):
        pick_device("cuda")


def test_of_several_gpus_the_one_with_least_memory_in_use_is_taken(h200, monkeypatch):
    """By UUID: the driver's tool numbers them otherwise."""
    uuids = ["11aa", "22bb", "33cc"]
    of = {n: SimpleNamespace(name="NVIDIA L4", major=8, minor=9, uuid=uuid) for n, uuid in enumerate(uuids)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of[getattr(device, "index", device)])
    h200.write_text("#!/bin/sh\nprintf 'GPU-33cc, 900\\nGPU-11aa, 700\\nGPU-44dd, 0\\nGPU-22bb, 3\\n'\n")
    device._emptiest_gpu.cache_clear()
    assert pick_device("auto") == pick_device("cuda") == measuring_device("auto") == torch.device("cuda", 1)
    h200.write_text("#!/bin/sh\nprintf 'GPU-33cc, 0\nGPU-11aa, 0\nGPU-22bb, 9000\n'\n")
    assert pick_device("cuda") == torch.device("cuda", 1), "where this process is already"
    device._emptiest_gpu.cache_clear()
    h200.write_text("#!/bin/sh\nexit 9\n")
    assert pick_device("cuda") == torch.device("cuda", 0)
    device._emptiest_gpu.cache_clear()


def test_measurements_take_the_gpu_or_the_cpu_and_never_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (pick_device("auto").type, measuring_device("auto").type) == ("mps", "cpu")
    with pytest.raises(UserError, match="device=mps: peak memory"):
        measuring_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    assert measuring_device("auto").type == "cuda"
