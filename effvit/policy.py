"""What runs how on this machine: kernels by processor, and on a GPU precision, attention kernels and determinism.

``EFFVIT_KERNELS=reference`` in the environment forces the equations. What was decided is in every result's provenance.
"""

import os
import shutil
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from effvit.errors import UserError, say_once
from effvit.processor import is_amds

Precision = Literal["float32", "tf32", "bfloat16"]
"""Of a measurement: TF32 rounds float32's factors, on CUDA; bfloat16 is by autocast."""
Execution = Literal["eager", "compiled", "graphs"]

_CPU = torch.device("cpu")
_ASKED = os.environ.get("EFFVIT_KERNELS", "")
if _ASKED not in ("", "reference"):
    raise UserError(f"EFFVIT_KERNELS={_ASKED}: expected reference, or nothing for the fastest forms")
ONLY_REFERENCE = _ASKED == "reference"


def _triton_lacks() -> str | None:
    """What Triton, where it is installed, needs on Linux to launch a kernel and does not find."""
    if sys.platform != "linux":
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    return None if Path(sysconfig.get_path("include"), "Python.h").is_file() else "Python.h (python3-dev)"


_TRITON = find_spec("triton") is not None and torch.version.hip is None
TRITON_ON = "cuda" if _TRITON and _triton_lacks() is None else None
"""Kind of device on which kernels of `effvit.kernels.cuda` run: GPUs of NVIDIA, and none without Triton."""
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# PyTorch sends products of a linear map to MKL, which measures about half of oneDNN's speed at a ViT's shapes on an AMD
# processor with AVX-512 (many rows, few columns: 80 against 180 GFLOP/s on one Zen 5 core), and 0.9 of it with AVX2
# (Zen 3). On an Intel processor (Sapphire Rapids) both are equally fast forward, MKL 1.3 to 2.5 times as fast for the
# gradient of the weights, and 3 times for 65 rows of 48 columns.
ONEDNN_PRODUCTS = _ONEDNN is not None and is_amds()
# oneDNN writes ∂y and x anew for the product ∂yᵀ x, where MKL reads them as they lie. Its products make up for that on
# Zen 5 (0.7 to 0.9 of MKL's time, 16 K rows of 192 and 384 columns); on Zen 4 it takes 1.15 times as long, on Zen 3
# 1.4 to 2 times.
ONEDNN_WEIGHT_GRADIENTS = ONEDNN_PRODUCTS and is_amds(least_family=26)
# PyTorch's 2^x takes a quarter of the time of its e^x on AMD's processors.
POWERS_OF_TWO = is_amds()
# Over long sequences AMD's processors (Zen 4, Zen 5) take 1.05 to 1.2 times as long in bfloat16 as in float32, 1.8 to
# 2.1 times in float16.
LONG_ATTENTION_IN_FLOAT32 = is_amds()


def kernels(device: torch.device = _CPU) -> str:
    """What is decided for this machine: form of each primitive that has a choice on ``device``."""
    if ONLY_REFERENCE:
        return "reference"
    if device.type == "cuda":
        form = "Triton" if takes_triton(device) else "torch"
        primitives = ("features", "windows", "pseudo-inverse", "token convolution")
        return ", ".join(f"{primitive}: {form}" for primitive in primitives)
    forms = {
        "linear": "oneDNN" if ONEDNN_PRODUCTS else "torch",
        "its weight gradient": "oneDNN" if ONEDNN_WEIGHT_GRADIENTS else "torch",
        "exponential": "2^x" if POWERS_OF_TWO else "e^x",
        "long attention in half precision": "float32" if LONG_ATTENTION_IN_FLOAT32 else "torch",
    }
    return ", ".join(f"{primitive}: {form}" for primitive, form in forms.items())


def note(primitive: str, form: str) -> None:
    """Keep in mind that a form of a primitive ran; compilers call this while they trace."""
    _ran[primitive].add(form)


