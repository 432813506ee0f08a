"""Exact multiply-adds, counted by ptflops from the products that a forward pass executes.

One MAC is one multiply-add of a matrix product or convolution. Bias, softmax, exp, normalisation and pooling are not
counted. FLOPs = 2 * MACs.
"""

import copy
from collections.abc import Callable, Sequence
from math import prod

import torch
from ptflops import get_model_complexity_info
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effvit import policy

aten = torch.ops.aten


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Count the multiply-adds of one forward pass in eval mode for one sample.

    Args:
        model: any module of one tensor input. It runs on tensors that have a shape and a device but no data, so that
            no time or memory is spent on the products themselves.
        example: input of shape ``(B, ...)``; only its shape, dtype and device matter, and B does not.

    Raises:
        RuntimeError: the model cannot run on this input; ptflops has printed why.
    """
    counted = copy.deepcopy(model)  # ptflops leaves its hooks behind
    # In inference mode linear and matmul reach the counter whole instead of as the products they consist of.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with policy.nothing_noted(), torch.inference_mode(False), torch.no_grad(), fake:
        sample = torch.empty(1, *example.shape[1:], dtype=example.dtype, device=example.device)
        macs, _ = get_model_complexity_info(
            counted,
            tuple(sample.shape),
            input_constructor=lambda _: sample,
            backend="aten",
            custom_modules_hooks=_COUNTERS,
            print_per_layer_stat=False,
            as_strings=False,
        )
    if macs is None:
        raise RuntimeError(f"count_macs: the model does not run on an input of shape {tuple(sample.shape)}")
    return int(macs)


def _matrix_product(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    a, b = inputs[:2]
    return a.numel() * b.shape[-1]


def _added_matrix_product(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    return _matrix_product(inputs[1:], outputs)


def _vector_product(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    return inputs[0].numel()


def _added_vector_product(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    return inputs[1].numel()


def _convolution(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    x, weight, transposed = inputs[0], inputs[1], inputs[6]
    positions = (x if transposed else outputs[0]).shape[2:]
    return x.shape[0] * weight.numel() * prod(positions)


def _attention(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    q, k, v = inputs[:3]
    queries = q.numel() // q.shape[-1]
    return queries * k.shape[-2] * (q.shape[-1] + v.shape[-1])


# ptflops' own aten counters add biases and know no fused attention; these replace and complete them.
_COUNTERS: dict[object, Callable[[Sequence[Tensor], Sequence[Tensor]], int]] = {
    aten.mm: _matrix_product,
    aten.bmm: _matrix_product,
    aten.addmm: _added_matrix_product,
    aten.baddbmm: _added_matrix_product,
    aten.addbmm: _added_matrix_product,
    aten.mv: _vector_product,
    aten.dot: _vector_product,
    aten.addmv: _added_vector_product,
    aten.convolution: _convolution,
    aten._convolution: _convolution,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
}
