"""Nyströmformer: softmax attention through m landmarks.

Xiong et al. 2021 (arXiv 2102.03902, eq. 13 and 14).
"""

from math import ceil, sqrt
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from effvit.attention.base import Attention, AttentionOptions, Grid, register, softmax_attention


class NystromformerOptions(AttentionOptions):
    """m landmarks, iterations of the pseudo-inverse, width of the convolution over values (0 none, else odd).

    m may exceed the number of tokens N: from m = N on, attention is exact.
    """

    num_landmarks: int = Field(32, ge=1)
    pinv_iterations: int = Field(6, ge=1, le=1000)
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

    The class token is a landmark of its own; the patches share the other m - 1, each the mean of neighbours in the
    grid (docs/mechanisms.md has the measurement behind it).
    """

    Options = NystromformerOptions
    complexity = "O(N m); exact if m ≥ N"
    paper = "Xiong et al. 2021, arXiv 2102.03902"

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: NystromformerOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.num_landmarks, self.pinv_iterations = options.num_landmarks, options.pinv_iterations
        self.exact = self.num_landmarks >= self.num_tokens
        if not self.exact:
            # Derived from the grid, hence not in the state dict.
            members = landmark_members(grid_size, self.num_landmarks)
            # Ones become the power of two that makes sums of tokens no larger than tokens: exact in every precision.
            members = torch.ldexp(members, -torch.frexp(members.sum(dim=-1, keepdim=True)).exponent)
            self.register_buffer("members", members, persistent=False)
        w = options.conv_kernel_size
        # Depthwise over tokens: one kernel a head, the same for each of its channels.
        self.conv = (
            nn.Conv2d(num_heads, num_heads, (w, 1), padding=(w // 2, 0), groups=num_heads, bias=False) if w else None
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        y = self.exact_attention(q, k, v) if self.exact else self.landmark_attention(q, k, v)
        return y if self.conv is None else y + self.convolution(v)

    def convolution(self, v: Tensor) -> Tensor:
        """Values ``(B, H, N, e)`` convolved over tokens, with each head's kernel."""
        assert self.conv is not None, "no convolution with conv_kernel_size 0"
        tokens = v.transpose(1, 2).flatten(2)  # (B, N, H e), as values lie in memory
        kernels = self.conv.weight.flatten(1).to(v.dtype).repeat_interleave(v.shape[-1], dim=0)  # (H e, w)
        convolve = convolve_tokens if torch.compiler.is_compiling() else TokenConvolution.apply
        return convolve(tokens, kernels).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def exact_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v."""
        return softmax_attention(q, k, v, self.dropout_p)

    def landmark_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """K₁ (Z (K₃ v)): the products with K₁ and K₃ are attentions themselves, so neither is held in memory."""
        q_m, k_m = self.landmarks(q), self.landmarks(k)  # (B, H, m, d)
        k3_v = softmax_attention(q_m, k, v)  # (B, H, m, e)
        with torch.autocast(q.device.type, enabled=False):  # the iteration squares the condition number
            dtype = torch.promote_types(q.dtype, torch.float32)
            k2 = (q_m.to(dtype) * self.head_dim**-0.5 @ k_m.to(dtype).transpose(-2, -1)).softmax(dim=-1)
            z_k3_v = iterative_pinv(k2, self.pinv_iterations) @ k3_v.to(dtype)
        return softmax_attention(q, k_m, z_k3_v.to(v.dtype), self.dropout_p)

    def landmarks(self, x: Tensor) -> Tensor:
        """Tokens ``(B, H, N, d)`` to landmarks ``(B, H, m, d)``."""
        # Sums over members as one product, which neither gathers the tokens nor, backward, scatters their gradients.
        members = self.get_buffer("members")  # (m, N)
        sums = torch.bmm(members.to(x.dtype).expand(x.shape[0], -1, -1), x.transpose(1, 2).flatten(2))  # (B, m, C)
        return self.split_heads((sums / members.sum(dim=-1, keepdim=True)).to(x.dtype))

    def mixing_macs(self) -> int:
        """6NmC + 2m²C + 4THm³ with landmarks, 2N²C where exact; wNC for the convolution."""
        n, m, c = self.num_tokens, self.num_landmarks, self.dim
        conv = 0 if self.conv is None else self.conv.kernel_size[0] * n * c
        if self.exact:
            return 2 * n**2 * c + conv
        return 6 * n * m * c + 2 * m**2 * c + 4 * self.pinv_iterations * self.num_heads * m**3 + conv


def convolve_tokens(x: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each channel of ``(B, N, C)`` over tokens with its own kernel of ``(C, w)``, zeros beyond both ends."""
    channels, w = kernels.shape
    columns = x.transpose(1, 2)  # (B, C, N): channels last in memory, so nothing is copied
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # The columns of an image of one row: up to ten times as fast as the rows of an image of one column.
        y = F.conv2d(columns[:, :, None], kernels[:, None, None], padding=(0, w // 2), groups=channels)[:, :, 0]
    else:  # where oneDNN never returns from some of these images of bfloat16
        y = F.conv2d(columns[..., None], kernels[:, None, :, None], padding=(w // 2, 0), groups=channels)[..., 0]
    return y.transpose(1, 2)


class TokenConvolution(torch.autograd.Function):
    """``convolve_tokens`` whose backward pass is as fast: PyTorch's own takes up to eight times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernels)
        return convolve_tokens(x, kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernels = ctx.saved_tensors
        channels, w = kernels.shape
        # The transpose of a convolution is the one with the kernel read backwards.
        d_x = convolve_tokens(gradient, kernels.flip(1)) if ctx.needs_input_grad[0] else None
        # Sums over all tokens: for these, rows are what is fast.
        rows, d_rows = (tokens.transpose(1, 2)[..., None] for tokens in (x, gradient))
        d_kernels = conv2d_weight(rows, (channels, 1, w, 1), d_rows, padding=(w // 2, 0), groups=channels)
        return d_x, d_kernels[:, 0, :, 0]


def landmark_members(grid_size: Grid, m: int) -> Tensor:
    """Which tokens each landmark is the mean of: ones and zeros of shape ``(m, N)``, a single one in each column.

    The class token alone, then m - 1 segments of the patches in block order; all tokens where m = 1.
    """
    tokens = 1 + grid_size[0] * grid_size[1]
    landmark = torch.zeros(tokens, dtype=torch.long)
    if m > 1:
        landmark[1 + block_order(grid_size, m - 1)] = 1 + segments(tokens - 1, m - 1)
    return F.one_hot(landmark, m).T.float()


def block_order(grid_size: Grid, num_segments: int) -> Tensor:
    """Order of the patches ``(P,)`` in which contiguous segments are compact blocks of the grid.

    The grid is cut into bands about as high as a square block of P / num_segments patches; each band is read column
    by column.
    """
    rows, columns = grid_size
    height = ceil(sqrt(rows * columns / num_segments))
    bands = ceil(rows / height)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    return (((row * bands // rows) * columns + column) * rows + row).flatten().argsort()


def segments(n: int, m: int) -> Tensor:
    """Segment of each of n positions, ``(n,)``: m contiguous ones that differ in length by one at most.

    With s = ⌊n/m⌋ the first (s+1)m - n segments have s positions and the rest s + 1: nothing is padded.
    """
    lengths = torch.full((m,), n // m)
    lengths[m - n % m :] += 1
    return torch.arange(m).repeat_interleave(lengths)


def iterative_pinv(a: Tensor, iterations: int) -> Tensor:
    """Pseudo-inverse of row-stochastic matrices ``(..., m, m)`` by Razavi et al.'s third-order iteration.

    Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞) for each matrix by itself, so that a sample never depends on its batch; ‖A‖∞ = 1 for rows
    that sum to one.
    """
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = a.transpose(-2, -1) / a.sum(dim=-2, keepdim=True).amax(dim=-1, keepdim=True)
    shape, a, z = a.shape, a.reshape(-1, *a.shape[-2:]), z.reshape(-1, *a.shape[-2:])
    for _ in range(iterations):
        az = a @ z
        # Each difference is a product's own addend: no pass over matrices besides the four products.
        bracket = torch.baddbmm(15 * identity, az, 7 * identity - az, alpha=-1)
        bracket = torch.baddbmm(13 * identity, az, bracket, alpha=-1)
        z = torch.baddbmm(identity, z, bracket, beta=0, alpha=0.25)
    return z.view(shape)
