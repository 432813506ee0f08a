"""Agent attention: a few pooled queries gather the values, all queries read from them.

Han et al. 2024 (arXiv 2312.08874, eq. 4), without its agent bias, whose tables fix the grid of training. Its depthwise
convolution is the model's option ``value_conv: 3``.
"""

from typing import Any

from pydantic import Field
from torch import Tensor

from effvit.attention.base import Attention, AttentionOptions, Grid, register
from effvit.kernels.dispatch import grid_pooling, softmax_attention
from effvit.kernels.grid_pooling import uneven_members


class AgentOptions(AttentionOptions):
    """Cells a side whose mean queries are the agents; a side with no more patches is left as it is."""

    agent_size: int = Field(4, ge=1)


@register
class AgentAttention(Attention):
    """softmax(q aᵀ / √d) softmax(a kᵀ / √d) v, with agents a ``(n, d)`` the mean queries of n cells of the grid.

    Dropout acts on the left softmax.
    """

    Options = AgentOptions
    complexity = "O(N n)"
    paper = "Han et al. 2024, arXiv 2312.08874"
    needs_grid = True
    members: Tensor | None

    def __init__(self, dim: int, num_heads: int, grid_size: Grid, options: AgentOptions, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, grid_size, options, **kwargs)
        self.cells = min(options.agent_size, grid_size[0]), min(options.agent_size, grid_size[1])
        self.register_table("members", uneven_members(grid_size, self.cells))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *context: Tensor) -> Tensor:
        agents = self.agents(q)
        return softmax_attention(q, agents, softmax_attention(agents, k, v), self.dropout_p)

    def agents(self, q: Tensor) -> Tensor:
        """Queries ``(B, H, N, d)`` to agents ``(B, H, n, d)``."""
        patches = q.transpose(1, 2).flatten(2)[:, self.prefix_tokens :]
        return self.split_heads(grid_pooling(patches, self.grid_size, self.cells, self.table("members", q)))

    def mixing_macs(self) -> int:
        """4NnC."""
        return 4 * self.num_tokens * self.cells[0] * self.cells[1] * self.dim
