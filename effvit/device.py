"""Which device to run on, and the machine that a result belongs to."""

import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch

from effvit import policy
from effvit.errors import UserError, say_once
from effvit.processor import processor_name

_Answer = TypeVar("_Answer")
_SDPA = {"cuda": ("cudnn", "flash", "mem_efficient", "math"), "cpu": ("flash", "math")}
_ROUNDING = {
    "cuda": {"products": "cuda.matmul", "convolutions": "cudnn.conv"},
    "cpu": {"products": "mkldnn.matmul", "convolutions": "mkldnn.conv"},
}


@dataclass(frozen=True)
class Machine:
    """What a measured result belongs to, in addition to code and settings; the same at every run on one machine.

    None stands for what the device does not have, and for what this version of PyTorch cannot tell.
    """

    device: str  # cpu, cuda or mps
    processor: str
    processors: int | None  # logical ones
    threads: int  # of PyTorch on the CPU
    instructions: str | None  # that PyTorch's CPU kernels use, e.g. AVX512
    gpu: str | None
    gpu_memory_mib: int | None
    gpu_clock_mhz: int | None  # the highest of its multiprocessors
    compute_capability: str | None
    driver: str | None
    cuda: str | None
    cudnn: int | None
    sdpa: str  # kernels that PyTorch may take for softmax attention
    kernels: str  # forms that `effvit.policy` chose, or reference
    tf32: str  # float32 operations that may round to TF32
    torch: str

    @property
    def name(self) -> str:
        """The chip that computes: the GPU on CUDA, the processor otherwise."""
        return self.gpu or self.processor


def pick_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``mps`` into a device that is there; raises ``UserError`` otherwise.

    Of several GPUs it is the one with the lowest memory in use.
    """
    there = {"cuda": _cuda_is_usable(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        if not there["cuda"] and (reason := unusable_gpu()):
            say_once(reason)
        name = next(kind for kind, available in there.items() if available)
    if name not in there:
        raise UserError(f"device={name!r}: unknown, expected one of auto, {', '.join(there)}")
    if not there[name]:
        reason = unusable_gpu() if name == "cuda" else None
        raise UserError(
            f"device={name}: not available on this machine; try auto or cpu" + (f" ({reason})" * bool(reason))
        )
    if name == "cuda" and torch.cuda.device_count() > 1:
        return torch.device(name, _emptiest_gpu())
    return torch.device(name)


def measuring_device(name: str) -> torch.device:
    """Return the device to measure on; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device here, or one whose peak memory PyTorch cannot tell exactly.
    """
    if name == "mps":
        raise UserError("device=mps: peak memory cannot be told exactly there; measure on cpu or cuda")
    if name == "auto" and pick_device("auto").type != "cuda":
        return torch.device("cpu")
    return pick_device(name)


def this_machine(device: torch.device) -> Machine:
    """Describe the machine, with ``device`` as the one that computes."""
    rounding = _ROUNDING.get(device.type, {})
    return Machine(
        device=device.type,
        processor=processor_name(),
        processors=os.cpu_count(),
        threads=torch.get_num_threads(),
        instructions=_ask(lambda: torch.backends.cpu.get_cpu_capability()),
        sdpa=_names(_SDPA.get(device.type, ("math",)), _has_sdpa),
        kernels=policy.kernels(device),
        tf32=_names(rounding, lambda operation: _rounds(rounding[operation])),
        torch=torch.__version__,
        **_gpu(device),
    )


def _ask(question: Callable[[], _Answer]) -> _Answer | None:
    """None where this version or build of PyTorch has no answer."""
    try:
        return question()
    except (AttributeError, RuntimeError):
        return None


def _names(candidates: Iterable[str], applies: Callable[[str], bool]) -> str:
    return ", ".join(filter(applies, candidates)) or "none"


def _has_sdpa(kernel: str) -> bool:
    return bool(_ask(lambda: getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()))


def _rounds(backend: str) -> bool:
    """Whether a backend such as ``cuda.matmul`` may compute in TF32."""
    get = attrgetter(backend)
    precision = _ask(lambda: get(torch.backends).fp32_precision)
    if precision is None:  # before PyTorch 2.9
        older = attrgetter(backend.removesuffix(".conv"))
        return bool(_ask(lambda: older(torch.backends).allow_tf32))
    return precision == "tf32"


def _gpu(device: torch.device) -> dict[str, Any]:
    """Fields of a GPU, all None on other devices."""
    fields = ("gpu", "gpu_memory_mib", "gpu_clock_mhz", "compute_capability", "driver", "cuda", "cudnn")
    if device.type != "cuda":
        return dict.fromkeys(fields)
    properties = torch.cuda.get_device_properties(device)
    values = (
        properties.name,
        properties.total_memory // 2**20,
        _clock_mhz(),
        f"{properties.major}.{properties.minor}",
        _driver(),
        torch.version.cuda,
        _ask(lambda: torch.backends.cudnn.version()),
    )
    return dict(zip(fields, values, strict=True))


def gpu_uuid(device: torch.device) -> str:
    """UUID of a GPU, by which all programs know it: PyTorch, the driver's tool and its library number them each."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"