# What torch.compiler.assume_constant_result does; that one loads the whole compiler, for seconds.
note._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def nothing_noted() -> Iterator[None]:
    """For what runs only to be counted, by other forms."""
    before = {primitive: set(forms) for primitive, forms in _ran.items()}
    try:
        yield
    finally:
        _ran.clear()
        _ran.update(before)


def ran() -> dict[str, str]:
    """The forms of each primitive that ran in this process, or were compiled."""
    return {name: ", ".join(sorted(form.lstrip("_") for form in _ran[name])) for name in sorted(_ran)}


_ran: dict[str, set[str]] = defaultdict(set)


def takes_triton(device: torch.device) -> bool:
    """Whether a device runs kernels of `effvit.kernels.cuda`, whose products need tensor cores that know TF32."""
    if device.type != TRITON_ON:
        return False
    # The properties, which compilers know as a constant; the capability they would put into their graph.
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 8


def training_precision(name: str, device: torch.device) -> str:
    """The precision that ``auto`` stands for: bf16-mixed on GPUs whose tensor cores take bfloat16, else 32-true."""
    if name != "auto":
        return name
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16-mixed" if modern else "32-true"


def apply(device: torch.device, *, deterministic: bool, tf32: bool = True, threads: int = 0) -> None:
    """Set PyTorch up, for the whole process, as training and all measurements have it.

    Args:
        device: the one that computes.
        deterministic: whether the same input gives the same bytes, by slower kernels where need be.
        tf32: whether float32 products and convolutions on a GPU may round their factors to TF32 (10 bits).
        threads: of a CPU; 0 for as many as it is.
    """
    # use_deterministic_algorithms would also load Inductor, for 1.6 s: `compile_blocks` does that where it is used.
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Every buffer here is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu" and threads:
        torch.set_num_threads(threads)
    if device.type != "cuda":
        return
    if deterministic:  # cuBLAS is so with a workspace of fixed size alone, set before its first call
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if _TRITON and (lacking := _triton_lacks()):
        say_once(f"Triton finds no {lacking.removeprefix('a ')}: kernels of PyTorch run in place of its own, slower")
    # The older of PyTorch's two interfaces sets both, but leaves convolutions to what was set for all.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    for backend in _newer("cudnn.conv", "cudnn.rnn") if not tf32 else ():
        backend.fp32_precision = "ieee"
    # The default of Hopper and later in some modes and not in others, with NaN gradients in masked windows: a baseline
    # of its own, by `cudnn_attention`.
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def kept() -> Iterator[None]:
    """Undo afterwards whatever `apply` changes meanwhile."""
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    cudnn, threads = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_num_threads()
    try:
        with _rounding_kept():
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.set_num_threads(threads)


def rounds_products() -> bool:
    """Whether float32 products on a GPU may round their factors to TF32."""
    products = torch.backends.cuda.matmul
    if hasattr(products, "fp32_precision"):  # from PyTorch 2.9 on, and readable whichever interface set it
        return bool(products.fp32_precision == "tf32")
    return products.allow_tf32


def _newer(*names: str) -> list[Any]:
    """Those of PyTorch's back ends that round as its newer interface says: none before PyTorch 2.9."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return []
    return [attrgetter(name)(torch.backends) for name in names]


@contextmanager
def _rounding_kept() -> Iterator[None]:
    """Undo afterwards what is set meanwhile of how float32 rounds.

    By both interfaces: where the newer was used, PyTorch does not let the older be read.
    """
    try:
        products: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = None
    try:
        convolutions: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolutions = None
    newer = [(each, each.fp32_precision) for each in _newer("cuda.matmul", "mkldnn.matmul", "cudnn.conv", "cudnn.rnn")]
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for each, precision in newer:
            each.fp32_precision = precision


@contextmanager
def cudnn_attention() -> Iterator[None]:
    """Softmax attention by cuDNN alone; PyTorch raises RuntimeError where cuDNN does not take the tensors."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield
