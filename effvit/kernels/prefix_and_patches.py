"""Prefix tokens attend to all tokens; patches to their windows, or by other means in heads that have none."""

from collections.abc import Callable, Sequence

from torch import Tensor

from effvit import policy
from effvit.kernels.dispatch import softmax_attention, window_attention, windows_suit_triton
from effvit.kernels.parts import join, split
from effvit.kernels.window_attention import Windows, tokens_in_triton

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries of patches ``(B, h, P, d)``, all keys and all values of some heads to ``(B, h, P, e)``."""


def prefix_and_patches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: tuple[int, int],
    windows: Sequence[Windows | None],
    dropout_p: float = 0.0,
    others: Mix | None = None,
) -> Tensor:
    """Queries ``(B, H, N, d)``, keys and values of S + P tokens to ``(B, H, N, e)``.

    Args:
        q: queries.
        k: keys.
        v: values.
        tokens: S and P.
        windows: of each head; None for those that have none, which come last.
        dropout_p: acts on the probabilities of softmaxes.
        others: how patches attend in heads that have no windows.
    """
    of_heads = [of_head for of_head in windows if of_head is not None]
    sizes = [len(of_heads), len(windows) - len(of_heads)]
    if of_heads and windows_suit_triton(q, k, v, of_heads, dropout_p):
        policy.note("window_attention", "with_prefix_in_triton")
        y, *more = tokens_in_triton(q, k, v, of_heads)
        if others is None or not more:
            return y
        of_prefix, *qkv = more
        mixed = others(*qkv)
        return join([y, join([of_prefix, mixed], dim=2) if tokens[0] else mixed], dim=1)
    prefix, patches = split(q, list(tokens), dim=2)
    if others is None or not sizes[1]:
        mixed = window_attention(patches, k, v, of_heads, dropout_p)
    elif not of_heads:
        mixed = others(patches, k, v)
    else:
        (q_w, q_o), (k_w, k_o), (v_w, v_o) = (split(x, sizes, dim=1) for x in (patches, k, v))
        mixed = join([window_attention(q_w, k_w, v_w, of_heads, dropout_p), others(q_o, k_o, v_o)], dim=1)
    return join([softmax_attention(prefix, k, v, dropout_p), mixed], dim=2) if tokens[0] else mixed
