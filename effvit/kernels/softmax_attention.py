"""Softmax attention: softmax(q kᵀ / √d) v."""

import torch
from torch import Tensor
from torch.nn import functional as F

_COPIED_NUMBERS = 2**21  # 8 MiB of float32


def reference(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Queries ``(B, H, N, d)``, keys ``(B, H, M, d)`` and values ``(B, H, M, e)`` to ``(B, H, N, e)``.

    Dropout acts on the probabilities.
    """
    probabilities = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)  # (B, H, N, M)
    return F.dropout(probabilities, dropout_p) @ v


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """PyTorch's kernel, which holds no N x M matrix where that pays."""
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
    "by PyTorch": by_pytorch,
    "in float32": in_float32,
    "in float32, by samples": in_float32_by_samples,
}
