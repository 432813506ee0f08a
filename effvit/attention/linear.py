"""Linear attention: features of queries and keys in place of the softmax over pairs of tokens.

Katharopoulos et al. 2020 (arXiv 2006.16236, eq. 5 and 7), Cai et al. 2023 (EfficientViT, arXiv 2205.14756, eq. 3), Shen
et al. 2021 (arXiv 1812.01243, eq. 3 and 6).
"""

from typing import Literal

from torch import Tensor

from effvit.attention.base import Attention, AttentionOptions, register
from effvit.kernels.dispatch import feature_attention
from effvit.kernels.feature_attention import Features

_FEATURES = {
    "elu": Features("elu", eps=1e-6),
    "relu": Features("relu", eps=1e-6),
    "softmax": Features("softmax", eps=0.0),
}


class LinearOptions(AttentionOptions):
    """φ: ``elu`` (elu + 1), ``relu``, or ``softmax`` over the features of queries and over the tokens of keys."""

    feature_map: Literal["elu", "relu", "softmax"] = "elu"


@register
class LinearAttention(Attention):
    """φ(q) (φ(k)ᵀ v) / (φ(q) · Σ φ(k)); with ``softmax``, which sums to 1 by itself, softmax_d(q) (softmax_N(k)ᵀ v).

    ε is added to features of elu, which underflow, and of relu, which may all be 0: such a query gets the mean of all
    values. Dropout acts on φ(q).
    """

    Options = LinearOptions
    complexity = "O(N d)"
    paper = "Katharopoulos et al. 2020, arXiv 2006.16236"
    options: LinearOptions

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        return feature_attention(q, k, v, _FEATURES[self.options.feature_map], self.dropout_p)

    def mixing_macs(self) -> int:
        """2NCd, and NC for the normaliser, which ``softmax`` has none of."""
        normaliser = 0 if self.options.feature_map == "softmax" else 1
        return self.num_tokens * self.dim * (2 * self.head_dim + normaliser)
