"""The merged map with queries and keys turned by a matrix: Ω(W x + b) = (ΩW) x + Ωb."""

import torch
from torch import Tensor

from effvit.kernels import qkv
from effvit.kernels.qkv import Thirds


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, omega: Tensor, scale: float) -> Thirds:
    """Tokens ``(B, N, C)`` by ``weight`` ``(3C, C)`` and ``bias`` ``(3C,)`` to s Ωq, s Ωk of each head, and v.

    ``omega`` is ``(d, d)``; the results are ``(B, N, C)``.
    """
    q, k, v = qkv.reference(x, weight, bias)
    of_heads = (tokens.unflatten(-1, (-1, len(omega))) for tokens in (q, k))
    q, k = ((tokens @ (scale * omega).mT).flatten(-2) for tokens in of_heads)
    return q, k, v


def turned(weight: Tensor, bias: Tensor | None, omega: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Weight ``(3C, C)`` and bias ``(3C,)`` of the map that gives s Ωq, s Ωk and v by itself."""
    c, d = weight.shape[1], len(omega)
    w_qk, w_v = weight.split([2 * c, c])
    with torch.autocast("cpu", enabled=False):  # ΩW is rounded once, as W would be
        omega = omega.to(w_qk.dtype) * scale
        weight = torch.cat([(omega @ w_qk.unflatten(0, (-1, d))).flatten(0, 1), w_v])
        if bias is not None:
            b_qk, b_v = bias.split([2 * c, c])
            bias = torch.cat([(omega * b_qk.view(-1, 1, d)).sum(dim=-1).flatten(), b_v])
    return weight, bias
