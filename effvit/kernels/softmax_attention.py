"""Softmax attention: softmax(q kᵀ / √d) v."""

import torch
from torch import Tensor
from torch.nn import functional as F

from effvit import policy
from effvit.kernels import choice

_SHORT, _LONG = 128, 1024  # tokens
_FEW_HEADS = 8192  # queries: of 2^17 tokens a GPU then has more multiprocessors than there are heads
_COPIED_NUMBERS = 2**21  # 8 MiB of float32


def reference(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Queries ``(B, H, N, d)``, keys ``(B, H, M, d)`` and values ``(B, H, M, e)`` to ``(B, H, N, e)``.

    Dropout acts on the probabilities.
    """
    probabilities = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)  # (B, H, N, M)
    return F.dropout(probabilities, dropout_p) @ v


@choice.primitive
def softmax_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`reference` without the N x M matrix in memory, where that pays."""
    if policy.ONLY_REFERENCE or choice.in_forward_mode():  # PyTorch's kernels have no forward mode
        return reference(q, k, v, dropout_p)
    trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    rows, columns = q.shape[-2], k.shape[-2]
    if q.device.type == "cuda" and trained and columns <= _SHORT and rows >= _FEW_HEADS:
        # FlashAttention's backward pass is parallel over blocks of 128 keys: here it would be one program per head.
        return reference(q, k, v, dropout_p)
    if q.device.type == "cpu" and v.dtype in (torch.bfloat16, torch.float16):
        if trained and max(rows, columns) <= _SHORT:
            # In half precision the CPU's backward pass over sequences this short takes up to four times as long.
            return in_float32(q, k, v, dropout_p)
        pays = policy.LONG_ATTENTION_IN_FLOAT32 and choice.on_cpu(q, k, v)
        if not trained and min(rows, columns) >= _LONG and pays:
            return in_float32_by_samples(q, k, v, dropout_p)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)


def in_float32(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """PyTorch's kernel on copies in float32; the result is of ``v``'s precision."""
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout_p).to(v.dtype)


def in_float32_by_samples(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """`in_float32` a few samples at a time: copies of all of them would be memory that is new at every call."""
    at_once = max(1, _COPIED_NUMBERS // max(tensor.shape[1:].numel() for tensor in (q, k, v)))
    parts = zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True)
    return torch.cat([in_float32(*part, dropout_p).transpose(1, 2) for part in parts]).transpose(1, 2)


FORMS = {
    "torch": F.scaled_dot_product_attention,
    "in float32": in_float32,
    "in float32, by samples": in_float32_by_samples,
}
