"""The control: every token gets the mean of all values. What attention weights are worth is the distance to this."""

from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import Attention, register
from effvit.kernels.layers import apply_linear


@register
class UniformAttention(Attention):
    """(1/N) 1 1ᵀ v, with no queries and keys. Dropout acts on the N weights 1/N."""

    complexity = "O(N)"
    paper = "a control of effvit's"

    def build_maps(self, qkv_bias: bool) -> None:
        self.value = nn.Linear(self.dim, self.dim, bias=qkv_bias)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        v = self.split_heads(apply_linear(self.value, x))
        return v, v, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        samples, heads, tokens, _ = v.shape
        weights = F.dropout(v.new_full((samples, heads, 1, tokens), 1 / tokens), self.dropout_p)
        return (weights @ v).expand(-1, -1, tokens, -1)

    def map_macs(self) -> int:
        """2NC²: values and output."""
        return 2 * self.num_tokens * self.dim**2

    def mixing_macs(self) -> int:
        """NC."""
        return self.num_tokens * self.dim
