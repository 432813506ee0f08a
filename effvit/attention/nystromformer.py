"""Nyströmformer: softmax attention through m landmarks.

Xiong et al. 2021 (arXiv 2102.03902, eq. 13 and 14).
"""

from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.kernels.choice import is_plain_depthwise, one_step, without_autocast
from effvit.kernels.dispatch import pseudo_inverse, softmax_attention, token_convolution, token_means
from effvit.kernels.pseudo_inverse import MOST_ITERATIONS
from effvit.kernels.token_means import landmark_members, scaled


class NystromformerOptions(AttentionOptions):
    """m landmarks, iterations of the pseudo-inverse, width of the convolution over values (0 none, else odd).

    m may exceed the number of tokens N: from m = N on, attention is exact.
    """

    num_landmarks: int = Field(16, ge=1)
    pinv_iterations: int = Field(6, ge=1, le=MOST_ITERATIONS)
    conv_kernel_size: int = Field(33, ge=0, le=1025)

    @field_validator("conv_kernel_size")
    @classmethod
    def _odd(cls, size: int) -> int:
        if size and size % 2 == 0:
            raise ValueError("must be odd, or 0 for no convolution")
        return size


@register
class NystromformerAttention(Attention):
    """K₁ Z K₃ v + conv(v), with Z ≈ K₂⁺. Exact attention where m ≥ N. Dropout acts on K₁.

    K₁ = softmax(q k̃ᵀ / √d), K₂ = softmax(q̃ k̃ᵀ / √d), K₃ = softmax(q̃ kᵀ / √d), with landmarks q̃, k̃ ``(m, d)``.

    Each of the S prefix tokens is a landmark of its own, as long as m > S; the patches share the other m - S, each the
    mean of neighbours in the grid (docs/mechanisms.md has the measurement behind it).
    """

    Options = NystromformerOptions
    complexity = "O(N m); exact if m ≥ N"
    paper = "Xiong et al. 2021, arXiv 2102.03902"
    needs_grid = True

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: NystromformerOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.num_landmarks, self.pinv_iterations = options.num_landmarks, options.pinv_iterations
        self.has_landmarks = self.num_landmarks < self.num_tokens
        if self.has_landmarks:
            with torch.device("cpu"):  # a table, which must have its values wherever the weights are
                members = landmark_members(grid_size, self.num_landmarks, self.prefix_tokens)
            self.register_table("members", scaled(members))
        w = options.conv_kernel_size
        # Depthwise over tokens: one kernel a head, the same for each of its channels.
        self.conv = (
            nn.Conv2d(num_heads, num_heads, (w, 1), padding=(w // 2, 0), groups=num_heads, bias=False) if w else None
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        y = self.landmark_attention(q, k, v) if self.has_landmarks else softmax_attention(q, k, v, self.dropout_p)
        return y if self.conv is None else self.plus_convolution(y, v)

    def landmark_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """K₁ (Z (K₃ v)): the products with K₁ and K₃ are attentions themselves, so neither is held in memory."""
        q_m, k_m = self.landmarks(q), self.landmarks(k)  # (B, H, m, d)
        k3_v = softmax_attention(q_m, k, v)  # (B, H, m, e)
        z_k3_v = landmark_product(q_m, k_m, k3_v, self.pinv_iterations)
        return softmax_attention(q, k_m, z_k3_v, self.dropout_p)

    def plus_convolution(self, y: Tensor, v: Tensor) -> Tensor:
        """y plus values ``(B, H, N, e)`` convolved over tokens, with each head's kernel."""
        assert self.conv is not None, "no convolution with conv_kernel_size 0"
        if not is_plain_depthwise(self.conv):
            return y + self.conv(v)
        rows, values = (tokens.transpose(1, 2).flatten(2) for tokens in (y, v))  # (B, N, H e), as they lie in memory
        kernels = self.conv.weight.flatten(1).to(v.dtype).repeat_interleave(v.shape[-1], dim=0)  # (H e, w)
        return token_convolution(values, kernels, rows).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def landmarks(self, x: Tensor) -> Tensor:
        """Tokens ``(B, H, N, d)`` to landmarks ``(B, H, m, d)``."""
        return self.split_heads(token_means(x.transpose(1, 2).flatten(2), self.table("members", x)))

    def mixing_macs(self) -> int:
        """6NmC + 2m²C + 4THm³ with landmarks, 2N²C where exact; wNC for the convolution."""
        n, m, c = self.num_tokens, self.num_landmarks, self.dim
        conv = 0 if self.conv is None else self.conv.kernel_size[0] * n * c
        if not self.has_landmarks:
            return 2 * n**2 * c + conv
        return 6 * n * m * c + 2 * m**2 * c + 4 * self.pinv_iterations * self.num_heads * m**3 + conv


@one_step
def landmark_product(q_m: Tensor, k_m: Tensor, y: Tensor, iterations: int) -> Tensor:
    """Z y with Z ≈ K₂⁺, of landmarks ``(B, H, m, d)`` and rows ``(B, H, m, e)``."""
    with without_autocast(q_m):  # the iteration squares the condition number
        dtype = torch.promote_types(q_m.dtype, torch.float32)
        k2 = (q_m.to(dtype) * q_m.shape[-1] ** -0.5 @ k_m.to(dtype).mT).softmax(dim=-1)
        return (pseudo_inverse(k2, iterations) @ y.to(dtype)).to(y.dtype)
