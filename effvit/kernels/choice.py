"""Which form of a primitive runs: decided here alone, by device, processor, and who is watching.

``EFFVIT_KERNELS=reference`` in the environment forces the equations. What was decided is in every result's provenance.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks

from effvit.errors import UserError
from effvit.processor import is_amds

F_ = TypeVar("F_", bound=Callable[..., Any])
_ASKED = os.environ.get("EFFVIT_KERNELS", "")
if _ASKED not in ("", "reference"):
    raise UserError(f"EFFVIT_KERNELS={_ASKED}: expected reference, or nothing for the fastest forms")
ONLY_REFERENCE = _ASKED == "reference"
_LINEAR = F.linear  # counters such as ptflops put their own in its place
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

# PyTorch sends products of a linear map to MKL, which measures about half of oneDNN's speed at a ViT's shapes on an AMD
# processor with AVX-512 (many rows, few columns: 80 against 180 GFLOP/s on one Zen 5 core), and 0.9 of it with AVX2
# (Zen 3). On a processor of Intel's (Sapphire Rapids) both are as fast forward, MKL 1.3 to 2.5 times as fast for the
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


def choices() -> dict[str, str]:
    """What is decided for this machine, for the provenance of a result: primitive to form."""
    if ONLY_REFERENCE:
        return {"all": "reference"}
    return {
        "linear": "oneDNN" if ONEDNN_PRODUCTS else "torch",
        "linear's weight gradient": "oneDNN" if ONEDNN_WEIGHT_GRADIENTS else "torch",
        "exponential": "2^x" if POWERS_OF_TWO else "e^x",
        "long attention in half precision": "float32" if LONG_ATTENTION_IN_FLOAT32 else "torch",
    }


def on_cpu(*tensors: Tensor) -> bool:
    """Whether forms written for a CPU may take these tensors: plain ones, run eagerly, with nobody watching.

    Compilers, tracers and exporters, ``torch.func``, forward-mode differentiation and whatever counts operators are
    given PyTorch's own operators instead, which they know.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or ONLY_REFERENCE:
        return False
    if torch._C._are_functorch_transforms_active() or in_forward_mode():
        return False
    if torch._C._len_torch_dispatch_stack() or F.linear is not _LINEAR:
        return False
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken (``torch.func.jvp``), which PyTorch's attention kernels lack."""
    return forward_ad._current_level >= 0


def primitive(function: F_) -> F_:
    """Let torch.fx take a primitive as one step, whose choices depend on what only real tensors have."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, Proxy):
                return argument.tracer.create_proxy("call_function", call, args, kwargs)
        return function(*args, **kwargs)

    return cast(F_, call)


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a linear layer is x Wᵀ + b and nothing else, so that W may be read in place of the call.

    Not so with hooks, pruning, parametrisations, adapters, quantised weights, or a ``forward`` of its own.
    """
    return (
        type(layer) is nn.Linear
        and "forward" not in layer.__dict__
        and "weight" in layer._parameters
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and not (global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)
        and not (global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)
        and type(layer.weight) in (Tensor, nn.Parameter, *_WITHOUT_DATA)
    )


_WITHOUT_DATA = (torch._subclasses.FakeTensor,)
