"""Kernels in Triton, as far as they can be proved without a GPU: run by its interpreter, and compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effvit import policy

pytestmark = pytest.mark.slow

NUMERICS = Path(__file__).with_name("numerics_of_triton.py")
# Bytes of a thread block on GPUs of compute capability 8.6 and 8.9, the smallest that these kernels run on.
SHARED_MEMORY = 99 * 1024


def test_the_interpreter_gives_the_numbers_of_the_references():
    pytest.importorskip("triton")
    # A process of its own: Triton reads the variable as it is imported.
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(NUMERICS)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import torch
from effvit import build_attention, policy
assert policy.TRITON_ON is None and not policy.takes_triton(torch.device("cuda"))
assert "torch" in policy.kernels(torch.device("cuda")) and "Triton" not in policy.kernels(torch.device("cuda"))
for name in ("performer", "linear", "nystromformer"):
    build_attention(name, dim=24, num_heads=2, grid_size=(5, 5))(torch.zeros(1, 26, 24)).sum().backward()
assert not [name for name in sys.modules if name.startswith("effvit.kernels.cuda")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("capability", "expected"), [(7, False), (8, True), (9, True)])
def test_gpus_with_tf32_take_them(capability, expected, monkeypatch):
    monkeypatch.setattr(policy, "TRITON_ON", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=capability))
    assert policy.takes_triton(torch.device("cuda")) == expected
    assert not policy.takes_triton(torch.device("cpu"))
    assert ("Triton" in policy.kernels(torch.device("cuda"))) == expected


AMPERE, HOPPER = 80, 90
# Of the kinds with several sizes the largest alone are compiled for both, which have the same registers to a thread.
for_both = pytest.mark.parametrize("compiled", [AMPERE, HOPPER], indirect=True, ids="sm_{}".format)


def sizes(names, largest, others):
    """Tests of these sizes: the largest for both GPUs, the others for the older one."""
    cases = [(gpu, *size) for gpu in (AMPERE, HOPPER) for size in largest] + [(AMPERE, *size) for size in others]
    return pytest.mark.parametrize(("compiled", *names), cases, indirect=["compiled"])


@pytest.fixture
def compiled(request, monkeypatch):
    """What launches compile to in place of running, for a GPU that is not here."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDriver:
        def get_current_device(self):
            return request.param

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", request.param, 32)

    found = []
    monkeypatch.setattr(driver, "_active", NoDriver())
    monkeypatch.setattr(
        JITFunction,
        "__getitem__",
        lambda kernel, grid: lambda *args, **options: found.append(kernel.warmup(*args, grid=grid, **options)),
    )
    return found


def assert_in_registers(compiled, number, directory):
    """A multiprocessor has the shared memory, and nothing is kept in a thread's own part of the GPU's memory."""
    import triton

    assert len(compiled) == number
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY
        file = directory / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True).stdout
        # What does not fit into registers is on the stack.
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], (kernel.name, usage)


# Widths of 12 compile to what those of 16 do, and the number of features is known when they run.
@sizes(
    ("kernel", "d", "m", "dtype"),
    [("exp", 64, 128, torch.float32), ("focused", 64, None, torch.float32), ("focused", 64, None, torch.bfloat16)],
    [("exp", 32, 128, torch.bfloat16), ("softmax", 12, None, torch.bfloat16)],
)
def test_attention_by_features_stays_in_registers(kernel, d, m, dtype, compiled, tmp_path):
    from effvit.kernels.cuda.feature_attention import attend
    from effvit.kernels.cuda.feature_gradients import attend_backward

    q, k, v = (torch.empty(1, 2048, 2, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    omega = torch.empty(2, 1, d) if kernel == "focused" else None if m is None else torch.empty(m, d)
    y, state = attend(q, k, v, omega, kernel, 0.1, 0.5)
    attend_backward(y, q, k, v, omega, state, kernel, 0.1, 0.5)
    assert_in_registers(compiled, 6, tmp_path)


@for_both
def test_the_pseudo_inverse_stays_in_registers(compiled, tmp_path):
    from effvit.kernels.cuda.pseudo_inverse import LARGEST, invert, invert_backward

    a = torch.empty(2, LARGEST, LARGEST)
    invert_backward(invert(a, 6), a, 6)
    assert_in_registers(compiled, 3, tmp_path)


@for_both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_convolution_stays_in_registers(dtype, compiled, tmp_path):
    from effvit.kernels.cuda.token_convolution import convolution, convolution_backward

    x, kernels = torch.empty(2, 2048, 96, dtype=dtype), torch.empty(96, 33, dtype=dtype)
    convolution_backward(convolution(x, kernels, x), x, kernels)
    assert_in_registers(compiled, 3, tmp_path)


@sizes(
    ("w", "prefix", "d", "dtype", "number"),
    [(8, 1, 64, torch.float32, 9), (8, 1, 64, torch.bfloat16, 8)],
    [
        *[(5, 1, 64, torch.float32, 8), (4, 1, 64, torch.float32, 8), (4, 1, 64, torch.bfloat16, 8)],
        (7, 0, 32, torch.bfloat16, 3),
    ],
)
def test_attention_in_windows_stays_in_registers(w, prefix, d, dtype, number, compiled, tmp_path):
    from effvit.kernels.cuda.window_attention import attend
    from effvit.kernels.cuda.window_gradients import attend_backward

    q, k, v = (torch.empty(1, prefix + 32 * 32, 3, d, dtype=dtype).transpose(1, 2) for _ in range(3))
    windows = [2, 32, 32, w, 1, 0]  # and a head that has none
    y, of_prefix, state = attend(q, k, v, windows)
    others = q[:, 2:, prefix:], k[:, 2:], v[:, 2:]
    attend_backward(y, of_prefix, others, q, k, v, state, windows)
    assert_in_registers(compiled, number, tmp_path)
