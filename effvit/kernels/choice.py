"""Whether forms written for a device may run: by the device, and by who is watching."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules import module as global_hooks
from torch.utils._device import DeviceContext

from effvit import policy

F_ = TypeVar("F_", bound=Callable[..., Any])

_OF_TRITON = (torch.float32, torch.bfloat16, torch.float16)
# PyTorch 2.6 does not say whether it compiles or exports.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
_PLAIN = (Tensor, nn.Parameter)
_LINEAR = F.linear  # counters such as ptflops put their own in its place
_FORWARDS: dict[type[nn.Module], Any] = {
    kind: kind.forward for kind in (nn.Linear, nn.Conv2d)
}  # and others theirs in place of these


def on_cpu(*tensors: Tensor) -> bool:
    """Whether forms written for a CPU may take these tensors: plain ones, run eagerly, with nobody watching.

    Compilers, tracers and exporters, ``torch.func``, forward-mode differentiation and whatever counts operators are
    given PyTorch's own operators instead, which they know.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or policy.ONLY_REFERENCE:
        return False
    if torch._C._are_functorch_transforms_active() or in_forward_mode():
        return False
    if torch._C._len_torch_dispatch_stack() or F.linear is not _LINEAR or _in_function_mode():
        return False
    for tensor in tensors:  # noqa: SIM110, a generator would take as long as a small product
        if type(tensor) not in _PLAIN or not tensor.is_cpu:
            return False
    return True


def _in_function_mode() -> bool:
    """Whether functions of PyTorch's are watched, other than for where new tensors go."""
    number = torch._C._len_torch_function_stack()
    return number > 0 and any(type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(number))


def eager_on_cuda(*tensors: Tensor) -> bool:
    """Whether forms written for a GPU may take these tensors: plain ones, run eagerly, with nobody watching."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() or policy.ONLY_REFERENCE:
        return False
    if torch._C._are_functorch_transforms_active() or in_forward_mode() or F.linear is not _LINEAR:
        return False
    counted = any(type(tensor) in STAND_INS for tensor in tensors)
    if torch._C._len_torch_dispatch_stack() and not counted:
        return False
    plain = (*_PLAIN, *STAND_INS)
    return all(type(tensor) in plain and tensor.device.type == "cuda" for tensor in tensors)


def on_cuda(*tensors: Tensor) -> bool:
    """Whether the kernels of `effvit.kernels.cuda` may take these tensors: eagerly, or under ``torch.compile``.

    Exporters, tracers, ``torch.func``, forward-mode differentiation and whatever counts operators are given PyTorch's
    own operators instead.
    """
    if any(isinstance(tensor, Proxy) for tensor in tensors):
        return False
    if not all(tensor.device.type == policy.TRITON_ON and tensor.dtype in _OF_TRITON for tensor in tensors):
        return False
    if policy.ONLY_REFERENCE or in_forward_mode() or _is_exporting():
        return False
    if not torch.compiler.is_compiling():
        if torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active():
            return False
        if F.linear is not _LINEAR:
            return False
        if any(type(tensor) in STAND_INS for tensor in tensors):  # as if on a GPU that has all it takes
            return all(type(tensor) in (*_PLAIN, *STAND_INS) for tensor in tensors)
        if torch._C._len_torch_dispatch_stack():
            return False
    plain = all(type(tensor) in _PLAIN for tensor in tensors)
    return plain and policy.takes_triton(tensors[0].device)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``; there is none for tensors without numbers."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are taken (``torch.func.jvp``), which PyTorch's attention kernels lack."""
    return forward_ad._current_level >= 0


def one_at_a_time(backward: F_) -> F_:
    """Let the backward pass of one gradient take a batch of them, as ``is_grads_batched`` and Jacobians have it."""

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Tensor) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *gradients)
        batched = [gradient for gradient in gradients if torch._C._functorch.is_legacy_batchedtensor(gradient)]
        if not batched:
            return backward(ctx, *gradients)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        number = len(torch._remove_batch_dim(batched[0], level, 1, 0))
        each = zip(*(torch._remove_batch_dim(gradient, level, number, 0) for gradient in gradients), strict=True)
        found = zip(*(call(ctx, *of_one) for of_one in each), strict=True)
        return tuple(None if of[0] is None else torch._add_batch_dim(torch.stack(of), 0, level) for of in found)

    return cast(F_, call)


def through_equation(
    equation: Callable[..., Any], inputs: Sequence[Tensor], gradients: Tensor | Sequence[Tensor]
) -> Iterator[Tensor | None]:
    """Gradients of these inputs that have gradients themselves, where a backward pass of kernels has none."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    outputs = equation(*inputs)
    if not isinstance(outputs, Tensor):
        pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        outputs, gradients = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return (next(found) if tensor.requires_grad else None for tensor in inputs)


def one_step(function: F_) -> F_:
    """Let torch.fx take a function as one step, whose choices depend on what only real tensors have."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        step = step_of(call, args, kwargs)
        return function(*args, **kwargs) if step is None else step

    return cast(F_, call)


def step_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call as a step of the graph that torch.fx makes; None where it makes none."""
    for argument in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(argument, Proxy):
            return argument.tracer.create_proxy("call_function", function, args, kwargs)
    return None


@one_step
def cast_once(x: Tensor) -> Tensor:
    """Tokens as autocast would have them for a product on a GPU, where several products would each convert them."""
    if x.device.type == "cuda" and x.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        return x.to(torch.get_autocast_dtype("cuda"))
    return x


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> TypeGuard[Any]:
    """Whether calling a layer of this class is what the class says and nothing else.

    Then its weights may be read in place of the call. Not so with hooks, pruning, parametrisations, adapters, quantised
    weights, or a ``forward`` of its own.
    """
    return (
        type(layer) is kind
        and kind.forward is _FORWARDS.get(kind, kind.forward)
        and "forward" not in layer.__dict__
        and "weight" in layer._parameters
        and not _is_hooked(layer)
        and type(layer.weight) in (Tensor, nn.Parameter, torch._subclasses.FakeTensor, *STAND_INS)
    )


def is_plain_depthwise(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether calling a convolution is a kernel for each channel, zeros beyond the borders, and nothing else."""
    return (
        is_plain(layer, nn.Conv2d)
        and layer.bias is None
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.stride == layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and layer.padding == tuple(side // 2 for side in layer.kernel_size)
    )


STAND_INS: list[type[Tensor]] = []
"""Tensors without numbers that are taken for a GPU's own, so that what is done with those can be counted."""

_GLOBAL_HOOKS = (
    global_hooks._global_forward_hooks,
    global_hooks._global_forward_pre_hooks,
    global_hooks._global_backward_hooks,
    global_hooks._global_backward_pre_hooks,
)
# Whose hooks change nothing.
_COUNTERS = ("ptflops.aten_engine", "torch.utils.module_tracker", "torch.utils.flop_counter")


def _is_hooked(layer: nn.Module) -> bool:
    of_layer = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return (any(of_layer) or any(_GLOBAL_HOOKS)) and any(map(_acts, (*of_layer, *_GLOBAL_HOOKS)))


def _acts(hooks: Mapping[int, Callable[..., Any]]) -> bool:
    return any(not str(getattr(hook, "__module__", "")).startswith(_COUNTERS) for hook in hooks.values())