@functools.cache
def _emptiest_gpu() -> int:
    """Number of the GPU of those that PyTorch sees with the lowest memory in use; the first where nobody knows.

    Asked once a process, which would otherwise move away from its own memory.
    """
    used = dict(line.split(", ") for line in _ask_driver("uuid", "memory.used") if line.count(", ") == 1)
    known = {uuid: int(mib) for uuid, mib in used.items() if mib.isdecimal()}
    numbers = range(torch.cuda.device_count())
    return min(numbers, key=lambda number: known.get(gpu_uuid(torch.device("cuda", number)), 0))


@functools.cache
def _driver() -> str | None:
    """Version of NVIDIA's driver, which PyTorch does not know; None where NVIDIA's own tool does not say."""
    said = _ask_driver("driver_version")
    return said[0] if said else None


@functools.cache
def _clock_mhz() -> int | None:
    said = _ask_driver("clocks.max.sm")
    return int(said[0]) if said and said[0].isdecimal() else None


def _ask_driver(*fields: str) -> list[str]:
    """What NVIDIA's tool says of each GPU, a line each; nothing without the tool."""
    command = ("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return said.splitlines()


def _cuda_is_usable() -> bool:
    return torch.cuda.is_available() and _ask(_too_old_gpu) is None


def _too_old_gpu() -> str | None:
    """Why this PyTorch has no kernels for the first GPU; None where it has."""
    capabilities = [re.fullmatch(r"sm_(\d+)", arch) for arch in torch.cuda.get_arch_list()]
    oldest = min((int(found[1]) for found in capabilities if found), default=0)
    properties = torch.cuda.get_device_properties(0)
    if properties.major * 10 + properties.minor >= oldest:
        return None
    has, needs = f"{properties.major}.{properties.minor}", f"{oldest // 10}.{oldest % 10}"
    return f"{properties.name} has compute capability {has}, PyTorch {torch.__version__} needs {needs} or more"


def unusable_gpu() -> str | None:
    """Why a GPU of NVIDIA's that is here is not used, and what helps; None where there is none, or it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    if torch.cuda.is_available():
        reason = _ask(_too_old_gpu)
        return reason and f"{reason}: make env TORCH=cu126"
    said = _ask_driver("name", "driver_version")
    if not said:
        return None
    name, _, driver = said[0].partition(", ")
    if torch.version.cuda is None:
        return f"{name} is not used, PyTorch {torch.__version__} is built for the CPU: make env"
    return f"{name} is not used, CUDA {torch.version.cuda} needs a newer driver than {driver}: make env TORCH=cu126"
